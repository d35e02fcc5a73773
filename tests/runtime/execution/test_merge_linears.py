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
from runtime.ops.kernels.stored.stored_linear import stored_linear, stored_weight
from runtime.program.rank_program import RankProgram, RunInput
from runtime.program.shards import WeightShard
from runtime.weights.load_weights import load_weights
from tests.runtime.ops.test_stored import CODES, held
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
@pytest.mark.parametrize(
    ("name", "tp"),
    [
        pytest.param(
            name, tp, marks=() if (name, tp) in {("llama", 1), ("mixtral", 3), ("phi", 3)} else pytest.mark.slow
        )
        for name in ("llama", "qwen2", "gemma2", "mixtral", "phi")
        for tp in (1, 2, 3)
    ],
)
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


def of_codes(code, heights, other_columns=False):
    """A program of linears of one input whose weights are held as stored, and the weights as numbers, float64."""
    graph = torch.fx.Graph()
    x, values, numbers, outputs = graph.placeholder("x"), {}, [], []
    for i, height in enumerate(heights):
        parts, _ = held(code, height, 64, seed=i)
        names = [f"{i}.{role}" for role in ("codes", "scales", "zeros", "rows", "columns")]
        columns = held(code, 1, 64, seed=0)[0][4]
        parts = (*parts[:4], columns.flip(0) if other_columns and i else columns)
        weight = stored_weight(*parts, code=code, computed_in=torch.float64, dtype=torch.float64)
        numbers.append(weight)
        given = {name: part for name, part in zip(names, parts, strict=True) if part is not None}
        values |= given
        leaves = [graph.get_attr(name) if name in given else None for name in names]
        options = {"code": code, "computed_in": torch.float64}
        outputs.append(graph.call_function(stored_linear, (x, *leaves, None), options))
    graph.output(graph.call_function(torch.cat, (outputs, -1)))
    shards = tuple(
        WeightShard(
            name, value.dtype, tuple(value.shape), tuple(value.shape), (None,) * value.ndim, "checkpoint", (), ()
        )
        for name, value in values.items()
    )
    inputs = (RunInput("x", torch.float64, (5, 64), "required"),)
    return RankProgram(lambda: graph, Mesh.of(), Mesh.of().coordinates(0), shards, inputs, values), torch.cat(numbers)


def products(program):
    return [node for node in program.graph.nodes if node.target is stored_linear]


@pytest.mark.parametrize("code", CODES)
def test_weights_that_are_held_as_stored_are_merged(code, monkeypatch):
    program, numbers = of_codes(code, (6, 3, 4))
    weights = laid_out(program)
    merged, more = merging.merge_linears(program, weights)
    assert len(products(merged)) == 1
    size = {w.untyped_storage().data_ptr(): w.untyped_storage().nbytes() for w in [*weights, *more]}
    assert sum(size.values()) == sum(w.nbytes for w in weights) + 4 * 13, "nothing twice, but for rows' indices"
    given = torch.randn(5, 64, dtype=torch.float64)

    def error(program, weights):
        run = Executable(program, weights, ThreadGroup(Mesh.of()).communicator(0), torch.device("cpu"))
        return float((run([given]) - given @ numbers.T).abs().max())

    assert error(merged, more) < 1e-11
    monkeypatch.setattr(merging, "_moved_on", lambda indices, heights: torch.cat(list(indices)))
    assert error(*merging.merge_linears(program, weights)) > 1e-2, "others' scales"


def test_columns_that_share_other_scales_are_not_merged():
    program, _ = of_codes("int4", (6, 3), other_columns=True)
    merged, more = merging.merge_linears(program, laid_out(program))
    assert len(products(merged)) == 2
    assert len(more) == len(program.weights)


def test_only_compiled_and_captured_steps_take_the_copy():
    parts = partition(zoo.tiny("llama")[0], Plan())
    model = {w.untyped_storage().data_ptr() for w in parts.rank(0).weight_data.values()}
    plain = parts.engine(0, ThreadGroup(parts.mesh).communicator(0))
    assert {w.untyped_storage().data_ptr() for w in plain.weights} <= model
