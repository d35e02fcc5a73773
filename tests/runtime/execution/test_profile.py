"""Profiles of simulated ranks and of processes: whole, nested, and right about who waited for whom."""

from __future__ import annotations

import functools
import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx

from partitioner import Parts, Plan
from partitioner.compile.partition import compile_program
from partitioner.compile.tracing.trace import trace
from partitioner.errors import CommunicationError, InputError
from partitioner.sharding.mesh import Mesh
from runtime.communication.thread_communicator import ThreadGroup
from runtime.engine import Engine
from runtime.engine.simulator import Simulator
from runtime.execution.chrome_trace import Trace
from runtime.execution.profile import Recording
from runtime.ops.collectives import all_reduce
from runtime.pipeline.measured import measured
from runtime.processes.launch import launch
from runtime.program.rank_program import RankProgram
from tests.runtime.execution import valid_trace
from tests.support import handmade

IDS = torch.randint(3, 500, (2, 64), generator=torch.Generator().manual_seed(0))


@functools.cache
def parts(tp: int) -> Parts:
    return compile_program(trace(valid_trace.model()), Plan(tp=tp))


def recorded(tp: int) -> tuple[Tensor, Trace]:
    for _ in range(2):  # the first run pays for what every first run pays for
        with parts(tp).profile() as found:
            result = parts(tp).simulate(input_ids=IDS)
    return result, found


@pytest.mark.parametrize("tp", [1, 2])
def test_simulated_ranks(tp: int, tmp_path: Path) -> None:
    plain = parts(tp).simulate(input_ids=IDS)
    result, found = recorded(tp)
    assert torch.equal(result, plain)
    events = valid_trace.validate(found, num_ranks=tp)
    for row in found.totals():
        assert row.told <= 1, row
        assert row.told + row.recording / row.steps > 0.9, row  # recording is slow where the machine is busy
    nodes = [node for node in parts(tp).rank(0).graph.nodes if node.op in ("call_function", "call_method")]
    told = {e["name"] for e in events if e["ph"] == "X" and e["pid"] == 0 and e["tid"]}
    assert told == {node.name for node in nodes}
    found.save(tmp_path / "trace.json")
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"] == json.loads(json.dumps(events))


def test_what_an_event_says() -> None:
    _, found = recorded(2)
    events = [e for e in found.events() if e["ph"] == "X" and e["pid"] == 1]
    linear = next(e for e in events if e["tid"] == 1 and e["args"].get("path") == "model.layers.1.mlp.down_proj")
    assert linear["args"]["op"] == "linear"
    assert linear["args"]["shape"] == "float64[2, 64, 256]"
    assert linear["args"]["bytes"] == 2 * 64 * 256 * 8
    assert "row-parallel over tp" in linear["args"]["why"]
    reductions = [e for e in events if e["args"].get("op") == "all_reduce over tp" and e["tid"] == 2]
    assert [e["args"]["meeting"] for e in reductions] == list(range(5))
    assert reductions[0]["args"]["ranks"] == [0, 1]
    modules = [e["args"]["path"] for e in events if e["tid"] == 0 and "path" in e["args"]]
    assert modules.count("model.layers.1.mlp") == 1
    (run,) = [e for e in events if e["tid"] == 0 and "path" not in e["args"]]
    assert run["name"] == "run [2, 64]"


def slowed(program: RankProgram, seconds: float) -> RankProgram:
    """The same rank, asleep before it comes to its second all-reduce."""

    def asleep(x: Tensor) -> Tensor:
        time.sleep(seconds)
        return x

    def build() -> fx.Graph:
        graph = fx.Graph()
        copied: dict[fx.Node, fx.Node] = {}
        graph.output(graph.graph_copy(program.graph, copied))
        node = [node for node in graph.nodes if node.target is all_reduce][1]
        with graph.inserting_before(node):
            node.args = (graph.call_function(asleep, (node.args[0],)), *node.args[1:])
        return graph

    return replace(program, build_graph=build)


def test_a_slow_rank_is_the_others_waiting() -> None:
    slow = 0.5
    simulator = Simulator([parts(2).rank(0), slowed(parts(2).rank(1), slow)])
    for _ in range(2):
        with simulator.profile() as found:
            results = simulator(input_ids=IDS)
    assert torch.equal(results[0], parts(2).simulate(input_ids=IDS))
    fast, late = found.totals()
    assert fast.waiting > 0.9 * slow
    assert fast.communication < 0.5 * slow
    assert late.compute > 0.9 * slow
    assert late.waiting < 0.5 * slow
    longest = max((e for e in found.events() if e.get("cat") == "waiting"), key=lambda e: e["dur"])
    assert longest["pid"] == 0
    assert longest["args"]["meeting"] == 1
    assert str(found).count("\n") == 2


def test_without_a_common_clock_waiting_is_not_told() -> None:
    """The same two recordings, one of them an hour off, or from another host."""
    _, found = recorded(2)
    one, other = found.ranks
    hour = 3600 * 10**9
    runs = [
        {**run, **{name: [at + hour for at in run[name]] for name in ("begins", "ends")},
         "start": run["start"] + hour, "end": run["end"] + hour}
        for run in other.runs
    ]  # fmt: skip
    for changed in (replace(other, runs=runs), replace(other, host="elsewhere"), replace(other, runs=[])):
        apart = Trace()
        apart.complete([one, changed])
        assert not [e for e in apart.events() if e.get("cat") == "waiting"]
        said = [e["args"] for e in apart.events() if e.get("cat") == "communication"]
        assert all("no common clock" in args["waiting"] for args in said)
        assert [row.waiting for row in apart.totals()] == [0, 0]


def test_generation_is_recorded_with_its_sampling() -> None:
    prompts = [[5, 9, 3], [7]]
    plain = parts(2).generate(prompts, max_new_tokens=4)
    with parts(2).profile() as found:
        assert torch.equal(parts(2).generate(prompts, max_new_tokens=4), plain)
    events = valid_trace.validate(found, num_ranks=2)
    steps = [e["name"] for e in events if e["ph"] == "X" and e["pid"] == 0 and not e["tid"] and "path" not in e["args"]]
    assert steps == ["run [2, 3]", "run [2, 1]", "run [2, 1]", "run [2, 1]", *["sampling"] * 4]
    gathers = [e for e in events if e["name"] == "sampler" and e.get("cat") == "communication" and e["pid"] == 0]
    assert len(gathers) == 4
    with parts(2).profile() as found:
        pass
    assert [len(one.runs) for one in found.ranks] == [0, 0]
    assert valid_trace.validate(found, num_ranks=2)


def test_memory_is_that_of_live_values() -> None:
    """x doubled thrice, a view of the last: never more than two values at once, and the inputs are not counted."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    for _ in range(3):
        x = graph.call_function(torch.mul, (x, 2.0))
    x = graph.call_method("view", (x, -1))
    graph.output(graph.call_function(torch.sum, (x,)))
    program = RankProgram(lambda: graph, Mesh.of(), Mesh.of().coordinates(0), (), ())
    engine = Engine(program, ThreadGroup(Mesh.of()).communicator(0))
    engine.profiler.start()
    engine._run([torch.ones(4, 8)])
    (run,) = engine.profiler.stop().runs
    size = 4 * 8 * 4
    assert run["memory"] == [(size, size), (2 * size, size), (2 * size, size), (size, size), (size + 4, 4)]
    assert run["bytes"] == [size] * 4 + [4]


def test_profiles_do_not_nest_and_are_read_when_complete() -> None:
    with parts(1).profile() as found:
        with pytest.raises(InputError, match="leave the `with"):
            found.events()
        with pytest.raises(InputError, match="profiles do not nest"), parts(1).profile():
            pass
    stream = parts(1).stream([[3]], max_new_tokens=4)
    next(stream)
    with pytest.raises(CommunicationError, match="in the middle of something"), parts(1).profile():
        pass
    stream.close()


def test_an_error_in_the_block_ends_the_recording() -> None:
    with pytest.raises(ZeroDivisionError), parts(1).profile():
        raise ZeroDivisionError
    with parts(1).profile() as found:
        parts(1).simulate(input_ids=IDS)
    assert len(found.ranks[0].runs) == 1


def test_a_failing_node_is_named_as_without_a_profile() -> None:
    def fails(x: Tensor) -> Tensor:
        raise ValueError("no")

    program = Parts(handmade.partitioned(1), None).rank(0)

    def build() -> fx.Graph:
        graph = fx.Graph()
        graph.output(graph.graph_copy(program.graph, {}))
        next(node for node in graph.nodes if node.name == "act").target = fails
        return graph

    simulator = Simulator([replace(program, build_graph=build)])
    with pytest.raises(ValueError, match="no") as caught, simulator.profile():
        simulator(input_ids=handmade.input_ids())
    assert "at node 'act' of model" in "".join(caught.value.__notes__)


@pytest.mark.parametrize("option", ["compile", "cuda_graph"])
def test_compiled_steps_have_no_nodes(option: str) -> None:
    engine = parts(1).engine(0, ThreadGroup(Mesh.of()).communicator(0), **{option: True})
    with pytest.raises(InputError, match=f"made with {option}=True: leave it out"), engine.profile():
        pass


def test_what_is_not_profiled_runs_the_plain_function(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object) -> None:
        raise AssertionError("made without being asked for")

    monkeypatch.setattr("runtime.execution.executable.Profiled", never)
    simulator = Simulator([parts(1).rank(0)])
    simulator(input_ids=IDS)


@pytest.mark.slow
@pytest.mark.processes
def test_two_processes(monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config, tmp_path: Path) -> None:
    monkeypatch.setenv("PYTHONPATH", str(pytestconfig.rootpath))
    launch(["tests.runtime.execution.profiled_rank", str(tmp_path), "cpu", "on", "off"], num_ranks=2, timeout_s=240)
    for sharing in ("on", "off"):
        saved = [(tmp_path / f"{sharing}-{rank}.json").read_text() for rank in range(2)]
        assert saved[0] == saved[1], "both ranks have the whole trace"
        assert {event["pid"] for event in json.loads(saved[0])["traceEvents"]} == {0, 1}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda() -> None:
    """Times by events on the stream: they cover the step, and add up to no more than the host's clock saw."""
    one = parts(1)
    engine = one.engine(0, ThreadGroup(Mesh.of()).communicator(0), device="cuda")
    ids = IDS.cuda()
    plain = engine(input_ids=ids)
    for _ in range(2):
        torch.cuda.synchronize()
        start = time.monotonic()
        with engine.profile() as found:
            result = engine(input_ids=ids)
            torch.cuda.synchronize()
        took = time.monotonic() - start
    assert torch.equal(result, plain)
    events = valid_trace.validate(found, num_ranks=1)
    (row,) = found.totals()
    assert 0 < row.steps < took
    assert row.compute + row.recording > 0.9 * row.steps, row
    memory = [e["args"]["allocated"] for e in events if e["ph"] == "C"]
    assert max(memory) >= torch.cuda.memory_allocated() > 0


@pytest.mark.gpu
@pytest.mark.processes
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_two_processes_over_nccl(monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config, tmp_path: Path) -> None:
    monkeypatch.setenv("PYTHONPATH", str(pytestconfig.rootpath))
    launch(["tests.runtime.execution.profiled_rank", str(tmp_path), "cuda", "auto"], num_ranks=2, timeout_s=240)
    assert (tmp_path / "auto-0.json").read_text() == (tmp_path / "auto-1.json").read_text()


class FakeEvent:
    """An event on a stream whose clock counts milliseconds from a beginning of its own."""

    def __init__(self, at_ms: float) -> None:
        self.at_ms = at_ms

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, later: FakeEvent) -> float:
        return later.at_ms - self.at_ms


def test_events_of_a_stream_are_put_on_the_host_s_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    recording = Recording(parts(1).rank(0), torch.device("cuda"))
    monkeypatch.setattr(recording, "now", lambda: FakeEvent(50.0))
    monkeypatch.setattr("runtime.execution.profile.time.monotonic_ns", lambda: 10**9)
    assert recording.times([FakeEvent(10.0), FakeEvent(49.5)]) == [10**9 - 40 * 10**6, 10**9 - 500_000]


def test_transfers_between_stages_have_arrows() -> None:
    """From the begin on the sender to the end on the receiver, one for each piece, prompt's or token's."""
    staged = compile_program(trace(valid_trace.model()), Plan(pp=2))
    texts = [[3, 4, 5], [6, 7]]
    plain = staged.generate(texts, max_new_tokens=4, eos_token_id=[])
    with staged.profile() as found:
        staged.simulate(input_ids=IDS)
        assert torch.equal(staged.generate(texts, max_new_tokens=4, eos_token_id=[]), plain)  # type: ignore[arg-type]
    events = found.events()
    spans = [event for event in events if event["ph"] == "X" and event["cat"] == "transfers"]
    assert {event["name"].partition(" ")[0] for event in spans} == {"begin", "finish"}
    starts, ends = ({e["id"]: e for e in events if e["ph"] == phase} for phase in "sf")
    assert starts.keys() == ends.keys()
    assert len(starts) == sum(event["ph"] in "sf" for event in events) // 2, "each arrow has a name of its own"
    sent = sum(each["op"] == "send over pp" for each in found.ranks[0].transfers)
    slots = sum(each["op"] == "permute over pp" for each in found.ranks[0].transfers)
    assert sent > 0
    assert slots > 3
    assert len(starts) == sent + 2 * slots
    for arrow, start in starts.items():
        end = ends[arrow]
        assert start["pid"] != end["pid"]
        assert start["ts"] <= end["ts"]
        for event in (start, end):
            inside = [
                span
                for span in spans
                if span["pid"] == event["pid"] and span["ts"] <= event["ts"] <= span["ts"] + span["dur"] + 1e-6
            ]
            assert inside, "a viewer binds an arrow to the span around it"
    assert all(row.transfers > 0 for row in found.totals())
    assert "between stages [ms]" in str(found)
    assert_the_same_as_a_whole(staged, found, texts, plain)


def assert_the_same_as_a_whole(staged: Parts, by_node: Trace, texts: list[list[int]], plain: object) -> None:
    """Runs that are told as one event each."""
    with staged.profile(by_node=False) as found:
        staged.simulate(input_ids=IDS)
        assert torch.equal(staged.generate(texts, max_new_tokens=4, eos_token_id=[]), plain)  # type: ignore[arg-type]
    assert [len(each.runs) for each in found.ranks] == [len(each.runs) for each in by_node.ranks]
    for row in found.totals():
        assert 0 < row.compute <= row.steps
        assert row.recording == 0
    assert not [event for event in found.events() if event["ph"] == "C"]
    for each in (found, by_node):
        timing = measured(each.ranks)
        assert [len(of_stage) for of_stage in timing.seconds] == [len(ranks.runs) for ranks in each.ranks]
        assert 0 < timing.bubble < 1


def test_a_profile_of_one_stage_has_no_transfers() -> None:
    _, found = recorded(1)
    assert "between stages" not in str(found)
    assert not [event for event in found.events() if event["ph"] in "sf"]
