"""Linears of one input, merged: the same texts and logits, from memory that is laid out once."""

import functools

import pytest
import torch

import runtime.engine.simulator
import runtime.execution.merge_linears as merging
from partitioner import Plan, partition
from partitioner.sharding.mesh import Mesh
from runtime.communication.thread_communicator import ThreadGroup
from runtime.engine import Engine
from runtime.execution.executable import Executable
from runtime.program.rank_program import RankProgram, RunInput
from runtime.program.shards import WeightShard
from runtime.weights.load_weights import load_weights
from tests.support import zoo
from tests.support.generated import prompts


def linears(program):
    return [node for node in program.graph.nodes if node.target is torch.nn.functional.linear]


def laid_out(program):
    weights = load_weights(program.weights, program.weight_data, None, torch.device("cpu"))
    merging.lay_side_by_side(program, weights)
    return weights


@pytest.fixture
def fixed_memory(monkeypatch):
    """Every rank's engine decodes as a compiled one does, without the compiler."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(runtime.engine.simulator, "Engine", functools.partial(Engine, compile=True))


# qwen2's and phi's have biases; mixtral's routers have their input to themselves
@pytest.mark.parametrize("tp", [1, pytest.param(2, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "mixtral", "phi"])
def test_merged_linears_write_the_same_texts(name, tp, fixed_memory):
    parts = partition(zoo.odd(name)[0], Plan(tp=tp))
    texts = prompts(name, (3, 11))
    said = parts.generate(texts, max_new_tokens=12, eos_token_id=[], logprobs=True)
    generate_loop = parts._simulator.engines[-1]._generate_loop
    assert len(linears(generate_loop.program)) < len(linears(parts.entry("decode", tp - 1)))
    parts._simulator.engines[:] = [
        Engine(each.program, each.communicator, entries=each._entries) for each in parts._simulator.engines
    ]
    assert parts._simulator.engines[-1]._generate_loop is not generate_loop
    expected = parts.generate(texts, max_new_tokens=12, eos_token_id=[], logprobs=True)
    assert torch.equal(said.sequences, expected.sequences)
    torch.testing.assert_close(said.logprobs, expected.logprobs, rtol=1e-10, atol=1e-10)


@pytest.fixture
def llama():
    return partition(zoo.tiny("llama")[0], Plan()).rank(0)


def test_the_merged_matrices_cost_no_memory(llama):
    weights = laid_out(llama)
    merged, more = merging.merge_linears(llama, weights)
    storages = {w.untyped_storage().data_ptr(): w.untyped_storage().nbytes() for w in weights}
    assert {w.untyped_storage().data_ptr() for w in more} <= storages.keys()
    assert sum(storages.values()) == sum(weight.nbytes for weight in weights)
    assert len(more) == len(merged.weights)
    # per layer: q, k and v; gate and up
    assert len(linears(llama)) - len(linears(merged)) == 3 * zoo.LAYERS
    assert all(torch.equal(w, llama.weight_data[s.name]) for s, w in zip(llama.weights, weights, strict=True))


def test_weights_that_lie_apart_are_not_merged(llama):
    weights = load_weights(llama.weights, llama.weight_data, None, torch.device("cpu"))
    merged, more = merging.merge_linears(llama, weights)
    assert merged.weights == llama.weights
    assert len(more) == len(weights)
    assert len(linears(merged)) == len(linears(llama))


def test_weights_in_another_order_are_not_merged(llama):
    """Side by side, but k before q: what merges them anyway would answer for the wrong heads."""
    weights = laid_out(llama)
    place = {shard.name: index for index, shard in enumerate(llama.weights)}
    k, v = (place[f"model.layers.0.self_attn.{which}_proj.weight"] for which in "kv")
    weights[k], weights[v] = weights[v], weights[k]
    merged, _ = merging.merge_linears(llama, weights)
    assert len(linears(llama)) - len(linears(merged)) == 3 * zoo.LAYERS - 2


def test_large_matrices_are_left_as_they_are(llama, monkeypatch):
    monkeypatch.setattr(merging, "SMALL_BYTES", 1)
    merged, more = merging.merge_linears(llama, laid_out(llama))
    assert len(linears(merged)) == len(linears(llama))
    assert len(more) == len(llama.weights)


@pytest.mark.parametrize(("gates", "count"), [(3, 2), (4, 1)])
def test_pairs_that_are_read_as_one_number_stay_where_they_can_be(gates, count):
    """A rotation by complex numbers beside an odd number of gates: behind those, no pair lies where one may."""
    graph = torch.fx.Graph()
    x, q, gate = graph.placeholder("x"), graph.get_attr("q"), graph.get_attr("gate")
    turned, gated = (graph.call_function(torch.nn.functional.linear, (x, weight)) for weight in (q, gate))
    turned = graph.call_function(
        torch.ops.aten.view_as_complex.default, (graph.call_method("reshape", (turned, (5, 3, 2))),)
    )
    turned = graph.call_method("flatten", (graph.call_function(torch.view_as_real, (turned,)), -2))
    graph.output(graph.call_function(torch.cat, ([turned, gated], -1)))
    values = {"q": torch.randn(6, 8), "gate": torch.randn(gates, 8)}
    shards = tuple(
        WeightShard(name, torch.float32, value.shape, value.shape, (None, None), "checkpoint", (), ())
        for name, value in values.items()
    )
    inputs = (RunInput("x", torch.float32, (5, 8), "required"),)
    program = RankProgram(lambda: graph, Mesh.of(), Mesh.of().coordinates(0), shards, inputs, values)
    merged, weights = merging.merge_linears(program, laid_out(program))
    assert len(linears(merged)) == count
    run = Executable(merged, weights, ThreadGroup(Mesh.of()).communicator(0), torch.device("cpu"))
    given = torch.randn(5, 8)
    torch.testing.assert_close(run([given]), given @ torch.cat([values["q"], values["gate"]]).T)


def test_only_compiled_and_captured_steps_take_the_copy():
    parts = partition(zoo.tiny("llama")[0], Plan())
    model = {w.untyped_storage().data_ptr() for w in parts.rank(0).weight_data.values()}
    plain = parts.engine(0, ThreadGroup(parts.mesh).communicator(0))
    assert {w.untyped_storage().data_ptr() for w in plain.weights} <= model
