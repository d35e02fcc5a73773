"""The part of `supported_models.md` on models with a state per sequence: how their prompts run, a row each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

__all__ = ["TITLE", "put_in", "section", "take_out"]

TITLE = "Prompts of recurrent models"
_NEXT = "## Encoders\n"
_SAYS = """\
Causal language models that remember a state per sequence, which each token changes: scans, convolutions, delta rules.
In pieces: as many tokens of a prompt run at a time as `prefill_step` says. Token by token: as single ones, with the
reason. Measured by `python -m tests.supported_models.survey prompts` at tp = 2 and 3, prompts of 1, 5, 11 and 23
tokens at once and 7 at a time, in float64; the tokens that follow must be those of the model's own forward without a
cache, and so must their log-probabilities."""
_HEADER = ("architecture", "prompts", "log-probabilities, worst of tp 2, 3", "why")


def section(rows: Iterable[dict[str, Any]]) -> list[str]:
    """Lines of Markdown on those of the rows that have a state per sequence, or may have one."""
    found = {row["name"]: row["prompts"] for row in rows if row.get("prompts", {}).get("verdict")}
    counts = Counter(each["verdict"] for each in found.values())
    lines = [f"## {TITLE}", "", *_SAYS.split("\n"), ""]
    lines += [
        f"{len(found)} architectures; " + ", ".join(f"{n} {verdict}" for verdict, n in sorted(counts.items())),
        "",
    ]
    lines += [_line(_HEADER), "|" + "---|" * len(_HEADER)]
    for name, each in sorted(found.items()):
        errors = each.get("errors", {}).values()
        why = each.get("why", "").replace("|", "/")
        lines.append(_line((name, each["verdict"], f"{max(errors):.0e}" if errors else "", why)))
    return lines


def take_out(page: str) -> tuple[str, list[str]]:
    """The page without this section, and the section's lines; none where it has none."""
    before, found, after = page.partition(f"## {TITLE}\n")
    if not found:
        return page, []
    own, _, after = after.partition(_NEXT)
    return before + _NEXT + after, (found + own).rstrip("\n").split("\n")


def put_in(page: str, lines: list[str]) -> str:
    """The page with these lines before the section of encoders."""
    return page.replace(_NEXT, "\n".join([*lines, "", _NEXT]), 1) if lines else page


def _line(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cells) + " |"
