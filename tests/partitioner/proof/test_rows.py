"""That a rewritten graph mixes no tokens and no sequences: what passes made is right, what mixes is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, fx

from partitioner.errors import LayoutError
from partitioner.program.program import Program, Value
from partitioner.proof.rows import check_rows
from partitioner.sharding.mesh import Mesh
from runtime.ops.cached_attention import cached_attention
from runtime.ops.collectives import all_gather, all_reduce
from runtime.ops.communicating import COMMUNICATING
from runtime.ops.local import shard
from runtime.ops.rows import collect_rows
from tests.support import handmade, partitioned

aten = torch.ops.aten
insert, rows_of = handmade.insert, handmade.rows_of

Change = Callable[[Program, fx.Node, fx.Node], fx.Node]
"""What stands between the hidden state and the head: (program, hidden state, length) -> another hidden state."""


def changed(change: Change) -> Program:
    program = handmade.plain().copy(Mesh.of(dp=2, sp=3, tp=2))
    hidden = next(node for node in program.graph.nodes if node.name == "residual")
    users = list(hidden.users)
    with program.graph.inserting_after(hidden):
        length = program.graph.call_function(aten.sym_size.int, (hidden, 1))
    length.meta = {"val": hidden.meta["val"].shape[1]}
    with program.graph.inserting_before(length.next):
        made = change(program, hidden, length)
    for user in users:
        user.replace_input_with(hidden, made)
    return program


def like(program: Program, target: object, x: fx.Node, *args: object, **options: object) -> fx.Node:
    return insert(program, target, (x, *args), x.meta["val"], **options)


def collected(program: Program, x: fx.Node, length: fx.Node, axes: tuple[str, ...]) -> fx.Node:
    return like(program, collect_rows, x, length, axes, dim=1)


def dealt(inner: Callable[[Program, fx.Node], fx.Node], *, taken: str = "sp", back: str = "sp") -> Change:
    """`inner` on the rank's own rows."""

    def change(program: Program, x: fx.Node, length: fx.Node) -> fx.Node:
        return collected(program, inner(program, rows_of(program, x, (taken,))), length, (back,))

    return change


RIGHT: dict[str, Change] = {
    "as it is": lambda program, x, length: x,
    "rows of one's own": dealt(lambda program, x: like(program, aten.relu.default, x)),
    "a sum over another axis": dealt(lambda program, x: like(program, all_reduce, x, "tp")),
    "a gather of the hidden dim": dealt(lambda program, x: like(program, all_gather, x, "tp", dim=2, sizes=[3, 3])),
    "the same rows twice": dealt(
        lambda program, x: like(program, aten.add.Tensor, x, like(program, aten.relu.default, x))
    ),
}


@pytest.mark.parametrize("name", RIGHT)
def test_what_keeps_to_its_own_rows_is_right(name: str) -> None:
    check_rows(changed(RIGHT[name]))


def met(program: Program, x: fx.Node, length: fx.Node, other: Callable[[Program, fx.Node], fx.Node]) -> fx.Node:
    rows = rows_of(program, x, ("sp",))
    total = like(program, aten.add.Tensor, rows, other(program, x))
    return collected(program, total, length, ("sp",))


def norm(program: Program, x: fx.Node, dim: int) -> fx.Node:
    return like(program, aten.softmax.int, x, dim)


WRONG: dict[str, tuple[Change, str]] = {
    "a sum over ranks with other tokens": (
        dealt(lambda program, x: like(program, all_reduce, x, "sp")),
        r"all_reduce at '.*' in model mixes tokens of different ranks: they are dealt out over sp",
    ),
    "a sum over two axes, one with other tokens": (
        dealt(lambda program, x: like(program, all_reduce, x, ("sp", "tp"))),
        "all_reduce at .* mixes tokens of different ranks: they are dealt out over sp",
    ),
    "a gather of hidden dims of other tokens": (
        dealt(lambda program, x: like(program, all_gather, x, "sp", dim=2, sizes=[2, 2, 2])),
        "all_gather at .* mixes tokens of different ranks",
    ),
    "a gather along the tokens": (
        lambda program, x, length: like(program, all_gather, x, "tp", dim=1, sizes=[1, 1]),
        "all_gather at .* works along the dim of the tokens",
    ),
    "a gather along the sequences": (
        lambda program, x, length: like(program, all_gather, x, "dp", dim=0, sizes=[1, 1]),
        "all_gather at .* works along the dim of the sequences",
    ),
    "a shard of the tokens": (
        lambda program, x, length: like(program, shard, x, [0, 1], dim=1),
        "shard at .* works along the dim of the tokens",
    ),
    "rows beside rows of other ranks": (
        lambda program, x, length: met(program, x, length, lambda p, y: rows_of(p, y, ("tp",))),
        "add at .* brings tokens together that ranks have otherwise: over sp and over tp",
    ),
    "rows beside all": (
        lambda program, x, length: met(program, x, length, lambda p, y: y),
        "add at .* brings tokens together that ranks have otherwise: on every rank and over sp",
    ),
    "rows collected over another axis": (
        dealt(lambda program, x: x, back="tp"),
        "collect_rows at .* collects tokens over tp, which are dealt out over sp",
    ),
    "rows collected that nobody took": (
        lambda program, x, length: collected(program, x, length, ("sp",)),
        "collect_rows at .* collects tokens over sp, which are on every rank",
    ),
    "rows taken twice": (
        dealt(lambda program, x: rows_of(program, x, ("sp",))),
        "take_rows at .* deals tokens out that are dealt out over sp already",
    ),
    "a softmax over the tokens": (lambda program, x, length: norm(program, x, 1), "softmax at .* reads other tokens"),
    "a softmax over the batch": (
        lambda program, x, length: norm(program, x, 0),
        "softmax at .* reads other sequences",
    ),
    "a softmax over a rank's tokens": (
        dealt(lambda program, x: norm(program, x, 1)),
        "softmax at .* reads other tokens",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_mixes_is_refused_with_the_node(name: str) -> None:
    change, message = WRONG[name]
    with pytest.raises(LayoutError, match=message):
        check_rows(changed(change))


def test_an_op_that_communicates_without_a_rule_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def exchange(x: Tensor, axis: str) -> Tensor:
        raise NotImplementedError

    monkeypatch.setitem(COMMUNICATING, exchange, COMMUNICATING[all_reduce])
    with pytest.raises(LayoutError, match=r"exchange at .* no rule of `partitioner/proof/rows.py` says what it does"):
        check_rows(changed(lambda program, x, length: like(program, exchange, x, "tp")))


# -- real models -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "tp"), [("llama", 3), ("mixtral", 2), pytest.param("deepseek_v3", 2, marks=pytest.mark.slow)]
)
def test_real_models_split_over_ranks_are_right(name: str, tp: int) -> None:
    check_rows(partitioned.compiled(name, tp).program_of("decode"))


def test_attention_to_a_ranks_own_rows_is_refused() -> None:
    program = partitioned.compiled("llama", 2).program_of("decode").copy(Mesh.of(sp=2, tp=2))
    node = next(node for node in program.graph.nodes if node.target is cached_attention)
    with program.graph.inserting_before(node):
        rows = [rows_of(program, operand, ("sp",), dim=2) for operand in node.args[:3]]
        positions = rows_of(program, node.args[3], ("sp",))
    node.args = (*rows, positions, *node.args[4:])
    with pytest.raises(LayoutError, match=rf"cached_attention at '{node.name}' .* own tokens only"):
        check_rows(program)


@dataclass(frozen=True)
class RunningSum:
    """A pass whose layouts are right, and which looks at earlier tokens."""

    name: ClassVar[str] = "running-sum"

    def run(self, program: Program) -> Program:
        norm: Any = next(node for node in program.graph.nodes if node.target is aten.linear.default).args[0]
        with program.graph.inserting_after(norm):
            summed = program.graph.call_function(aten.cumsum.default, (norm, 1))
        value: Value = norm.meta["val"]
        summed.meta = {"val": value, "path": "inserted"}
        norm.replace_all_uses_with(summed, delete_user_cb=lambda user: user is not summed)
        return program


def test_a_pass_that_mixes_tokens_is_refused_when_the_model_is_to_generate() -> None:
    parts = partitioned.compiled("llama", 2, passes=[RunningSum()])
    parts.simulate(input_ids=partitioned.tokens("llama", 5))  # of a whole text it is another model, and no mistake
    with pytest.raises(LayoutError, match=r"cumsum at .* in inserted reads other tokens than its own"):
        parts.program_of("decode")
