"""The ratchet: what supported_models.md says may get better, not worse; and a sample of it is measured again."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from tests.supported_models import recurrent_section, survey
from tests.supported_models.table import EXPERTS, STAGES

TABLE = Path(__file__).parents[2] / "docs" / "reference" / "supported_models.md"

EQUAL = 169
GENERATE = 149
"""How many causal language models are at least equal to their own code, and generate what it does."""

BUNDLE = 221
"""How many of these and of the encoders do the same, bit by bit, when loaded from a bundle."""

STAGED = 180
"""How many of these and of the encoders compute and generate the same as pipeline stages."""

DEALT = 48
"""How many mixtures of experts compute and generate the same with their experts dealt out, by every plan tried."""

IN_PIECES = 7
"""How many recurrent models run prompts many tokens at a time, at tp = 2 and 3."""

NEAR = {2: 144, 4: 142}
"""By tp: for how many default configurations the fullest rank holds at most 1.15 times 1/tp of the matrices."""


def rows(title: str) -> list[dict[str, str]]:
    """One per architecture, by column."""
    section = TABLE.read_text().split(f"## {title}")[1].split("\n## ")[0]
    lines = [line[2:].removesuffix(" |") for line in section.splitlines() if line.startswith("| ")]
    header, *rest = [[cell.strip() for cell in line.split(" | ")] for line in lines]
    return [dict(zip(header, cells, strict=True)) for cells in rest]


def verdicts(title: str) -> Counter[str]:
    return Counter(row["verdict"] for row in rows(title))


@pytest.mark.parametrize("title", ["Causal language models", "Encoders", "Odd sizes"])
def test_nothing_is_wrong(title: str) -> None:
    assert verdicts(title)["wrong"] == 0
    assert verdicts(title)["crashed"] == 0


def test_how_many_are_equal() -> None:
    assert verdicts("Causal language models")["equal"] >= EQUAL


def test_everything_refused_has_a_reason() -> None:
    for row in rows("Causal language models"):
        if row["verdict"] != "equal" or row["generates"] == "refused":
            assert len(row["whole, and why"]) > 10, row


def test_nothing_generates_wrong_tokens() -> None:
    found = Counter(row["generates"].split(",")[0] for row in rows("Causal language models"))
    assert found.keys() <= {"equal", "refused", "not built", ""}  # empty: not measured yet
    assert found["equal"] >= GENERATE


def test_nothing_differs_when_loaded_from_a_bundle() -> None:
    found = Counter(row["bundle"] for title in ("Causal language models", "Encoders") for row in rows(title))
    assert found.keys() <= {"equal", "refused", "not built"}
    assert found["equal"] >= BUNDLE


def test_nothing_is_wrong_as_pipeline_stages() -> None:
    found = Counter(
        row[STAGES].split(",")[0] for title in ("Causal language models", "Encoders") for row in rows(title)
    )
    assert found.keys() <= {"equal", "refused", ""}  # empty: not measured yet
    assert found["equal"] >= STAGED


def test_nothing_is_wrong_with_experts_dealt_out() -> None:
    found = Counter(
        row[EXPERTS].split(",")[0] for title in ("Causal language models", "Encoders") for row in rows(title)
    )
    assert found.keys() <= {"equal", "refused", "no experts", "not built", ""}  # empty: not measured, or no mixture
    assert found["equal"] >= DEALT


def test_prompts_of_recurrent_models_run_in_pieces_or_have_a_reason() -> None:
    found = rows(recurrent_section.TITLE)
    assert {row["prompts"] for row in found} <= {"in pieces", "token by token", "refused"}
    assert all(len(row["why"]) > 10 for row in found if row["prompts"] != "in pieces")
    assert sum(row["prompts"] == "in pieces" for row in found) >= IN_PIECES


def test_a_section_is_put_into_the_page_and_taken_out_again() -> None:
    page, lines = recurrent_section.take_out(TABLE.read_text())
    assert recurrent_section.TITLE not in page
    assert recurrent_section.take_out(page) == (page, [])
    assert recurrent_section.put_in(page, lines) == TABLE.read_text()


@pytest.mark.parametrize("tp", NEAR)
def test_how_many_shares_are_near_the_ideal(tp: int) -> None:
    shares = [row[f"share tp={tp}"] for row in rows("Causal language models")]
    assert sum(float(share) <= 1.15 / tp for share in shares if share) >= NEAR[tp]


def test_a_sample_is_measured_again() -> None:
    known = {row["architecture"]: row for row in rows("Causal language models")}
    for name in ("llama", "gpt_bigcode"):
        row = survey.measure(name, minutes=2)
        assert row["verdict"] == known[name]["verdict"] == "equal"


def test_shares_are_measured_again() -> None:
    known = {row["architecture"]: row for row in rows("Causal language models")}
    row = survey.measure_shares("gpt2", minutes=2)
    assert re.fullmatch(r"0\.5\d\d", known["gpt2"]["share tp=2"])
    assert row["default"]["tp=2"] <= float(known["gpt2"]["share tp=2"]) + 1e-3
