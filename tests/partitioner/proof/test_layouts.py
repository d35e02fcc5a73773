"""The static check: what a pass leaves out or gets wrong is an error before anything runs. Negative controls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from torch import fx

from partitioner import Parts
from partitioner.compile.compare import difference
from partitioner.errors import CommunicationError, LayoutError
from partitioner.program.program import Entry, Program
from partitioner.proof.layouts import check
from partitioner.sharding.index_set import IndexSet
from runtime.ops.attention import attention
from runtime.ops.collectives import all_gather, all_reduce
from runtime.ops.local import once
from tests.support import reference
from tests.support.partitioned import compiled, tokens, traced


def of_kind(program: Program, target: Callable[..., object]) -> list[fx.Node]:
    return [node for node in program.graph.nodes if node.target is target]


def bypass(node: fx.Node) -> None:
    node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
    node.graph.erase_node(node)


def is_wrong(name: str, program: Program) -> bool:
    """Whether running it shows: ranks differ, or the result does."""
    ids = tokens(name, 6)
    expected = reference.forward(traced(name)[0], lifted=True, input_ids=ids)
    try:
        return difference(Parts(program, None).simulate(input_ids=ids), expected) > 1e-6
    except CommunicationError:
        return True


@pytest.mark.parametrize("which", [0, 1, 2, 4])
def test_a_missing_all_reduce_is_refused(which: int) -> None:
    program = compiled("llama", 2).program
    bypass(of_kind(program, all_reduce)[which])
    with pytest.raises(LayoutError, match="with an all_reduce"):
        check(program)
    assert is_wrong("llama", program)


def test_a_missing_all_gather_is_refused() -> None:
    program = compiled("llama", 2).program
    bypass(of_kind(program, all_gather)[0])
    with pytest.raises(LayoutError, match="node 'output' requires its operand"):
        check(program)


def test_an_all_reduce_too_many_is_refused() -> None:
    program = compiled("llama", 2).program
    node = of_kind(program, all_reduce)[1]
    with program.graph.inserting_after(node):
        again = program.graph.call_function(all_reduce, (node, "tp"))
    again.meta = {"val": node.meta["val"]}
    node.replace_all_uses_with(again, delete_user_cb=lambda user: user is not again)
    with pytest.raises(LayoutError, match="not a partial sum over that axis"):
        check(program)
    assert is_wrong("llama", program)


def test_a_bias_that_every_rank_adds_is_refused() -> None:
    program = compiled("gpt2", 2).program
    bypass(of_kind(program, once)[0])
    with pytest.raises(LayoutError, match="would be summed once per rank"):
        check(program)
    assert is_wrong("gpt2", program)


def test_a_weight_split_otherwise_than_its_partner_is_refused() -> None:
    program = compiled("llama", 2).program
    name = "model.layers.0.mlp.up_proj.weight"
    layout = program.weight_layouts[name]
    split = layout.dims[0]
    assert split is not None
    program.weight_layouts[name] = layout.with_dim(0, replace(split, owned=split.owned[::-1]))
    with pytest.raises(LayoutError):
        check(program)


def test_a_rank_that_lacks_rows_is_refused() -> None:
    program = compiled("llama", 2).program
    name = "model.layers.0.self_attn.q_proj.weight"
    layout = program.weight_layouts[name]
    split = layout.dims[0]
    assert split is not None
    short = replace(split, owned=(split.owned[0], IndexSet.range(32, 48)))
    program.weight_layouts[name] = layout.with_dim(0, short)
    with pytest.raises(LayoutError):
        check(program)


def test_wrong_integers_are_refused() -> None:
    program = compiled("llama", 2).program
    row = next(name for name in program.table if name.startswith("vocab_start"))
    program.table[row] = Entry(0, ("tp",), (0, 60))
    with pytest.raises(LayoutError, match="start must be 64 at tp=1, got 60"):
        check(program)
    assert is_wrong("llama", program)


def test_a_wrong_kv_map_is_refused() -> None:
    program = compiled("llama", 4, odd=True).program  # 6 query heads over 3 kv heads on 4 ranks: 2, 2, 1, 1
    node = of_kind(program, attention)[0]
    node.kwargs = {**node.kwargs, "kv_map": program.local("wrong", Entry((0, 0, 1, 1, 2, 2), ("tp",), ((1, 1),) * 4))}
    with pytest.raises(LayoutError, match="must read local kv heads"):
        check(program)


def test_the_output_of_a_pass_is_checked_as_it_stands() -> None:
    program = compiled("llama", 2).program
    node = of_kind(program, all_reduce)[1]
    node.meta["layout"] = replace(node.meta["layout"], partial=frozenset({"tp"}))
    with pytest.raises(LayoutError, match="the pass says"):
        check(program)
