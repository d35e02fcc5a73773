"""What `tests.supported_models.survey` found, as `supported_models.md`: counts, and a row per architecture."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from tests.supported_models.generation import NEW

__all__ = ["read", "write"]


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
    dealt = Counter(row["sequences"]["verdict"] for row in (*plain, *masked) if "sequences" in row)
    text.append(
        f"- tokens over sp: {sum(dealt.values())} of these architectures tried; "
        + ", ".join(f"{n} {verdict}" for verdict, n in sorted(dealt.items()))
    )
    for tp in (2, 4):
        shares = [row["default"][f"tp={tp}"] for row in plain if f"tp={tp}" in row.get("default", {})]
        near = sum(share <= 1.15 / tp for share in shares)
        text.append(
            f"- share within 15% of 1/{tp} on the default configuration: {near} of {len(shares)} causal language models"
        )
    text += ["", "## Causal language models", "", *_table(plain), "", "## Encoders", "", *_table(masked)]
    text += ["", "## Odd sizes: 6 heads over 3, FFN 100, vocabulary 127", "", *_table(odd), ""]
    to.write_text("\n".join(text))


def _table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| architecture | verdict | float64, worst of tp 2, 3, 4 | float32 | generates | bundle | tokens over sp "
        "| share tp=2 | share tp=4 | all-reduces per layer | traced once | whole, and why |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        default = row.get("default", {})
        reasons = [
            row.get("why"),
            default.get("why"),
            _why_not(row),
            _why_no_bundle(row),
            _why_not_dealt(row),
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
            row.get("sequences", {}).get("verdict", ""),
            f"{default['tp=2']:.3f}" if "tp=2" in default else "",
            f"{default['tp=4']:.3f}" if "tp=4" in default else "",
            ", ".join(map(str, default.get("all_reduces", []))),
            _traced(row.get("layers", {})),
            "; ".join(filter(None, dict.fromkeys(reasons))).replace("|", "/"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _generated(found: dict[str, Any]) -> str:
    few = found.get("tokens", NEW) < NEW and found["verdict"] == "equal"
    return f"equal, {found['tokens']} tokens" if few else str(found.get("verdict", ""))


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
    return f"over sp: {found['why']}" if "why" in found and row["verdict"] == "equal" else None


def _why_not(row: dict[str, Any]) -> str | None:
    """Why there is no generation, where that is not why there is nothing at all."""
    found = row.get("generates", {})
    return f"generation: {found['why']}" if "why" in found and row["verdict"] == "equal" else None
