"""Whose fault an error is: a bundle's is named, anything else is raised as it is."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from partitioner import BundleError, Plan, partition
from partitioner.errors import InputError
from runtime.program.bundle_errors import attribute_errors
from runtime.program.rank_program import RankProgram
from tests.support.bundle_forger import tiny_model


@pytest.fixture(scope="module")
def program() -> RankProgram:
    return partition(tiny_model(), Plan(tp=1)).rank(0)


def raised(program: RankProgram, error: BaseException) -> BaseException:
    with pytest.raises(BaseException) as caught, attribute_errors(program):
        raise error
    return caught.value


def test_of_a_compiled_program_nothing_is_changed(program: RankProgram) -> None:
    error = RuntimeError("shapes")
    assert raised(program, error) is error


@pytest.mark.parametrize("error", [RuntimeError("shapes"), KeyError("x"), MemoryError(), SyntaxError("x")], ids=repr)
def test_of_a_bundle_it_is_named_with_its_notes(program: RankProgram, error: Any) -> None:
    error.add_note("at node 'add_1' of layer, rank 0")
    found = raised(dataclasses.replace(program, read_from="the bundle here"), error)
    assert isinstance(found, BundleError)
    assert found.__cause__ is error
    assert str(found).startswith(
        "a program of the bundle here (rank 0) cannot be run like this at node 'add_1' of layer, rank 0: "
        f"{type(error).__name__}: "
    )


@pytest.mark.parametrize("error", [InputError("x"), torch.OutOfMemoryError("x"), KeyboardInterrupt()], ids=repr)
def test_what_says_enough_by_itself(program: RankProgram, error: BaseException) -> None:
    assert raised(dataclasses.replace(program, read_from="the bundle here"), error) is error
