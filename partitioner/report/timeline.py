"""Timelines of stages as a picture: SVG, a row per stage, a box per piece, one schedule below the other."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from runtime.pipeline.timing import Timing

__all__ = ["draw"]

_WIDTH, _ROW, _LEFT, _GAP = 960, 26, 90, 44
_HUES = 12


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
            parts.append(
                f'<rect x="{_LEFT}" y="{y}" width="{timing.stop * scale:.1f}" height="{_ROW - 4}" fill="#eee"/>'
            )
        for span in timing.spans:
            x, width = _LEFT + span.start * scale, (span.stop - span.start) * scale
            y = top + span.stage * _ROW
            hue = span.piece % _HUES * 360 // _HUES
            parts.append(
                f'<rect x="{x:.1f}" y="{y}" width="{max(width - 0.5, 0.5):.1f}" height="{_ROW - 4}" '
                f'fill="hsl({hue},55%,72%)"><title>stage {span.stage}, piece {span.piece}</title></rect>'
            )
            if width > 14:
                parts.append(f'<text x="{x + width / 2:.1f}" y="{y + 15}" text-anchor="middle">{span.piece}</text>')
        top += timing.stages * _ROW + _GAP - 20
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{top}" font-family="sans-serif" '
        f'font-size="12">\n<rect width="100%" height="100%" fill="white"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )
