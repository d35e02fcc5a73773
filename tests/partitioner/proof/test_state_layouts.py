"""A state must be read and written as the ranks hold it: what disagrees is refused before anything runs."""

from dataclasses import replace

import pytest

from partitioner.errors import LayoutError
from partitioner.program.plan import Plan
from partitioner.program.program import Program
from partitioner.proof.layouts import check
from partitioner.sharding.layout import REPLICATED
from partitioner.sharding.mesh import Mesh
from passes.tensor_parallel import TensorParallel
from tests.support import stepping


def split(name: str) -> Program:
    return TensorParallel().run(stepping.traced(name)[1].copy(Mesh.of(tp=2)))


def named(program: Program, part: str) -> str:
    return next(name for name, state in program.states.items() if part in name and any(state.layout.dims))


@pytest.mark.parametrize("part", ["conv", "key"])
def test_a_state_held_whole_but_written_in_part(part: str) -> None:
    program = split("lfm2_moe" if part == "conv" else "bloom")
    check(program)
    name = named(program, part)
    state = program.states[name]
    program.states[name] = replace(state, layout=REPLICATED(len(state.shape)))
    with pytest.raises(LayoutError):  # what is made of it, or what is written to it
        check(program)


def test_a_state_written_as_another_is_held() -> None:
    program = split("bloom")
    name = named(program, "key")
    split_heads = program.states[name].layout
    swapped = replace(split_heads.dims[0], owned=split_heads.dims[0].owned[::-1])  # type: ignore[type-var, union-attr]
    program.states[name] = replace(program.states[name], layout=split_heads.with_dim(0, swapped))
    with pytest.raises(LayoutError, match=rf"writes .* to the state '{name}', which is held as"):
        check(program)


def test_a_state_of_the_other_kind_or_none() -> None:
    program = split("bloom")
    name = named(program, "key")
    state = program.states[name]
    program.states[name] = replace(state, per_token=False)
    with pytest.raises(LayoutError, match="no such state of that kind"):
        check(program)
    del program.states[name]
    with pytest.raises(LayoutError, match="no such state"):
        check(program)


def test_what_each_rank_holds_adds_up() -> None:
    parts = stepping.compiled("lfm2_moe", 2)
    whole = sum(state.bytes for state in stepping.compiled("lfm2_moe", 1).rank(0).states if not state.per_token)
    mine = [sum(state.bytes for state in parts.rank(rank).states if not state.per_token) for rank in (0, 1)]
    assert sum(mine) == whole
    assert Plan(tp=2).mesh == parts.mesh
