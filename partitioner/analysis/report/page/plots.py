"""Plots of predicted times, drawn by matplotlib as SVG that takes its colour from the page."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from html import escape
from typing import Any

from partitioner.errors import InputError

__all__ = ["frontier_plot", "times_plot"]

INK = "#010203"
"""Stands for the page's text colour until the plot is written."""


def times_plot(predicted: Mapping[str, Any]) -> str:
    """Seconds until the first token and of each further one, of the plans, with the bars of 80% of measured times."""
    mine = predicted.get("this_plan") or {}
    plans = [plan for plan in (mine, *predicted["plans"]) if "ttft_s" in plan]
    plans = list({plan["plan"]: plan for plan in reversed(plans)}.values())[::-1]
    if not plans:
        return ""
    figure, axes = _figure(height=0.9 + 0.32 * len(plans), columns=2)
    for place, (name, title) in enumerate((("ttft", "first token"), ("tpot", "each further token"))):
        plot = axes[place]
        for row, plan in enumerate(plans):
            value = plan[f"{name}_s"] * 1e3
            bar = plan.get(f"{name}_80")
            error = None if bar is None else [[max(0, value - bar[0] * 1e3)], [max(0, bar[1] * 1e3 - value)]]
            colour = "#d1495b" if plan["plan"] == mine.get("plan") else "#3d7ea6"
            plot.errorbar([value], [row], xerr=error, fmt="o", color=colour, ecolor=colour, capsize=3, markersize=5)
        plot.set_yticks(range(len(plans)), [plan["plan"] for plan in plans] if place == 0 else [""] * len(plans))
        plot.set_ylim(len(plans) - 0.5, -0.5)
        plot.set_xlim(left=0)
        plot.set_xlabel(f"{title}, ms")
        plot.grid(axis="x", alpha=0.3)
    bars = "with bars that hold 80% of measured times" if any(p.get("tpot_80") for p in plans) else "without error bars"
    return _svg(figure, "plot-times", "Predicted times of plans", f"{len(plans)} plans, {bars}; red: this plan.")


def frontier_plot(predicted: Mapping[str, Any]) -> str:
    """Tokens per second against the time of a token: what no other plan and batch beats in both."""
    points = predicted["frontier"]
    if not points:
        return ""
    figure, (plot,) = _figure(height=3.4, columns=1)
    plot.plot([p["tpot_s"] * 1e3 for p in points], [p["tokens_per_s"] for p in points], color="#888", linewidth=1)
    for name in dict.fromkeys(point["plan"] for point in points):
        own = [point for point in points if point["plan"] == name]
        plot.plot([p["tpot_s"] * 1e3 for p in own], [p["tokens_per_s"] for p in own], "o", markersize=5, label=name)
    mine = predicted.get("this_plan") or {}
    if "tpot_s" in mine:
        plot.plot([mine["tpot_s"] * 1e3], [mine["tokens_per_s"]], "*", color="#d1495b", markersize=13,
                  label=f"this plan, batch {mine['batch']}")  # fmt: skip
    plot.set_xlabel("each further token, ms")
    plot.set_ylabel("tokens per second")
    plot.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    plot.set_xlim(left=0)
    plot.set_ylim(bottom=0)
    plot.grid(alpha=0.3)
    plot.legend(frameon=False, fontsize=8, labelcolor=INK)
    return _svg(
        figure, "plot-frontier", "Throughput against time per token", f"{len(points)} points of plan and batch."
    )


def _figure(*, height: float, columns: int) -> tuple[Any, Any]:
    try:
        import matplotlib
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(
            "the plots of predicted times are drawn by matplotlib, which is not installed: pip install "
            "'partitioner[page]', or leave --gpus out, or ask for --json alone"
        ) from error
    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "page",
        "font.size": 9,
        "font.family": "sans-serif",
        "text.parse_math": False,
    }
    style |= dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(8.6, height), layout="constrained")
        FigureCanvasSVG(figure)
        return figure, figure.subplots(1, columns, squeeze=False)[0]


def _svg(figure: Any, name: str, title: str, description: str) -> str:
    """Without what needs a network or names things twice in one page: namespaces, metadata, ids."""
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(out, format="svg", transparent=True)
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)
    text = text.replace("xlink:href", "href").replace(INK, "currentColor")
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", text)
    head = f'<svg role="img" aria-labelledby="{name}-title {name}-desc" '
    said = f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-desc">{escape(description)}</desc>'
    return re.sub(r"<svg ([^>]*)>", lambda found: f"{head}{found.group(1)}>{said}", text, count=1)
