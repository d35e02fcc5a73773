"""The page as HTML: one file without anything from elsewhere, readable without scripts.

What models, plans and clusters can name is text of the page, never markup: the template escapes it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from partitioner.analysis.report.page.pictures import layer_picture, memory_picture, ranks_picture, stages_picture
from partitioner.analysis.report.page.plots import frontier_plot, times_plot
from partitioner.analysis.report.page.tables import seconds, tables
from partitioner.analysis.report.timeline import draw
from partitioner.errors import InputError
from runtime.kv_cache.device_memory import readable
from runtime.pipeline.timing import Span, Timing

__all__ = ["as_json", "render"]

HERE = Path(__file__).resolve().parent
MOST_KINDS = 8
"""Kinds of layers that are drawn."""
SECTIONS = (
    ("overview", "In short"),
    ("where", "Ranks"),
    ("memory", "Memory"),
    ("layers", "Layers before and after"),
    ("why", "What stayed whole, and why"),
    ("communication", "Communication"),
    ("schedule", "Stages over time"),
    ("predicted", "Predicted times"),
)


def as_json(page: Mapping[str, Any]) -> str:
    """All that the page says. Raises where a number is none."""
    return json.dumps(page, indent=1, allow_nan=False)


def render(page: Mapping[str, Any], *, version: str) -> str:
    """`page`: of `page_contents`. Raises `InputError` where a library of the extra `page` is not installed."""
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
        from markupsafe import Markup
    except ImportError as error:
        raise InputError(
            "the page is made by jinja2, which is not installed: pip install 'partitioner[page]', or ask for --json"
        ) from error
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    predicted = page["predicted"] or {}
    priced = predicted if "plans" in predicted else None
    drawn = {
        "ranks": ranks_picture(page),
        "memory": memory_picture(page),
        "stages": stages_picture(page),
        "schedule": _schedule(page),
        "times": times_plot(priced) if priced else "",
        "frontier": frontier_plot(priced) if priced else "",
    }
    kinds = page["layers"]
    layers = [layer_picture(number, kind) if number < MOST_KINDS else "" for number, kind in enumerate(kinds)]
    text = environment.get_template("page.html").render(
        page=page,
        tables=tables(page),
        # made here, with all text in them escaped
        pictures={**{name: Markup(svg) for name, svg in drawn.items()}, "layers": [Markup(svg) for svg in layers]},
        sections=SECTIONS,
        facts=_facts(page),
        mesh=" x ".join(f"{axis} {size}" for axis, size in page["degrees"].items() if size > 1) or "one rank",
        most_kinds=MOST_KINDS,
        style=Markup((HERE / "page.css").read_text(encoding="utf-8")),
        script=Markup((HERE / "page.js").read_text(encoding="utf-8")),
        version=version,
    )
    return text.lstrip()


def _facts(page: Mapping[str, Any]) -> list[tuple[str, str]]:
    memory = page["memory"]
    fullest = memory["ranks"][memory["fullest"]]
    limit = memory["limit_bytes"]
    held = readable(fullest["total_bytes"])
    found = [
        ("ranks", f"{page['num_ranks']}"),
        (f"weights, {' and '.join(page['dtypes'])}", readable(page["bytes_whole"])),
        (f"the fullest rank ({fullest['rank']}) holds", held if limit is None else f"{held} of {readable(limit)}"),
        ("its share of all matrices", f"{page['matrix_share']:.1%}"),
    ]
    if limit is not None:
        found.append(("fits", "yes" if memory["fits"] else "no"))
    whole = sum(row["all_bytes"] for row in page["weights"] if row["is_matrix"] and not row["split"])
    found.append(("matrices whole on every rank", readable(whole)))
    mine = (page["predicted"] or {}).get("this_plan") or {}
    for name, said in (("ttft", "first token after"), ("tpot", "each further token")):
        if f"{name}_s" in mine:
            bar = mine.get(f"{name}_80")
            bars = f" ({seconds(bar[0])} to {seconds(bar[1])})" if bar else ", no error bar known"
            found.append((said, seconds(mine[f"{name}_s"]) + bars))
    if "tokens_per_s" in mine:
        found.append(("tokens per second", f"{mine['tokens_per_s']:,.0f}, bound by {mine['binds']}"))
    for each in page["communication"]:
        found.append((f"a rank sends at most in a run of {each['entry']}", readable(each["most_bytes"])))
    return found


def _schedule(page: Mapping[str, Any]) -> str:
    """The picture of `partitioner schedule`, without the name of SVG's namespace, which HTML does not need."""
    timings = [
        (
            f"{each['title']}: idle {each['idle']:.1%}",
            Timing(tuple(Span(**span) for span in each["spans"]), each["stop"], each["stages"]),
        )
        for each in page["schedule"]
    ]
    if not timings:
        return ""
    text = draw(timings).replace(' xmlns="http://www.w3.org/2000/svg"', "", 1)
    said = escape("; ".join(title for title, _ in timings))
    named = f'<title id="picture-schedule-title">Stages over time</title><desc id="picture-schedule-desc">{said}</desc>'
    head = '<svg role="img" aria-labelledby="picture-schedule-title picture-schedule-desc" '
    first, _, rest = text.replace("<svg ", head, 1).partition(">")
    return f"{first}>{named}{rest}"
