"""The engine, its executable and its loader, through a program partitioned by hand."""

import gc
import itertools
import weakref
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from partitioner.compile.emit import Emitter
from partitioner.errors import CommunicationError, InputError, PlanError, RankLost, WeightError
from partitioner.sharding.mesh import Mesh
from runtime.communication.process_groups import _in_one_order
from runtime.communication.thread_communicator import ThreadGroup
from runtime.engine import Engine
from runtime.engine.engine import group_axes
from runtime.engine.simulator import Simulator
from runtime.execution.executable import failing_node
from runtime.ops.collectives import all_reduce
from runtime.program.rank_program import RankProgram
from runtime.program.shards import WeightShard
from tests.support import handmade


def programs(n: int) -> list[RankProgram]:
    program = handmade.partitioned(n)
    emitter = Emitter(program)
    return [emitter.rank(coordinates) for coordinates in program.mesh]


def engine(program: RankProgram, **options) -> Engine:
    return Engine(program, ThreadGroup(program.mesh).communicator(program.rank), **options)


def whole() -> Tensor:
    return Simulator([Emitter(handmade.traced()).rank({})])(input_ids=handmade.input_ids())[0]


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_all_ranks_return_what_the_whole_returns(n: int) -> None:
    results = Simulator(programs(n))(input_ids=handmade.input_ids())
    for result in results:
        torch.testing.assert_close(result, whole(), rtol=1e-12, atol=1e-12)


def test_a_missing_reduction_is_seen() -> None:
    broken = handmade.partitioned(2)
    reduced = next(node for node in broken.graph.nodes if node.name == "reduced")
    reduced.replace_all_uses_with(reduced.args[0])
    emitter = Emitter(broken)
    results = Simulator([emitter.rank(coordinates) for coordinates in broken.mesh])(input_ids=handmade.input_ids())
    assert (results[0] - whole()).abs().max() > 1e-3


def test_a_rank_holds_its_slices_and_not_the_whole() -> None:
    source = {name: value.clone() for name, value in handmade.partitioned(2).weight_data.items()}
    rank = programs(2)[1]
    bare = RankProgram(rank.build_graph, rank.mesh, rank.coordinates, rank.weights, rank.inputs)
    loaded = engine(bare, weights=source)
    shapes = {weight.name: list(tensor.shape) for weight, tensor in zip(rank.weights, loaded.weights, strict=True)}
    assert shapes["model.down.weight"] == [6, 5]
    assert shapes["head.weight"] == [6, 6]
    watched = weakref.ref(source["model.down.weight"])
    source.clear()
    gc.collect()
    assert watched() is None
    assert all(tensor.untyped_storage().nbytes() == tensor.numel() * 8 for tensor in loaded.weights)


def test_weights_may_come_as_blocks() -> None:
    values = handmade.partitioned(2).weight_data
    asked: list[tuple[str, tuple[tuple[int, int], ...]]] = []

    def read(name: str, block: tuple[tuple[int, int], ...]) -> Tensor:
        asked.append((name, block))
        return values[name][tuple(slice(*ends) for ends in block)]

    ranks = programs(2)
    meeting = Simulator(ranks, weights=read)
    torch.testing.assert_close(meeting(input_ids=handmade.input_ids())[0], whole())
    assert ("model.down.weight", ((0, 6), (5, 10))) in asked


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values.update({"head.weight": torch.empty(11, 6, device="meta").double()}), "has no data"),
        (lambda values: values.update({"head.weight": torch.zeros(11, 5).double()}), r"shape \[11, 6\], got \[11, 5\]"),
        (lambda values: values.update({"head.weight": torch.zeros(11, 6)}), "must have the dtype torch.float64"),
        (lambda values: values.update({"headd.weight": values.pop("head.weight")}), "near: headd.weight"),
    ],
    ids=["meta", "shape", "dtype", "missing"],
)
def test_unfit_weights_are_refused(change, message: str) -> None:
    values = dict(handmade.partitioned(2).weight_data)
    change(values)
    rank = programs(2)[0]
    bare = RankProgram(rank.build_graph, rank.mesh, rank.coordinates, rank.weights, rank.inputs)
    with pytest.raises(WeightError, match=message):
        engine(bare, weights=values)


def test_a_program_from_a_model_without_data_needs_weights() -> None:
    rank = programs(2)[0]
    empty = {name: value.to("meta") for name, value in rank.weight_data.items()}
    on_meta = RankProgram(rank.build_graph, rank.mesh, rank.coordinates, rank.weights, rank.inputs, empty)
    with pytest.raises(WeightError, match=r"model\.embed\.weight.*meta device.*give weights="):
        engine(on_meta)
    assert engine(on_meta, weights=rank.weight_data).weights


def test_a_computed_buffer_comes_with_the_program() -> None:
    buffer = torch.arange(3.0)
    shard = WeightShard("inv_freq", torch.float32, (3,), (3,), (None,), "computed", (), ())
    graph = fx.Graph()
    graph.output(graph.create_node("get_attr", "inv_freq"))
    program = RankProgram(lambda: graph, Mesh.of(), {}, (shard,), (), {"inv_freq": buffer})
    assert torch.equal(engine(program, weights={})(), buffer)
    with pytest.raises(WeightError, match="no checkpoint holds it"):
        engine(RankProgram(lambda: graph, Mesh.of(), {}, (shard,), ()), weights={})


def test_a_tied_weight_is_found_by_its_other_name() -> None:
    shard = WeightShard("lm.weight", torch.float32, (2,), (2,), (None,), "checkpoint", ("embed.weight",), ())
    graph = fx.Graph()
    graph.output(graph.create_node("get_attr", "lm.weight"))
    program = RankProgram(lambda: graph, Mesh.of(), {}, (shard,), ())
    assert engine(program, weights={"embed.weight": torch.ones(2)})().tolist() == [1, 1]


def test_collectives_overwrite_only_what_nobody_else_reads() -> None:
    seen: dict[str, bool] = {}

    class Recorder:
        mesh, rank = Mesh.of(tp=2), 0

        def bind(self, op, axis, *, node, options, overwrite=False):
            seen[node] = overwrite
            return lambda x: x

    graph = fx.Graph()
    x = graph.placeholder("x")
    shared = graph.call_function(torch.ops.aten.linear.default, (x, x))
    alone = graph.call_function(torch.ops.aten.linear.default, (shared, x))
    view = graph.call_function(torch.ops.aten.view.default, (shared, [1]))
    nodes = [graph.call_function(all_reduce, (source, "tp")) for source in (x, shared, alone, view)]
    graph.output(tuple(nodes))
    Engine(RankProgram(lambda: graph, Recorder.mesh, {}, (), ()), Recorder())  # type: ignore[arg-type]
    assert [seen[node.name] for node in nodes] == [False, False, True, False]


def test_the_device_of_the_graph_gives_way_to_the_engines() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    there = graph.call_function(torch.ops.aten.arange.default, (3,), {"device": torch.device("meta")})
    graph.output(graph.call_function(torch.ops.aten.add.Tensor, (x, there)))
    from runtime.program.rank_program import RunInput

    program = RankProgram(lambda: graph, Mesh.of(), {}, (), (RunInput("x", torch.int64, (3,), "zeros"),))
    assert engine(program)().tolist() == [0, 1, 2]


def test_a_failure_names_its_node_and_rank() -> None:
    broken = handmade.partitioned(2)
    flat = next(node for node in broken.graph.nodes if node.name == "flat")
    flat.args = (flat.args[0], [-1, 7, 1000])
    emitter = Emitter(broken)
    with pytest.raises(RuntimeError, match="shape") as caught:
        Simulator([emitter.rank(coordinates) for coordinates in broken.mesh])(input_ids=handmade.input_ids())
    assert failing_node(caught.value) == "flat"
    assert "at node 'flat' of model, rank 0" in caught.value.__notes__


def test_inputs_and_ranks_are_checked() -> None:
    ranks = programs(2)
    with pytest.raises(InputError, match="unknown input 'ids'"):
        Simulator(ranks)(ids=handmade.input_ids())
    with pytest.raises(CommunicationError, match="the communicator that of rank 1"):
        Engine(ranks[0], ThreadGroup(ranks[0].mesh).communicator(1))


def test_a_rank_that_raises_is_the_one_reported() -> None:
    simulator = Simulator(programs(3))

    def fail(*arguments: Tensor) -> Tensor:
        raise ZeroDivisionError("own fault")

    run, simulator.engines[2]._run = simulator.engines[2]._run, fail
    with pytest.raises(ZeroDivisionError):
        simulator(input_ids=handmade.input_ids())
    simulator.engines[2]._run = run
    assert simulator(input_ids=handmade.input_ids())[0].shape == (2, 3, 11)


def test_different_inputs_on_one_rank_are_seen() -> None:
    ranks = programs(2)
    meeting = ThreadGroup(ranks[0].mesh)
    engines = [Engine(rank, meeting.communicator(rank.rank)) for rank in ranks]
    import threading

    errors: list[BaseException] = []

    def body(rank: int) -> None:
        try:
            engines[rank](input_ids=handmade.input_ids(2, 3 + rank))
        except CommunicationError as error:
            errors.append(error)

    threads = [threading.Thread(target=body, args=(rank,)) for rank in range(2)]
    [thread.start() for thread in threads]
    [thread.join(20) for thread in threads]
    assert len(errors) == 2
    assert not any(isinstance(error, RankLost) for error in errors)
    assert "2x3x6" in str(errors[0])
    assert "2x4x6" in str(errors[0])


def test_constants_of_one_name_are_each_programs_own() -> None:
    (program,) = programs(1)
    weights = tuple(replace(weight, source="constant") for weight in program.weights)
    text = replace(program, weights=weights)
    other = {name: value + 1 for name, value in program.weight_data.items()}
    made = engine(text, entries=lambda entry: replace(text, weight_data=other))
    for weight, mine, continued in zip(weights, made.weights, made._generate_loop._prefill_by.weights, strict=True):
        assert torch.equal(mine, program.weight_data[weight.name])
        assert torch.equal(continued, other[weight.name])


# -- groups ------------------------------------------------------------------------------------------------------------


class Entries:
    """Programs of which each entry communicates over axes of its own; `missing`: cannot be had."""

    def __init__(self, mesh: Mesh, axes: dict[str, Any], missing: tuple[str, ...] = ()) -> None:
        self.mesh, self.axes, self.missing = mesh, axes, missing
        self.asked: list[str] = []

    def entry(self, entry: str, rank: int) -> Any:
        self.asked.append(entry)
        if entry in self.missing:
            raise PlanError("cannot generate")
        graph = fx.Graph()
        graph.output(graph.call_function(all_reduce, (graph.placeholder("x"), self.axes[entry])))
        return SimpleNamespace(graph=graph, of_head=None, vocabulary_axes=("tp",))


def test_groups_are_made_for_what_any_entry_names() -> None:
    mesh = Mesh.of(dp=2, sp=2, tp=2)
    parts = Entries(mesh, {"text": "tp", "prefill": ("sp", "tp"), "decode": ("dp", "sp")})
    singles = {("dp",), ("sp",), ("tp",)}
    for rank in range(8):
        assert group_axes(parts, rank) == {*singles, ("sp", "tp"), ("dp", "sp")}
    parts.missing = ("prefill", "decode")
    assert group_axes(parts, 0) == singles


def test_one_axis_needs_no_entry_compiled() -> None:
    parts = Entries(Mesh.of(tp=4), {})
    assert group_axes(parts, 0) == {("tp",)}
    assert not parts.asked
    parts = Entries(Mesh.of(tp=4, ep=2), dict.fromkeys(("text", "prefill", "decode"), "ep"))
    assert group_axes(parts, 0) == {("tp",), ("ep",)}


def test_groups_are_made_in_one_order_on_all_ranks() -> None:
    named = [("sp", "tp"), ("tp",), ("dp", "tp"), ("ep",), ("dp",)]
    orders = {tuple(_in_one_order(each)) for each in itertools.permutations(named)}
    assert len(orders) == 1
    (order,) = orders
    assert order[-2:] == (("dp", "tp"), ("sp", "tp"))
