"""The ratchet: what docs/coverage.md says may get better, not worse; and a sample of it is measured again."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from tests import coverage

TABLE = Path(__file__).parents[1] / "docs" / "coverage.md"


def rows(title: str) -> list[list[str]]:
    section = TABLE.read_text().split(f"## {title}")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")][1:]
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]


def verdicts(title: str) -> Counter[str]:
    return Counter(row[1] for row in rows(title))


@pytest.mark.parametrize("title", ["Causal language models", "Encoders", "Odd sizes"])
def test_nothing_is_wrong(title: str) -> None:
    assert verdicts(title)["wrong"] == 0
    assert verdicts(title)["crashed"] == 0


def test_how_many_are_equal() -> None:
    assert verdicts("Causal language models")["equal"] >= 140


def test_everything_refused_has_a_reason() -> None:
    for row in rows("Causal language models"):
        if row[1] != "equal":
            assert len(row[-1]) > 10, row


def test_a_sample_is_measured_again() -> None:
    known = {row[0]: row for row in rows("Causal language models")}
    for name in ("llama", "gpt_bigcode"):
        row = coverage.measure(name, minutes=2)
        assert row["verdict"] == known[name][1] == "equal"


def test_shares_are_measured_again() -> None:
    known = {row[0]: row for row in rows("Causal language models")}
    row = coverage.measure_shares("gpt2", minutes=2)
    assert re.fullmatch(r"0\.5\d\d", known["gpt2"][4])
    assert row["default"]["2"] <= float(known["gpt2"][4]) + 1e-3
