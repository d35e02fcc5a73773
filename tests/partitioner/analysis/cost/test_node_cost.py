"""The cost of single ops, on programs made by hand: uneven splits, views and copies, rows, stages, no rule."""

import itertools
import operator
from typing import Any

import pytest
import torch

from partitioner.analysis.cost.local_sizes import RankSizes
from partitioner.analysis.cost.node_cost import NodeCost, node_costs
from partitioner.analysis.cost.products import pairs_seen
from partitioner.analysis.cost.program_cost import program_cost
from partitioner.errors import InputError
from partitioner.program.program import Entry, Program, Value
from partitioner.program.stages import StageTable
from partitioner.sharding.layout import Layout, Rows, Split
from partitioner.sharding.mesh import Mesh
from runtime.ops.attention import allowed
from runtime.ops.collectives import all_reduce
from runtime.ops.communicating import COMMUNICATING, Communicating, Meeting
from runtime.ops.local import once, shard
from runtime.ops.rows import collect_rows, take_rows
from tests.support import handmade
from tests.support.handmade import BATCH, FFN, HIDDEN, SEQUENCE, VOCABULARY

aten = torch.ops.aten
SIZES = {"batch": 2, "sequence": 3}
TOKENS = 6


def by_name(program: Program, rank: int = 0, **sizes: int) -> dict[str, NodeCost]:
    return {node.name: node for node in node_costs(program, program.mesh.coordinates(rank), {**SIZES, **sizes})}


def with_node(target: Any, args: Any, value: Value, **kwargs: Any) -> NodeCost:
    """The cost of one more node, after `hidden`, of the undivided model."""
    program = handmade.traced()
    nodes = {node.name: node for node in program.graph.nodes}
    made = program.graph.call_function(target, args(nodes), kwargs)
    nodes["logits"].append(made)
    made.meta["val"] = value
    return by_name(program)[made.name]


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_uneven_ranks_together_do_the_work_of_one(n: int) -> None:
    program = handmade.partitioned(n)
    ranks = [by_name(program, rank) for rank in range(n)]
    widths = [owned.size for owned in handmade.cut(FFN, n)]
    rows = [owned.size for owned in handmade.cut(VOCABULARY, n)]
    assert [rank["up"].flops for rank in ranks] == [2 * TOKENS * HIDDEN * width for width in widths]
    assert [rank["down"].flops for rank in ranks] == [2 * TOKENS * HIDDEN * width for width in widths]
    assert [rank["logits"].flops for rank in ranks] == [2 * TOKENS * HIDDEN * each for each in rows]
    assert [rank["up"].bytes_written for rank in ranks] == [TOKENS * width * 8 for width in widths]
    assert [rank["up"].bytes_read for rank in ranks] == [(TOKENS + width) * HIDDEN * 8 for width in widths]
    (gathered,) = ranks[0]["gathered"].meetings
    assert (gathered.bytes, gathered.most) == (TOKENS * rows[0] * 8, TOKENS * max(rows) * 8)
    (reduced,) = ranks[-1]["reduced"].meetings
    assert (reduced.kind, reduced.bytes) == ("all_reduce", TOKENS * HIDDEN * 8)
    assert reduced.ranks == tuple(range(n))


def test_a_look_up_reads_the_rows_that_it_takes() -> None:
    embedding = by_name(handmade.traced())["embedding"]
    assert (embedding.flops, embedding.bytes_read) == (0, TOKENS * HIDDEN * 8 + TOKENS * 8)


@pytest.mark.parametrize(
    ("target", "args", "shape", "read", "written"),
    [
        (aten.transpose.int, (1, 2), (BATCH, HIDDEN, SEQUENCE), 0, 0),
        (aten.slice.Tensor, (2, 0, 2), (BATCH, SEQUENCE, 2), 0, 0),
        (aten.reshape.default, ([2, -1],), (BATCH, SEQUENCE * HIDDEN), 0, 0),
        (aten.expand.default, ([2, 3, HIDDEN],), (BATCH, SEQUENCE, HIDDEN), 0, 0),
        (aten.clone.default, (), (BATCH, SEQUENCE, HIDDEN), 288, 288),
        (aten.roll.default, ([1], [2]), (BATCH, SEQUENCE, HIDDEN), 288, 288),
        (aten.repeat.default, ([2, 1, 1],), (2 * BATCH, SEQUENCE, HIDDEN), 288, 576),
        (shard, ([0, 2],), (BATCH, SEQUENCE, 2), 0, 0),
        (shard, ([0, 1, 3, 4],), (BATCH, SEQUENCE, 2), 96, 96),
        (once, (1,), (BATCH, SEQUENCE, HIDDEN), 0, 0),
        (once, (0,), (BATCH, SEQUENCE, HIDDEN), 0, 288),
    ],
)
def test_views_cost_nothing_and_copies_their_bytes(target: Any, args: Any, shape: Any, read: int, written: int) -> None:
    options = {"dim": 2} if target is shard else {}
    cost = with_node(target, lambda n: (n["hidden"], *args), Value(shape, torch.float64), **options)
    assert (cost.flops, cost.bytes_read, cost.bytes_written, cost.unsure) == (0, read, written, "")


def test_a_cast_copies_and_a_cast_to_the_same_does_not() -> None:
    shape = (BATCH, SEQUENCE, HIDDEN)
    narrow = with_node(aten.to.dtype, lambda n: (n["hidden"], torch.float16), Value(shape, torch.float16))
    same = with_node(aten.to.dtype, lambda n: (n["hidden"], torch.float64), Value(shape, torch.float64))
    assert (narrow.bytes_read, narrow.bytes_written) == (288, 72)
    assert (same.bytes_read, same.bytes_written) == (0, 0)


def test_a_reshape_of_another_order_copies() -> None:
    program = handmade.traced()
    nodes = {node.name: node for node in program.graph.nodes}
    turned = program.graph.call_function(aten.transpose.int, (nodes["hidden"], 1, 2))
    flat = program.graph.call_function(aten.reshape.default, (turned, [2, -1]))
    nodes["logits"].append(turned)
    turned.append(flat)
    turned.meta["val"] = Value((BATCH, HIDDEN, SEQUENCE), torch.float64)
    flat.meta["val"] = Value((BATCH, SEQUENCE * HIDDEN), torch.float64)
    costs = by_name(program)
    assert costs[turned.name].bytes_written == 0
    assert costs[flat.name].bytes_written == costs[flat.name].bytes_read == 288
    assert by_name(program, sequence=1)[flat.name].bytes_written == 0  # of one token, every order is the same


def test_an_op_without_a_rule_is_counted_as_bytes_and_listed() -> None:
    program = handmade.traced()
    nodes = {node.name: node for node in program.graph.nodes}
    made = program.graph.call_function(aten.cdist.default, (nodes["hidden"], nodes["hidden"]))
    nodes["logits"].append(made)
    made.meta["val"] = Value((BATCH, SEQUENCE, SEQUENCE), torch.float64)
    cost = program_cost(program, {}, SIZES)
    assert f"{made.name}: no rule for cdist in {made.name}: bytes only" in cost.unsure
    (node,) = [node for node in cost.nodes if node.name == made.name]
    assert (node.flops, node.bytes_read, node.bytes_written) == (0, 288, 2 * 3 * 3 * 8)


def test_rows_are_the_ranks_share() -> None:
    program = handmade.traced().copy(Mesh.of(dp=2, sp=3))
    dims = Layout((Rows(("dp",), "batch"), Rows(("sp",), "sequence"), None))
    flat = Layout((Rows(("sp",), "sequence"), None))
    value, merged = Value((BATCH, SEQUENCE, HIDDEN), torch.float64), Value((BATCH * SEQUENCE, HIDDEN), torch.float64)
    shapes, flattened = [], []
    for at in program.mesh:
        sizes = RankSizes(program, at, {"batch": 3, "sequence": 7})
        shapes.append(sizes.shape(value, dims))
        flattened.append(sizes.shape(merged, flat))
    assert shapes == [(b, s, HIDDEN) for b in (2, 1) for s in (3, 3, 1)]
    assert sum(shape[0] * shape[1] for shape in shapes) == 3 * 7
    assert flattened == [(3 * s, HIDDEN) for _ in range(2) for s in (3, 3, 1)]
    tokens = Layout((Rows(("dp", "sp"), "tokens"), None))
    dealt = [RankSizes(program, at, {"batch": 3, "sequence": 7}).shape(merged, tokens)[0] for at in program.mesh]
    assert dealt == [4, 4, 4, 4, 4, 1]


def test_rows_are_taken_for_nothing_and_collected_by_a_gather() -> None:
    program = handmade.traced().copy(Mesh.of(sp=3))
    nodes = {node.name: node for node in program.graph.nodes}
    index = program.local("row", Entry(0, ("sp",), (0, 1, 2)))
    options = {"parts": 3, "axes": ["sp"], "dim": 1, "kind": "sequence"}
    taken = program.graph.call_function(take_rows, (nodes["hidden"], index), options)
    squares = program.graph.call_function(aten.mul.Tensor, (taken, taken))
    length = program.graph.call_function(aten.sym_size.int, (nodes["hidden"], 1))
    collected = program.graph.call_function(collect_rows, (squares, length, "sp"), {"dim": 1})
    nodes["logits"].append(taken)
    for before, after in itertools.pairwise((taken, squares, length, collected)):
        before.append(after)
    length.meta["val"] = SEQUENCE
    for node in (taken, squares, collected):
        node.meta["val"] = Value((BATCH, SEQUENCE, HIDDEN), torch.float64)
    for node in (taken, squares):
        node.meta["layout"] = Layout((None, Rows(("sp",), "sequence"), None))
    row = 2 * HIDDEN * 8
    for rank, own in enumerate((3, 3, 1)):
        costs = by_name(program, rank, sequence=7)
        assert (costs[taken.name].bytes_written, costs[taken.name].unsure) == (0, "")
        assert (costs[squares.name].bytes_read, costs[squares.name].bytes_written) == (own * row, own * row)
        (meeting,) = costs[collected.name].meetings
        assert (meeting.kind, meeting.bytes, meeting.most) == ("all_gather", own * row, 3 * row)


def test_what_is_sent_in_a_way_that_is_not_known_is_counted_whole_and_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    def told(shape: Any) -> Communicating:
        return Communicating(all_reduce, lambda node: (Meeting("send", ("tp",), shape, torch.float64, peer=1),))

    for shape, size, why in (((7, 5), 280, "counted whole"), (None, 0, "counted as 0 bytes")):
        monkeypatch.setitem(COMMUNICATING, all_reduce, told(shape))
        cost = by_name(handmade.partitioned(2))["reduced"]
        assert cost.meetings[0].bytes == size
        assert why in cost.unsure


def test_stages_share_out_the_costs() -> None:
    program = handmade.traced().copy(Mesh.of(pp=2))
    stage = 0
    for node in program.graph.nodes:
        stage = 1 if node.name == "act" else stage
        if node.op == "call_function":
            node.meta["stages"] = frozenset({0, 1} if node.name == "where" else {stage})
    program.stages = StageTable({}, 2)
    cost = program_cost(program, {"pp": 0}, SIZES)
    first, second = cost.per_stage()
    assert (first.flops, second.flops) == (2 * TOKENS * HIDDEN * FFN, 2 * TOKENS * HIDDEN * (FFN + VOCABULARY))
    assert first.flops + second.flops == cost.flops
    assert cost.crossing_bytes == (TOKENS * (HIDDEN + FFN) * 8,)  # the residual stream, and what the cut goes through


@pytest.mark.parametrize("n", [2, 3])
def test_integers_are_those_of_the_rank(n: int) -> None:
    """Batch times heads, say, as a reshape has it where dims are merged: what a rank's own integers make."""
    program = handmade.partitioned(n)
    nodes = {node.name: node for node in program.graph.nodes}
    widths = [owned.size for owned in handmade.cut(FFN, n)]
    batch = program.graph.call_function(aten.sym_size.int, (nodes["input_ids"], 0))
    merged = program.graph.call_function(operator.mul, (batch, nodes["flat"].args[1][-1]))
    flat = program.graph.call_function(aten.reshape.default, (nodes["up"], [merged, -1]))
    for before, after in itertools.pairwise((nodes["up"], batch, merged, flat)):
        before.append(after)
    batch.meta["val"], merged.meta["val"] = BATCH, BATCH * FFN
    flat.meta["val"] = Value((BATCH * FFN, SEQUENCE), torch.float64)
    flat.meta["layout"] = Layout((Split(("tp",), handmade.cut(FFN, n)), None))
    for rank, width in enumerate(widths):
        cost = by_name(program, rank)[flat.name]
        assert (cost.unsure, cost.bytes_written) == ("", 0)
        sizes = RankSizes(program, program.mesh.coordinates(rank), SIZES)
        assert (sizes.integer(batch), sizes.integer(merged)) == (2, 2 * width)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("window", "chunk"), [(None, None), (3, None), (None, 4), (5, 4), (100, None)])
@pytest.mark.parametrize(("first", "queries", "keys"), [(0, 9, 9), (6, 1, 7), (4, 5, 9), (0, 3, 11)])
def test_pairs_are_those_that_attention_allows(first, queries, keys, causal, window, chunk) -> None:
    seen = allowed(
        torch.arange(first, first + queries)[:, None], torch.arange(keys), causal=causal, window=window, chunk=chunk
    )
    assert pairs_seen(first, queries, keys, causal, window, chunk) == int(seen.sum())


@pytest.mark.parametrize(
    "sizes", [{"batch": 2}, {**SIZES, "sequenze": 3}, {**SIZES, "batch": 0}, {**SIZES, "past": -1}]
)
def test_sizes_that_do_not_fit_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(InputError, match=r"batch, sequence.*past"):
        node_costs(handmade.traced(), {}, sizes)


def test_a_past_is_refused_where_nothing_is_remembered() -> None:
    with pytest.raises(InputError, match="past is 4, and Handmade remembers nothing"):
        node_costs(handmade.traced(), {}, {**SIZES, "past": 4})
