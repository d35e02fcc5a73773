"""Timelines of stages as a picture: SVG, a row per stage, a box per piece, one schedule below the other.

Parts have classes (ground, idle, piece, number), so that a page which holds the picture can colour it anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from partitioner.errors import InputError
from partitioner.program.stages import StageTable
from runtime.pipeline.schedule import chain, ring
from runtime.pipeline.timing import Timing, one_at_a_time, time_of

__all__ = ["draw", "timings_of"]

_WIDTH, _ROW, _LEFT, _GAP = 960, 26, 90, 44
_HUES = 12
_ROUNDS = 4


def timings_of(table: StageTable, *, microbatches: int) -> list[tuple[str, Timing]]:
    """Titles and timelines of what stages do with a batch or prompt in pieces, and of decode.

    From their predicted costs: the slowest stage's whole batch is 1. Raises `InputError` where there is no piece.
    """
    if microbatches < 1:
        raise InputError(f"--microbatches must be at least 1, got {microbatches}")
    whole = max(table.costs, default=0.0) or 1.0
    # each piece of m takes 1/m of the batch's time on a stage
    seconds = [[cost / whole / microbatches] for cost in table.costs or (1.0,) * table.count]
    count = table.count
    return [
        (f"{microbatches} pieces in a chain", time_of(chain(count, microbatches), seconds)),
        ("one piece at a time, through all stages", one_at_a_time(seconds, microbatches)),
        (f"decode, {count} groups in a ring", time_of(ring(count, count, _ROUNDS * count), seconds)),
    ]


def draw(timings: Sequence[tuple[str, Timing]]) -> str:
    """Titles and timelines, to one scale."""
    longest = max((timing.stop for _, timing in timings), default=1.0) or 1.0
    scale = (_WIDTH - _LEFT - 10) / longest
    parts: list[str] = []
    top = 10
    for title, timing in timings:
        parts.append(f'<text x="{_LEFT}" y="{top + 12}" font-weight="bold">{escape(title)}</text>')
        top += 20
        for stage in range(timing.stages):
            y = top + stage * _ROW
            parts.append(f'<text x="8" y="{y + 16}">stage {stage}</text>')
            width = timing.stop * scale
            parts.append(
                f'<rect class="idle" x="{_LEFT}" y="{y}" width="{width:.1f}" height="{_ROW - 4}" fill="#eee"/>'
            )
        for span in timing.spans:
            x, width = _LEFT + span.start * scale, (span.stop - span.start) * scale
            y = top + span.stage * _ROW
            hue = span.piece % _HUES * 360 // _HUES
            parts.append(
                f'<rect class="piece" x="{x:.1f}" y="{y}" width="{max(width - 0.5, 0.5):.1f}" height="{_ROW - 4}" '
                f'fill="hsl({hue},55%,72%)"><title>stage {span.stage}, piece {span.piece}</title></rect>'
            )
            if width > 14:
                middle = x + width / 2
                parts.append(
                    f'<text class="number" x="{middle:.1f}" y="{y + 15}" text-anchor="middle">{span.piece}</text>'
                )
        top += timing.stages * _ROW + _GAP - 20
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{top}" viewBox="0 0 {_WIDTH} {top}" '
        f'font-family="sans-serif" font-size="12">\n<rect class="ground" width="100%" height="100%" fill="white"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )
