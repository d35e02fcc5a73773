"""A program cut into stages by hand: each rank has its part, and what crosses makes the whole again."""

import itertools
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import partitioner
from partitioner.compile.emit import Emitter
from partitioner.compile.parts import Parts
from partitioner.compile.pass_manager.choose_passes import choose
from partitioner.compile.pass_manager.run_passes import run_passes
from partitioner.compile.tracing.trace import trace
from partitioner.errors import LayoutError
from partitioner.program.model_record import ModelRecord
from partitioner.program.node_arguments import node_values
from partitioner.program.plan import Plan
from partitioner.program.program import Program
from partitioner.program.stages import crossings, table_of
from partitioner.proof.layouts import check
from partitioner.sharding.mesh import Mesh
from runtime.communication.thread_communicator import ThreadGroup
from runtime.engine.check_inputs import complete_inputs
from runtime.execution.executable import Executable
from runtime.program.rank_program import RankProgram
from runtime.weights.load_weights import load_weights
from tests.support import partitioned, zoo

CPU = torch.device("cpu")


def made_of(program: Program) -> tuple[set[fx.Node], set[fx.Node]]:
    """What is made of inputs and constants alone, without a checkpoint's weights; what is made of weights alone."""
    inputs: set[fx.Node] = set()
    weights: set[fx.Node] = set()
    for node in program.graph.nodes:
        sources = node.all_input_nodes
        if node.op == "get_attr":
            (weights if program.weights[str(node.target)].source == "checkpoint" else inputs).add(node)
        elif node.op == "placeholder" or (node.op == "call_function" and all(n in inputs for n in sources)):
            inputs.add(node)
        elif node.op == "call_function" and all(n in weights for n in sources):
            weights.add(node)
    return inputs, weights


def staged(program: Program, starts: list[str]) -> Program:
    """Marks every node: a stage begins at the first node in graph order whose module is one of `starts`."""
    inputs, weights = made_of(program)
    count = len(starts) + 1
    stage, left = 0, list(starts)
    for node in program.graph.nodes:
        if left and node not in inputs and node not in weights and str(node.meta.get("path", "")).startswith(left[0]):
            stage += 1
            left.pop(0)
        if node.op == "call_function":
            node.meta["stages"] = (
                frozenset(range(count)) if node in inputs or not node_values(node) else frozenset({stage})
            )
    assert not left
    for node in reversed(program.graph.nodes):
        if node in weights and node.op == "call_function":
            node.meta["stages"] = frozenset[int]().union(*(user.meta["stages"] for user in node.users))
    program.stages = table_of(program.graph, count)
    return program


def compiled(name: str, *, starts: list[str], tp: int = 1) -> Program:
    program = partitioned.traced(name)[1].copy(Mesh.of(pp=len(starts) + 1, tp=tp))
    program = run_passes(program, [choose("tensor-parallel"), choose("fuse")] if tp > 1 else [choose("fuse")])
    return staged(program, starts)


def run_rank(rank: RankProgram, group: ThreadGroup, ids: Tensor, received: list[Tensor]) -> object:
    weights = load_weights(rank.weights, rank.weight_data, rank.source, CPU)
    positions = torch.arange(ids.shape[1])[None].expand(ids.shape)
    given = {"input_ids": ids, "position_ids": positions}
    known = {each.name: given[each.name] for each in rank.inputs}
    values = complete_inputs(rank.inputs, known, CPU, rank.limits) if known else []
    return Executable(rank, weights, group.communicator(rank.rank), CPU)([*values, *received])


def run_stages(ranks: list[RankProgram], ids: Tensor) -> Tensor:
    """One stage after the other; the ranks of a stage in threads, as a simulator would."""
    mesh = ranks[0].mesh
    group = ThreadGroup(mesh)
    received: dict[int, list[Tensor]] = {tp: [] for tp in range(mesh.size("tp"))}
    outcomes: dict[int, Any] = {}
    for stage in range(mesh.size("pp")):
        members = [rank for rank in ranks if rank.coordinates["pp"] == stage]

        def work(rank: RankProgram, given: list[Tensor]) -> None:
            outcomes[rank.coordinates["tp"]] = run_rank(rank, group, ids, given)

        threads = [threading.Thread(target=work, args=(r, received[r.coordinates["tp"]])) for r in members]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        if stage + 1 < mesh.size("pp"):
            received = {tp: list(sent) for tp, sent in outcomes.items()}
    return outcomes[0]


@pytest.mark.parametrize(("name", "starts"), [("llama", ["model.layers.1"]), ("gpt2", ["transformer.h.1"])])
@pytest.mark.parametrize("tp", [1, 2])
def test_stages_one_after_the_other_are_the_whole(name: str, starts: list[str], tp: int) -> None:
    program = compiled(name, starts=starts, tp=tp)
    check(program)
    (crossing,) = crossings(program.graph, 2)
    assert len(crossing) == 1, crossing
    ids = partitioned.tokens(name, 5)
    expected = Parts(partitioned.traced(name)[1], None).simulate(input_ids=ids)
    emitter = Emitter(program)
    ranks = [emitter.rank(place) for place in program.mesh]
    found = run_stages(ranks, ids)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_each_stage_holds_its_own_weights_and_tied_ones_stand_on_both() -> None:
    program = compiled("gpt2", starts=["transformer.h.1"])
    emitter = Emitter(program)
    first, last = (emitter.rank({"pp": stage}) for stage in (0, 1))
    held = [{weight.name for weight in rank.weights} for rank in (first, last)]
    assert all(not name.startswith("transformer.h.1.") for name in held[0])
    assert all(not name.startswith("transformer.h.0.") for name in held[1])
    tied = held[0] & held[1]
    assert tied == {"transformer.wte.weight"}
    assert program.stages is not None
    assert program.stages.of_weight["transformer.wte.weight"] == {0, 1}
    assert first.stage is not None
    assert last.stage is not None
    assert (first.stage.receives, last.stage.sends) == ((), ())
    assert first.stage.sends == last.stage.receives
    assert first.stage.sends[0].shape == ("batch", "sequence", zoo.HIDDEN)


def test_a_value_for_a_later_stage_crosses_every_boundary() -> None:
    program = compiled("llama", starts=["model.layers.1", "model.norm"])
    # the embedding is used on the last stage too
    embedded = next(n for n in program.graph.nodes if "embedding" in n.name)
    last = program.graph.output_node().all_input_nodes[0]
    with program.graph.inserting_before(last):
        total = program.graph.call_function(torch.ops.aten.add.Tensor, (last.args[0], embedded))
        total.meta = {**last.args[0].meta, "stages": frozenset({2})}
    last.replace_input_with(last.args[0], total)
    cuts = crossings(program.graph, 3)
    assert all(embedded in cut for cut in cuts)


def test_what_only_a_later_stage_has_is_refused() -> None:
    program = compiled("llama", starts=["model.layers.1"])
    nodes = [n for n in program.graph.nodes if n.op == "call_function" and n.meta["stages"] == {0}]
    nodes[3].meta["stages"] = frozenset({1})
    with pytest.raises(LayoutError, match=f"'{nodes[3].name}', which is computed on stage 1 only"):
        Emitter(program)


def test_a_partial_sum_does_not_cross() -> None:
    program = compiled("llama", starts=["model.layers.1"], tp=2)
    (crossing,) = crossings(program.graph, 2)
    source = crossing[0].all_input_nodes[0]
    sums = [n for n in (crossing[0], source, *source.all_input_nodes) if "all_reduce" in n.name]
    for node in sums:  # cut in front of the sum instead of behind it
        for each in itertools.takewhile(lambda n: n is not None, [node]):
            each.meta["stages"] = frozenset({1})
    for user in [n for n in program.graph.nodes if sums and sums[0] in n.all_input_nodes]:
        user.meta["stages"] = frozenset({1})
    with pytest.raises(LayoutError, match=r"partial over tp; complete it first|computed on stage 1 only"):
        Emitter(program)


def test_a_mesh_of_another_number_of_stages_is_refused() -> None:
    program = compiled("llama", starts=["model.layers.1"])
    program.mesh = Mesh.of(pp=3)
    with pytest.raises(LayoutError, match="2 stages, and the mesh pp=3"):
        Emitter(program)


def test_stages_go_into_a_bundle_and_come_back(tmp_path) -> None:
    model = zoo.tiny("llama")[0]
    program = staged(trace(model).copy(Mesh.of(pp=2)), ["model.layers.1"])
    parts = Parts(program, "by hand", plan=Plan(pp=2), model=ModelRecord.of(model, max_length=None, fixed_length=None))
    parts.save(tmp_path / "bundle")
    bundle = partitioner.load(tmp_path / "bundle")
    bundle.verify()
    ids = partitioned.tokens("llama", 4)
    assert [bundle.rank(rank).stage for rank in (0, 1)] == [parts.rank(rank).stage for rank in (0, 1)]
    expected = run_stages([parts.rank(rank) for rank in (0, 1)], ids)
    assert torch.equal(run_stages([bundle.rank(rank) for rank in (0, 1)], ids), expected)
