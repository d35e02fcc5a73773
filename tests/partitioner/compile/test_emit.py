import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from partitioner.compile.emit import Emitter, emit, weight_shard
from partitioner.errors import CaptureError, LayoutError
from partitioner.program.program import Entry, Input, PerRankInt, Program, Value, Weight
from partitioner.sharding.index_set import IndexSet
from partitioner.sharding.layout import Layout, Split
from partitioner.sharding.mesh import Mesh
from runtime.program.rank_program import RankProgram
from runtime.weights.load_weights import load_weights
from tests.support import handmade


def arguments(program: RankProgram, name: str) -> tuple:
    return next((node.args, node.kwargs) for node in program.graph.nodes if node.name == name)


def test_integers_are_those_of_the_coordinates() -> None:
    ranks = [emit(handmade.partitioned(3), {"tp": i}) for i in range(3)]
    assert [arguments(rank, "embedding")[1]["start"] for rank in ranks] == [0, 3, 7]
    assert [arguments(rank, "flat")[0][1] for rank in ranks] == [[-1, 1, 3], [-1, 1, 3], [-1, 1, 4]]
    assert [rank.rank for rank in ranks] == [0, 1, 2]
    assert ranks[1].coordinates == {"dp": 0, "pp": 0, "sp": 0, "tp": 1, "edp": 1, "ep": 0, "etp": 0}


def test_the_program_is_left_alone_and_meta_is_kept() -> None:
    program = handmade.partitioned(2)
    rank = emit(program, {"tp": 1})
    assert any(isinstance(node.kwargs.get("start"), PerRankInt) for node in program.graph.nodes)
    embedding = next(node for node in rank.graph.nodes if node.name == "embedding")
    assert embedding.meta["why"] == "vocabulary over tp"
    assert embedding.meta["layout"].partial == {"tp"}


def test_ranks_with_the_same_integers_share_one_graph() -> None:
    program = handmade.partitioned(2)
    entry = Entry(8, ("tp",), (4, 4))
    program.table = dict.fromkeys(program.table, entry)
    emitter = Emitter(program)
    first, second = (emitter.rank({"tp": i}) for i in range(2))
    assert first.graph is second.graph
    assert first.weights != second.weights


def test_a_tuple_becomes_a_list_and_an_unknown_row_is_refused() -> None:
    program = handmade.partitioned(2)
    flat = next(node for node in program.graph.nodes if node.name == "flat")
    flat.args = (flat.args[0], program.local("shape", Entry((1,), ("tp",), ((-1, 1, 5), (1, -1, 5)))))
    assert arguments(emit(program, {"tp": 1}), "flat")[0][1] == [1, -1, 5]
    flat.args = (flat.args[0], PerRankInt("nowhere"))
    with pytest.raises(LayoutError, match="'nowhere'"):
        _ = emit(program, {"tp": 0}).graph


def test_the_module_prints_with_weights_under_their_names() -> None:
    rank = emit(handmade.partitioned(2), {"tp": 1})
    module = rank.graph_module
    text = module.print_readable(print_output=False)
    assert "class Rank1" in text
    assert "self.model.down.weight" in text
    assert re.search(r"all_reduce\(down, 'tp'\)", text)
    assert "start = 5" in text
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    assert shapes == {
        "model.embed.weight": (6, 6),
        "model.up.weight": (5, 6),
        "model.down.weight": (6, 5),
        "head.weight": (6, 6),
    }
    assert all(parameter.is_meta for parameter in module.parameters())


def test_weights_without_users_are_not_loaded() -> None:
    program = handmade.partitioned(2)
    program.weights["tied"] = Weight("tied", (2,), torch.float32, "checkpoint")
    with program.graph.inserting_before(next(iter(program.graph.nodes))):
        program.graph.create_node("get_attr", "tied")
    rank = emit(program, {"tp": 0})
    assert "tied" not in [weight.name for weight in rank.weights]
    assert "tied" not in [node.target for node in rank.graph.nodes]
    _ = rank.graph_module


def test_descriptions_that_do_not_fit_are_refused() -> None:
    program = handmade.partitioned(2)
    program.weight_layouts["head.weight"] = Layout((None,))
    with pytest.raises(LayoutError, match=r"'head.weight' of shape \[11, 6\]"):
        emit(program, {"tp": 0})
    outside = Split(("tp",), (IndexSet.range(0, 12), IndexSet.range(12, 13)))
    program.weight_layouts["head.weight"] = Layout((outside, None))
    with pytest.raises(LayoutError, match="outside its 11 indices"):
        emit(program, {"tp": 0})
    del program.weights["head.weight"]
    with pytest.raises(CaptureError, match=r"head\.weight"):
        emit(program, {"tp": 0})


def test_an_input_of_an_unknown_size_is_refused() -> None:
    program = handmade.traced()
    program.inputs = (Input("x", Value((2 * handmade.BATCH,), torch.int64), "zeros"),)
    with pytest.raises(CaptureError, match=r"a dim of 2\*batch; required: a whole number or one of batch, sequence"):
        emit(program, {})


index_sets = st.sets(st.integers(0, 9)).map(IndexSet.of)


@given(st.tuples(index_sets, index_sets), st.tuples(index_sets, index_sets))
def test_pieces_put_together_are_the_indexed_tensor(rows, columns) -> None:
    value = torch.arange(100).reshape(10, 10)
    weight = Weight("w", (10, 10), torch.int64, "checkpoint")
    program = Program(handmade.traced().graph, (), {"w": weight}, {"w": value}, {}, Mesh.of(dp=2, tp=2))
    program.weight_layouts["w"] = Layout((Split(("tp",), rows), Split(("dp",), columns)))
    for coordinates in program.mesh:
        shard = weight_shard(program, weight, coordinates)
        own = rows[coordinates["tp"]].indices(), columns[coordinates["dp"]].indices()
        expected = value[own[0]][:, own[1]]
        assert shard.local_shape == tuple(expected.shape)
        assert torch.equal(load_weights((shard,), program.weight_data, None, torch.device("cpu"))[0], expected)
