"""Draw the pictures of the docs, beside this file; a test compares them with what this draws.

    python docs/reference/pictures/draw.py
    python docs/reference/pictures/draw.py trace.json      trace.svg alone, of a trace that `--profile` wrote

pipeline.svg       from a model to what each rank runs: the compiler's steps, as docs/architecture.md names them
uneven_heads.svg   who gets which heads of the model that comes along: 6 query heads over 2 kv heads, on 4 ranks
report.svg         the report of that model on 2 ranks, as a terminal shows it
trace.svg          the first layer of one decode step on two ranks: what was measured once, so that no test compares it
"""

from __future__ import annotations

import json
import re
import sys
from html import escape
from pathlib import Path
from typing import Any

from partitioner import Plan, partition
from partitioner.sharding.layout import Layout
from partitioner.storage.example import EXAMPLE_MODEL

HERE = Path(__file__).resolve().parent
ARCHITECTURE = HERE.parents[1] / "architecture.md"
NUM_RANKS = 4
TRACKS = {"compute": "#9ecae1", "communication": "#fdd0a2", "waiting": "#dadaeb"}
COLOURS = ("#9ecae1", "#fdd0a2", "#a1d99b", "#dadaeb")
FONT = 'font-family="sans-serif" font-size="13"'


def pictures() -> dict[str, str]:
    """The text of each picture, by file name."""
    return {"pipeline.svg": pipeline(), "uneven_heads.svg": uneven_heads(), "report.svg": report()}


def pipeline() -> str:
    """A box per line of the block "The pipeline" in docs/architecture.md."""
    block = re.search(r"## The pipeline\n\n```\n(.*?)```", ARCHITECTURE.read_text(encoding="utf-8"), re.DOTALL)
    assert block is not None
    lines = [re.split(r" {2,}", line.strip()) for line in block[1].strip().splitlines()]
    shapes, top = [], 10
    for number, fields in enumerate(lines):
        name, what, *_ = fields
        shapes += [box(10, top, 130, 34, name, COLOURS[0], bold=True), text(155, top + 22, what)]
        if number < len(lines) - 1:
            shapes.append(arrow(75, top + 34, top + 50))
        top += 50
    return svg(640, top, shapes)


def uneven_heads() -> str:
    """Rows are ranks; a box is a head that the rank holds."""
    config = json.loads((EXAMPLE_MODEL / "config.json").read_text(encoding="utf-8"))
    num_heads, num_kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    size = config.get("head_dim") or config["hidden_size"] // num_heads
    layouts = partition(EXAMPLE_MODEL, Plan(tp=NUM_RANKS)).program_of("text").weight_layouts
    first = [layout for name, layout in layouts.items() if ".0." in name and ".self_attn." in name]
    # the query's rows are as many as all heads have, those of keys and values as all kv heads
    queries = next(each for each in first if held_rows(each) == num_heads * size)
    keys = next(each for each in first if held_rows(each) == num_kv_heads * size)
    shapes = [
        text(110, 24, f"{num_heads} query heads", bold=True),
        text(110 + 62 * num_heads, 24, "kv heads", bold=True),
    ]
    per_kv_head = num_heads // num_kv_heads
    for rank in range(NUM_RANKS):
        top = 40 + 44 * rank
        shapes.append(text(20, top + 22, f"rank {rank}", bold=True))
        for head in heads(queries, rank, size):
            shapes.append(box(110 + 56 * head, top, 48, 34, f"q{head}", COLOURS[head // per_kv_head]))
        for head in heads(keys, rank, size):
            shapes.append(box(110 + 62 * num_heads + 56 * head, top, 48, 34, f"kv{head}", COLOURS[head]))
    note = "Colours: a query head and its kv head. A kv head is on every rank that has one of its query heads."
    bottom = 40 + 44 * NUM_RANKS
    return svg(800, bottom + 30, [*shapes, text(20, bottom + 16, note)])


def report() -> str:
    """What `partitioner report --tp 2` prints of the model that comes along."""
    lines = str(partition(EXAMPLE_MODEL, Plan(tp=2)).report).splitlines()
    style = 'font-family="monospace" font-size="12" xml:space="preserve"'
    shapes = [f'<text x="10" y="{22 + 17 * number}" {style}>{escape(line)}</text>' for number, line in enumerate(lines)]
    return svg(20 + 8 * max(map(len, lines)), 17 * len(lines) + 20, shapes)


def trace(events: list[dict[str, Any]]) -> str:
    """A row per rank and track, to scale; the first layer of the last step but one, which no start disturbs."""
    spans = [event for event in events if event["ph"] == "X"]
    runs = sorted((e["ts"], e["dur"]) for e in spans if e["pid"] == 0 and e["name"].startswith("run "))
    begins, lasts = runs[-2]
    layer = [
        event
        for event in spans
        if event["cat"] in TRACKS
        and begins <= event["ts"] < begins + lasts
        and ".layers.0." in event["args"].get("path", "")
    ]
    start, stop = min(event["ts"] for event in layer), max(event["ts"] + event["dur"] for event in layer)
    scale = 640 / (stop - start)
    ranks = sorted({event["pid"] for event in layer})
    shapes = [text(110, 20, f"layer 0 of one decode step: {(stop - start) / 1000:.1f} ms", bold=True)]
    for number, rank in enumerate(ranks):
        for place, (track, colour) in enumerate(TRACKS.items()):
            top = 34 + number * 100 + place * 28
            shapes.append(text(10, top + 16, f"rank {rank} {track}" if place == 0 else track))
            for event in layer:
                if event["pid"] == rank and event["cat"] == track:
                    left, width = 140 + (event["ts"] - start) * scale, max(event["dur"] * scale, 0.5)
                    label = escape(f"{event['args'].get('op', event['name'])}, {event['dur']:.0f} microseconds")
                    shapes.append(
                        f'<rect x="{left:.1f}" y="{top}" width="{width:.1f}" height="24" fill="{colour}" '
                        f'stroke="#555" stroke-width="0.3"><title>{label}</title></rect>'
                    )
    return svg(800, 34 + 100 * len(ranks), shapes)


def held_rows(layout: Layout) -> int:
    """How many rows all ranks hold together, each counted once; 0 where rows are not split."""
    split = layout.split(0)
    return 0 if split is None else len({index for owned in split.owned for index in owned.indices()})


def heads(layout: Layout, rank: int, size: int) -> list[int]:
    split = layout.split(0)
    assert split is not None
    return sorted({index // size for index in split.owned[rank].indices()})


def box(x: int, y: int, width: int, height: int, label: str, colour: str, *, bold: bool = False) -> str:
    rectangle = f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="4" fill="{colour}" stroke="#555"/>'
    return rectangle + text(x + width // 2, y + height // 2 + 5, label, middle=True, bold=bold)


def text(x: int, y: int, said: str, *, middle: bool = False, bold: bool = False) -> str:
    style = (' text-anchor="middle"' if middle else "") + (' font-weight="bold"' if bold else "")
    return f'<text x="{x}" y="{y}" {FONT}{style}>{escape(said)}</text>'


def arrow(x: int, top: int, bottom: int) -> str:
    line = f'<line x1="{x}" y1="{top}" x2="{x}" y2="{bottom - 4}" stroke="#555"/>'
    return line + f'<path d="M{x - 4} {bottom - 6} L{x + 4} {bottom - 6} L{x} {bottom} Z" fill="#555"/>'


def svg(width: int, height: int, shapes: list[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">'
    background = f'<rect width="{width}" height="{height}" fill="white"/>'
    return "\n".join([head, background, *shapes, "</svg>"]) + "\n"


if __name__ == "__main__":
    if len(sys.argv) > 1:
        drawings = {"trace.svg": trace(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["traceEvents"])}
    else:
        drawings = pictures()
    for file, drawn in drawings.items():
        (HERE / file).write_text(drawn, encoding="utf-8")
