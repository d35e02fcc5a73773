"""What `tests.supported_models.survey` found, as `supported_models.md`: counts, and a row per architecture."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.supported_models.generation import NEW
from tests.supported_models.recurrent_section import put_in, section, take_out

__all__ = ["add", "read", "write"]


STAGES = "pp=2, pp=3, tp=2 x pp=2"
"""The title of the column of pipeline stages."""
EXPERTS = "ep=2, 3, 4, tp=2 x ep=2"
"""The title of the column of experts dealt out."""
EXPERTS_COUNTED = "experts over ep, tokens replicated and exchanged, whole texts and generation with requests over dp"


def read(path: Path) -> list[dict[str, Any]]:
    """The lines that `tests.supported_models.survey` wrote; an architecture may have several."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(source: Path, to: Path, *, made_by: str) -> None:
    """The table, with its counts on top; `made_by` says how it was measured.

    Of an architecture's lines, later ones add to what earlier ones say, or replace it.
    """
    merged: dict[Any, dict[str, Any]] = {}
    for row in read(source):
        known = merged.setdefault((row["odd"], row["name"]), {})
        if "verdict" in row:
            known.pop("why", None)  # it said why an earlier verdict was what it was
        known.update(row)
    rows = [{"verdict": "not tried", **merged[key]} for key in sorted(merged)]
    plain = [row for row in rows if not row["odd"] and not row["name"].startswith("masked:")]
    masked = [row for row in rows if not row["odd"] and row["name"].startswith("masked:")]
    odd = [row for row in rows if row["odd"]]
    text = [
        "# Supported models",
        "",
        "Made by `python -m tests.supported_models.survey run` and `... survey write`. "
        + made_by.replace("\n", " ").strip(),
        "",
    ]
    for title, chosen in (("causal language models", plain), ("encoders", masked), ("odd sizes", odd)):
        counts = Counter(row["verdict"] for row in chosen)
        text.append(
            f"- {title}: {len(chosen)}; " + ", ".join(f"{n} {verdict}" for verdict, n in sorted(counts.items()))
        )
    generated = Counter(row["generates"]["verdict"] for row in plain if "generates" in row)
    text.append(
        f"- generation with a cache: {sum(generated.values())} causal language models; "
        + ", ".join(f"{n} {verdict}" for verdict, n in sorted(generated.items()))
    )
    kept = Counter(row["bundle"]["verdict"] for row in (*plain, *masked) if "bundle" in row)
    text.append(
        f"- saved as a bundle, loaded and run, bit by bit: {sum(kept.values())} causal language models and encoders; "
        + ", ".join(f"{n} {verdict}" for verdict, n in sorted(kept.items()))
    )
    text.append(_counted("tokens over sp", [row for row in (*plain, *masked) if "sequences" in row], "sequences"))
    text.append(_counted("pipeline stages", [row for row in (*plain, *masked) if "stages" in row], "stages"))
    text.append(_counted(EXPERTS_COUNTED, [row for row in (*plain, *masked) if "experts" in row], "experts"))
    for tp in (2, 4):
        shares = [row["default"][f"tp={tp}"] for row in plain if f"tp={tp}" in row.get("default", {})]
        near = sum(share <= 1.15 / tp for share in shares)
        text.append(
            f"- share within 15% of 1/{tp} on the default configuration: {near} of {len(shares)} causal language models"
        )
    text += ["", "## Causal language models", "", *_table(plain), "", *section(plain)]
    text += ["", "## Encoders", "", *_table(masked)]
    text += ["", "## Odd sizes: 6 heads over 3, FFN 100, vocabulary 127", "", *_table(odd), ""]
    to.write_text("\n".join(text))


def _table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| architecture | verdict | float64, worst of tp 2, 3, 4 | float32 | generates | bundle | tokens over sp "
        f"| {STAGES} | {EXPERTS} | share tp=2 | share tp=4 | all-reduces per layer | traced once | whole, and why |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        default = row.get("default", {})
        reasons = [
            row.get("why"),
            default.get("why"),
            _why_not(row),
            _why_no_bundle(row),
            _why_not_dealt(row),
            why_not_staged(row),
            _why_not_shared_out(row),
            *default.get("whole", []),
            *row.get("static", []),
        ]
        cells = [
            row["name"].removeprefix("masked:"),
            row["verdict"],
            f"{max(row['equal64'].values()):.0e}" if row.get("equal64") else "",
            f"{max(row['equal32'].values()):.0e}" if row.get("equal32") else "",
            _generated(row.get("generates", {})),
            row.get("bundle", {}).get("verdict", ""),
            _of_text_or_both(row.get("sequences", {})),
            staged(row),
            _of_text_or_both(row.get("experts", {})),
            f"{default['tp=2']:.3f}" if "tp=2" in default else "",
            f"{default['tp=4']:.3f}" if "tp=4" in default else "",
            ", ".join(map(str, default.get("all_reduces", []))),
            _traced(row.get("layers", {})),
            "; ".join(filter(None, dict.fromkeys(reasons))).replace("|", "/"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def staged(row: dict[str, Any]) -> str:
    """Whole texts over stages, and how many greedy tokens in a row are those of the model."""
    found = row.get("stages", {})
    tokens = f", {found['tokens']} tokens" if found.get("tokens") and found["verdict"] == "equal" else ""
    return f"{found.get('verdict', '')}{tokens}"


def why_not_staged(row: dict[str, Any]) -> str | None:
    """Why it does not run over stages, or not all that it does elsewhere."""
    found = row.get("stages", {})
    why = found.get("why") or found.get("refused")
    return f"stages: {why}" if why and row["verdict"] == "equal" else None


def _counted(what: str, rows: list[dict[str, Any]], key: str) -> str:
    counts = Counter(row[key]["verdict"] for row in rows)
    verdicts = ", ".join(f"{n} {verdict}" for verdict, n in sorted(counts.items()))
    return f"- {what}: {len(rows)} of these architectures tried; {verdicts}"


def add(source: Path, to: Path) -> None:
    """Puts what `source` says of the columns in `_ADDED` and of prompts into the page; the rest of it stays as it is.

    For what was measured without the other columns, whose lines may be gone.
    """
    found: dict[str, dict[str, Any]] = {}
    for row in read(source):
        if not row["odd"]:
            found.setdefault(row["name"], {}).update(row)
    page, known = take_out(to.read_text())
    prompts = [row for row in found.values() if "prompts" in row]
    to.write_text(put_in(_with_columns(page, found), section(prompts) if prompts else known))


def _with_columns(page: str, found: dict[str, dict[str, Any]]) -> str:
    lines, part = page.split("\n"), ""
    titles: list[str] = []
    seen: dict[str, list[dict[str, Any]]] = {title: [] for title in _ADDED}
    for number, line in enumerate(lines):
        if line.startswith("## "):
            part = line
        elif line.startswith("| architecture"):
            titles = _cells(line)
        elif line.startswith("| ") and not part.startswith("## Odd sizes"):
            cells = _cells(line)
            row = {"verdict": cells[1], **found.get(f"{'masked:' if part == '## Encoders' else ''}{cells[0]}", {})}
            for title, column in _ADDED.items():
                at = titles.index(title)
                if column.key in row:
                    row["verdict"] = cells[1]
                    cells[at] = column.cell(row)
                    why = ("" if column.why is None else column.why(row) or "").replace("|", "/").replace("; ", ", ")
                    reasons = [each for each in cells[-1].split("; ") if each and not each.startswith(column.prefix)]
                    cells[-1] = "; ".join(filter(None, [*(each for each in reasons if each not in why), why]))
                if cells[at]:
                    seen[title].append({column.key: {"verdict": cells[at].partition(",")[0]}})
            lines[number] = f"| {' | '.join(cells)} |"
    for title, column in _ADDED.items():
        start = f"- {column.counted}: "
        for number, line in enumerate(lines):
            if line.startswith(start):
                lines[number] = _counted(column.counted, seen[title], column.key)
    return "\n".join(lines)


def _cells(line: str) -> list[str]:
    return line.removeprefix("| ").removesuffix(" |").split(" | ")


def _generated(found: dict[str, Any]) -> str:
    few = found.get("tokens", NEW) < NEW and found["verdict"] == "equal"
    return f"equal, {found['tokens']} tokens" if few else str(found.get("verdict", ""))


def _of_text_or_both(found: dict[str, Any]) -> str:
    """Its verdict, and whether it is of whole texts only, as no plan of those tried generates."""
    refused = [isinstance(each, str) for each in found.get("generates", {}).values()]
    verdict = str(found.get("verdict", ""))
    return f"{verdict}, whole texts" if verdict == "equal" and refused and all(refused) else verdict


def _traced(found: dict[str, Any]) -> str:
    """How many of its layers were traced, and why not fewer."""
    if "traced" not in found:
        return str(found.get("verdict", ""))
    why = f": {found['why_not']}" if found["traced"] == found["layers"] and found["why_not"] else ""
    return f"{found['traced']} of {found['layers']}{why}".replace("|", "/")


def _why_no_bundle(row: dict[str, Any]) -> str | None:
    """Why there is no bundle, where that is not why there is nothing at all."""
    found = row.get("bundle", {})
    return f"bundle: {found['why']}" if "why" in found and row["verdict"] == "equal" else None


def _why_not_dealt(row: dict[str, Any]) -> str | None:
    """Why ranks cannot share out its tokens, where that is not why there is nothing at all."""
    found = row.get("sequences", {})
    refused = [each.removeprefix("refused: ") for each in found.get("generates", {}).values() if isinstance(each, str)]
    why = found.get("why") or (f"whole texts only, {refused[0]}" if refused else None)
    return f"over sp: {why}" if why and row["verdict"] == "equal" else None


def _why_not_shared_out(row: dict[str, Any]) -> str | None:
    """Why its experts cannot be dealt out, where that is not why there is nothing at all."""
    found = row.get("experts", {})
    refused = [each.removeprefix("refused: ") for each in found.get("generates", {}).values() if isinstance(each, str)]
    why = found.get("why") or found.get("own cache") or (f"not all generate, {refused[0]}" if refused else None)
    return f"over ep: {why}" if why and row["verdict"] == "equal" else None


def _why_not(row: dict[str, Any]) -> str | None:
    """Why there is no generation, where that is not why there is nothing at all."""
    found = row.get("generates", {})
    return f"generation: {found['why']}" if "why" in found and row["verdict"] == "equal" else None


@dataclass(frozen=True)
class _Column:
    """`key`: of a survey's row. counted: what the line on top is called; "": there is none."""

    key: str
    cell: Callable[[dict[str, Any]], str]
    why: Callable[[dict[str, Any]], str | None] | None = None
    prefix: str = "nothing: "
    """Of its reasons in the last column."""
    counted: str = ""


_ADDED = {
    "tokens over sp": _Column(
        "sequences", lambda row: _of_text_or_both(row["sequences"]), _why_not_dealt, "over sp: ", "tokens over sp"
    ),
    STAGES: _Column("stages", staged, why_not_staged, "stages: ", "pipeline stages"),
    EXPERTS: _Column(
        "experts", lambda row: _of_text_or_both(row["experts"]), _why_not_shared_out, "over ep: ", EXPERTS_COUNTED
    ),
    "traced once": _Column("layers", lambda row: _traced(row["layers"])),
}
"""By their titles."""
