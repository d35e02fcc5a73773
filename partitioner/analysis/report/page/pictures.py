"""Pictures as SVG in the page: ranks on hosts, memory bars, and kinds of layers before and after.

Colours are classes of the page's style sheet (c0 to c7 for parts, whole, exchange), so that they suit dark and light.
What is drawn stands in a table beside it, too; `title` and `desc` say it to those who do not see it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from runtime.kv_cache.device_memory import readable

__all__ = ["layer_picture", "memory_picture", "picture", "ranks_picture", "stages_picture"]

MOST_RANKS = 128
"""Drawn one by one."""
COLOURS = 8
_FAR = 20
"""How many times as long as the longest bar the way to the limit may be."""
_STRIPES = 16


def picture(name: str, title: str, description: str, width: int, height: int, shapes: Sequence[str]) -> str:
    """An SVG that names itself to screen readers."""
    return (
        f'<svg role="img" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'aria-labelledby="{name}-title {name}-desc"><title id="{name}-title">{escape(title)}</title>'
        f'<desc id="{name}-desc">{escape(description)}</desc>{"".join(shapes)}</svg>'
    )


def ranks_picture(page: Mapping[str, Any]) -> str:
    """A frame per host (or one of all ranks), a box per rank, coloured by stage, or by tp where there is one stage."""
    ranks, degrees = page["ranks"][:MOST_RANKS], page["degrees"]
    cluster = page["cluster"]
    per_host = cluster["per_host"] if cluster is not None else max(1, page["num_ranks"])
    colour = "pp" if degrees["pp"] > 1 else "tp"
    axes = [axis for axis, size in degrees.items() if size > 1]
    height, in_row = 26 + 15 * -(-len(axes) // 2), min(8, per_host)
    shapes, top = [], 4
    count = -(-len(ranks) // per_host)
    if cluster is not None and page["num_ranks"] <= MOST_RANKS:
        count = max(count, min(-(-cluster["num_devices"] // per_host), MOST_RANKS // per_host or 1))
    for host in range(count):
        inside = range(host * per_host, (host + 1) * per_host)
        inside = inside[:MOST_RANKS]
        rows = -(-len(inside) // in_row)
        label = "ranks" if cluster is None else f"host {host}"
        shapes.append(_rect(2, top, 112 * in_row + 10, rows * (height + 8) + 26, "frame"))
        shapes.append(_text(10, top + 16, label, "strong"))
        for place, number in enumerate(inside):
            x, y = 8 + 112 * (place % in_row), top + 22 + (height + 8) * (place // in_row)
            if number >= len(ranks):
                shapes += [_rect(x, y, 104, height, "idle"), _text(x + 52, y + height // 2 + 4, "idle", "middle")]
                continue
            rank = ranks[number]
            shapes.append(_rect(x, y, 104, height, f"c{rank[colour] % COLOURS}", _coordinates(rank, axes)))
            shapes.append(_text(x + 52, y + 17, f"rank {number}", "middle strong on"))
            for line in range(0, len(axes), 2):
                said = " ".join(f"{axis} {rank[axis]}" for axis in axes[line : line + 2])
                shapes.append(_text(x + 52, y + 32 + 15 * (line // 2), said, "middle on small"))
        top += rows * (height + 8) + 34
    if page["num_ranks"] > MOST_RANKS:
        shapes.append(_text(10, top + 14, f"and {page['num_ranks'] - MOST_RANKS:,} more ranks in the same order"))
        top += 24
    where = "on one mesh" if cluster is None else f"on {cluster['name']}, {per_host} devices in each host"
    said = f"{page['num_ranks']} ranks {where}; colours: the coordinate along {colour}. The table below says the same."
    return picture("picture-ranks", "Ranks on the cluster", said, 112 * in_row + 16, top, shapes)


def _coordinates(rank: Mapping[str, Any], axes: Sequence[str]) -> str:
    return f"rank {rank['rank']}: " + ", ".join(f"{axis} {rank[axis]}" for axis in axes)


_KINDS = (
    ("own_bytes", "c0", "weights of its own"),
    ("replicated_bytes", "whole", "weights on other ranks too"),
    ("cache_bytes", "c2", "cache"),
    ("activation_bytes", "c3", "results"),
    ("buffer_bytes", "c4", "buffers"),
)


def memory_picture(page: Mapping[str, Any]) -> str:
    """A bar per rank (of many, one per run of ranks that hold the same), and a line at the limit."""
    memory = page["memory"]
    limit = memory["limit_bytes"]
    bars = _bars(memory["ranks"])
    most = max([bar["total_bytes"] for _, bar in bars]) or 1
    near = bool(limit) and limit <= _FAR * most  # else a line at the limit would leave nothing of the bars
    longest = max(most, limit) if near else most
    scale, left = 600 / longest, 110
    shapes: list[str] = []
    x = float(left)
    used = [each for each in _KINDS if any(bar[each[0]] for _, bar in bars)]
    for _, colour, said in used:
        shapes += [_rect(x, 4, 14, 14, colour), _text(x + 20, 16, said)]
        x += 40 + 7 * len(said)
    top = 34
    for label, bar in bars:
        shapes.append(_text(left - 8, top + 14, label, "end"))
        x = float(left)
        for key, colour, said in used:
            width = bar[key] * scale
            if width:
                shapes.append(_rect(x, top, width, 18, colour, f"{label}: {said}, {readable(bar[key])}"))
            x += width
        share = "" if bar["share_of_limit"] is None else f" ({bar['share_of_limit']:.0%})"
        shapes.append(_text(round(x) + 6, top + 14, readable(bar["total_bytes"]) + share, "halo"))
        top += 24
    if limit and not near:
        shapes.append(_text(left, top + 14, f"the limit, {readable(limit)}, is {limit / most:,.0f} times as far"))
        top += 20
    if near:
        x = left + limit * scale
        shapes.append(f'<line class="limit" x1="{x:.1f}" x2="{x:.1f}" y1="26" y2="{top}"/>')
        shapes.append(_text(round(x), top + 14, f"limit {readable(limit)}", "middle"))
        top += 20
    fullest = memory["ranks"][memory["fullest"]]
    said = f"The fullest is rank {fullest['rank']} with {readable(fullest['total_bytes'])}"
    said += f" of {readable(limit)}." if limit else "; there is no limit, as no cluster is given."
    return picture("picture-memory", "Memory of each rank", said, 860, top + 6, shapes)


def _bars(ranks: Sequence[Mapping[str, Any]]) -> list[tuple[str, Mapping[str, Any]]]:
    if len(ranks) <= MOST_RANKS // 2:
        return [(f"rank {rank['rank']}", rank) for rank in ranks]
    runs: list[tuple[int, int, Mapping[str, Any]]] = []
    for rank in ranks:
        same = {key: value for key, value in rank.items() if key != "rank"}
        if runs and {key: value for key, value in runs[-1][2].items() if key != "rank"} == same:
            runs[-1] = (runs[-1][0], rank["rank"], runs[-1][2])
        else:
            runs.append((rank["rank"], rank["rank"], rank))
    return [(f"{first} to {last}", rank) for first, last, rank in runs[: MOST_RANKS // 2]]


def layer_picture(number: int, kind: Mapping[str, Any]) -> str:
    """Left the model's matrices, right the ranks' parts of them, and bars where ranks exchange."""
    shapes = [_text(10, 16, "in the model", "strong"), _text(250, 16, "on the ranks", "strong")]
    top = 28
    for step in kind["steps"]:
        if step["kind"] == "exchange":
            said = f"{step['op']} over {step['axes']}, {readable(step['bytes_per_token'])} per token"
            shapes.append(f'<line class="flow" x1="45" x2="45" y1="{top}" y2="{top + 26}"/>')
            shapes += [
                _rect(250, top + 2, 440, 22, "exchange", step["purpose"]),
                _text(470, top + 17, said, "middle on"),
            ]
            top += 34
            continue
        divided = step["divided"] if step["kind"] == "product" else [step] if step["parts"] else []
        name = step["weight"] if step["kind"] == "product" else step["op"]
        shape = f"{step['heads']} heads" if step["kind"] == "attention" else " x ".join(map(str, step["shape"]))
        slices = min(step["shape"][0], _STRIPES) if step["kind"] == "product" and len(step["shape"]) == 3 else 1
        wide = 70 / slices
        shapes += [_rect(10 + wide * i, top, wide - 2 * (slices > 1), 40, "whole") for i in range(slices)]
        shapes += [
            _text(90, top + 17, _short(name, 24)),
            _text(90, top + 34, shape, "small"),
        ]
        shapes += _divided(250, top, 70, 40, divided)
        said = "; ".join(f"{each['how']} over {each['axes']}, {len(each['parts'])} parts" for each in divided)
        shapes.append(_text(330, top + 24, said or "whole on every rank"))
        top += 50
    steps = [step for step in kind["steps"] if step["kind"] == "exchange"]
    said = (
        f"{len(kind['steps'])} steps, of which {len(steps)} are exchanges between ranks. The table below says the same."
    )
    return picture(f"picture-layer-{number}", f"{kind['name']} before and after", said, 720, top + 4, shapes)


def stages_picture(page: Mapping[str, Any]) -> str:
    """A row of layers, and below it the stages that have them, with what goes from one to the next."""
    stages = [] if page["stages"] is None else page["stages"]["stages"]
    count = sum(stage["num_layers"] for stage in stages)
    if not count or len(stages) > MOST_RANKS:
        return ""
    wide = max(6.0, min(40.0, 820 / count))
    shapes = [_text(10, 16, f"{count} layers in the model", "strong"), _text(10, 72, "on the stages", "strong")]
    at, gap = 0, 14.0 if len(stages) > 1 else 0.0
    for stage in stages:
        number, held = stage["stage"], stage["num_layers"]
        left, width = 10 + at * wide + number * gap, held * wide
        shapes += [_rect(10 + (at + i) * wide, 24, wide - 1, 24, "whole") for i in range(held)]
        said = f"stage {number}: {stage['first_layer']} to {stage['last_layer']}, {stage['share']:.1%} of the time"
        shapes.append(_rect(left, 80, max(width - 1, 1), 34, f"c{number % COLOURS}", said))
        shapes.append(
            _text(round(left + width / 2), 101, f"stage {number}" if width > 52 else str(number), "middle on")
        )
        if stage["hands_on"]:
            shapes.append(f'<line class="flow" x1="{left + width:.1f}" x2="{left + width + gap:.1f}" y1="97" y2="97"/>')
        at += held
    said = f"{count} layers on {len(stages)} stages. The table of stages says the same."
    total = round(20 + count * wide + len(stages) * gap)
    return picture("picture-stages", "Layers on stages", said, max(total, 240), 122, shapes)


def _divided(x: float, y: float, width: float, height: float, divided: Sequence[Mapping[str, Any]]) -> list[str]:
    """Columns side by side, rows and entries below each other, experts as boxes of their own; a second split inside."""
    if not divided:
        return [_rect(x, y, width, height, "whole")]
    first, rest = divided[0], divided[1:]
    parts = list(first["parts"])[:_STRIPES]
    total, at = sum(parts) or 1, 0.0
    gap = 3 if first["how"] == "experts" else 0.0
    shapes = []
    for place, part in enumerate(parts):
        share = part / total
        across = first["how"] in ("columns", "heads", "experts", "parts")
        left, top = (x + at * width, y) if across else (x, y + at * height)
        wide, high = (max(share * width - gap, 0.5), height) if across else (width, share * height)
        label = f"part {place} of {len(first['parts'])} over {first['axes']}: {part}"
        shapes.append(_rect(left, top, wide, high, f"c{place % COLOURS}", label))
        if rest:
            cuts = list(rest[0]["parts"])[:_STRIPES]
            for cut in range(1, len(cuts)):
                y1 = top + high * sum(cuts[:cut]) / (sum(cuts) or 1)
                shapes.append(
                    f'<line class="flow" x1="{left:.1f}" x2="{left + wide:.1f}" y1="{y1:.1f}" y2="{y1:.1f}"/>'
                )
        at += share
    return shapes


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else f"...{text[-most + 3 :]}"


def _rect(x: float, y: float, width: float, height: float, kind: str, title: str = "") -> str:
    inner = f"<title>{escape(title)}</title>" if title else ""
    return (
        f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="2">{inner}</rect>'
    )


def _text(x: float, y: float, said: str, kind: str = "") -> str:
    return f'<text x="{x}" y="{y}" class="{kind}">{escape(said)}</text>'
