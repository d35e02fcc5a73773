"""Copies of a program: what is changed of one is not changed of another."""

from __future__ import annotations

from dataclasses import replace
from typing import get_origin, get_type_hints

import sympy

from partitioner.program.program import Program
from tests.support import handmade

CHANGEABLE = {name for name, kind in get_type_hints(Program).items() if get_origin(kind) in (dict, list, set)}
"""Fields whose type lets them be changed in place; a Mapping or a tuple may be one for all."""


def _shared(one: Program, other: Program) -> set[str]:
    return {name for name in CHANGEABLE if getattr(one, name) is getattr(other, name)}


def test_a_copy_shares_nothing_that_can_be_changed_in_place() -> None:
    program = handmade.traced()
    copy = program.copy()
    assert _shared(program, copy) == {"inferred"}  # what rules say of an op is the same in all copies
    assert not set(program.graph.nodes) & set(copy.graph.nodes)


def test_one_that_is_no_copy_is_found_to_share_all() -> None:
    program = handmade.traced()
    assert {"weights", "symbols", "states", "notes"} < _shared(program, replace(program)) == CHANGEABLE


def test_a_size_that_a_copy_is_given_is_no_size_of_its_original() -> None:
    program = handmade.traced()
    program.copy().symbols["slots"] = sympy.Symbol("slots")
    assert set(program.symbols) == {"batch", "sequence"}
