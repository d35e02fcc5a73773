"""The code of docs/extending/adding_a_rule.md as typed, and its tables against the code."""

import re
from dataclasses import fields

import pytest
import torch

from partitioner.analysis.rules import RULES
from partitioner.analysis.rules.notation import Notation
from tests.support.processes import typed

DOC = "extending/adding_a_rule.md"


def test_the_code(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    aten = torch.ops.aten
    assert aten.addmv not in RULES, "it has a rule now: the doc needs another example"
    monkeypatch.setitem(RULES, aten.addmv, RULES[aten.linear])  # taken back afterwards, with what the doc puts there
    exec("".join(typed.code(DOC)), {"__name__": "typed"})
    assert capsys.readouterr().out == "frozenset({'k'})\n"


def test_every_table_of_rules_is_named() -> None:
    folder = typed.ROOT / "partitioner" / "analysis" / "rules"
    tables = {path.name for path in folder.glob("*.py") if re.search(r"^RULES = Rules\(\)$", path.read_text(), re.M)}
    named = set(re.findall(r"^\| `(\w+\.py)` \|", typed.text_of(DOC), re.M))
    assert tables - {"__init__.py"} == named


def test_every_field_of_a_rule_is_explained() -> None:
    explained = set(re.findall(r"^\| `(\w+)` \|", typed.text_of(DOC), re.M))
    assert {field.name for field in fields(Notation)} - {"opaque"} <= explained
