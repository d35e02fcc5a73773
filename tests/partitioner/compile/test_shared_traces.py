"""What the tests' shared traces must not do: hand a test the trace of a model that is not its own."""

import copy
import dataclasses
import functools

import pytest
import sympy
import torch
from torch import nn
from transformers import GenerationConfig

from partitioner import Plan, partition
from partitioner.capture.capture import ends_of, generation_of
from partitioner.compile.partition import compile_program
from partitioner.compile.tracing.trace import trace
from tests.support import partitioned, reference, zoo
from tests.support.layers import Gated, layered
from tests.support.traces import shared_traces, stored_traces


@pytest.fixture
def traced(monkeypatch):
    """The models that are really traced while this is in use."""
    found, own = [], shared_traces.compiling.capture
    monkeypatch.setattr(shared_traces, "_known", type(shared_traces._known)())
    monkeypatch.setattr(shared_traces, "_folder", None)  # another process may have traced the same

    def capture(model, **asked):
        found.append(model)
        return own.args[0](model, **asked)

    capture.__name__ = "capture"
    monkeypatch.setattr(
        shared_traces.compiling, "capture", lambda *given, **asked: shared_traces._capture(capture, *given, **asked)
    )
    return found


def fresh():
    return copy.deepcopy(zoo.tiny("llama")[0])


def test_two_that_are_alike_share_one_trace_over_their_own_weights(traced):
    first, second = fresh(), fresh()
    programs = [trace(first), trace(second)]
    assert traced == [first]
    for model, program in zip((first, second), programs, strict=True):
        parameters = dict(model.named_parameters())
        checked = [name for name in program.weight_data if name in parameters]
        assert checked
        assert all(program.weight_data[name].data_ptr() == parameters[name].data_ptr() for name in checked)
    assert programs[0].graph is not programs[1].graph


def _weight(model):
    with torch.no_grad():
        model.model.norm.weight[3] += 1


def _field(model):
    model.config.rms_norm_eps = 0.25


def _attribute(model):
    model.model.layers[1].self_attn.scaling *= 2


def _forward(model):
    model.model.layers[0].mlp.forward = lambda x: x


def _hook(model):
    model.model.layers[0].register_forward_hook(lambda module, given, result: result)


def _tied(model):
    model.lm_head.weight = model.model.embed_tokens.weight


def _activation(model):
    model.model.layers[0].mlp.act_fn = nn.Tanh()


@pytest.mark.parametrize("change", [_weight, _field, _attribute, _forward, _hook, _tied, _activation])
def test_two_that_differ_are_described_differently(change):
    first, second = fresh(), fresh()
    assert shared_traces.describe(first) == shared_traces.describe(second)
    change(second)
    assert shared_traces.describe(first) != shared_traces.describe(second)


def test_what_is_asked_of_a_trace_is_part_of_it(traced):
    trace(fresh())
    trace(fresh(), fixed_length=5)
    trace(fresh().bfloat16())
    assert len(traced) == 3


def test_what_a_generation_config_says_is_the_models_own(traced):
    first, second = fresh(), fresh()
    second.generation_config = GenerationConfig(eos_token_id=7, repetition_penalty=1.5)
    one, other = trace(first), trace(second)
    assert len(traced) == 1
    assert (other.eos_token_id, other.generation) == ((7,), {"repetition_penalty": 1.5})
    assert (one.eos_token_id, one.generation) == (ends_of(first), generation_of(first)) != ((7,), other.generation)


def test_what_is_changed_of_a_shared_trace_is_not_changed_of_the_next(traced):
    """Whole texts that run by the code for single tokens are its program with one more size."""
    first = trace(fresh())
    before = set(first.symbols), list(first.notes), set(first.weights), len(first.graph.nodes)
    first.symbols["tokens"] = sympy.Symbol("tokens")
    first.notes.append("changed")
    first.weights.clear()
    first.graph.erase_node(next(iter(reversed(first.graph.nodes))))
    second = trace(fresh())
    assert len(traced) == 1
    assert (set(second.symbols), list(second.notes), set(second.weights), len(second.graph.nodes)) == before


def test_code_that_is_not_transformers_own_is_always_traced():
    assert shared_traces.describe(layered(Gated)) is None


def test_ranks_compute_with_the_weights_of_their_own_model(traced):
    first, second = fresh(), fresh()
    with torch.no_grad():
        partition(first, Plan(tp=2)).simulate(input_ids=torch.tensor([[3, 4, 5]]))
        parts = partition(second, Plan(tp=2))
        assert len(traced) == 1
        ids = partitioned.tokens("llama", 5)
        torch.testing.assert_close(parts.simulate(input_ids=ids), reference.forward(second, input_ids=ids))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(shared_traces, "_folder", tmp_path)
    return tmp_path


def test_another_process_reads_what_this_one_has_traced(traced, folder):
    """What it reads is the whole program: the same graph, and ranks of the same code and results."""
    first, second = fresh(), fresh()
    own = trace(first)
    shared_traces._known.clear()
    read = trace(second)
    assert traced == [first]
    assert len(list(folder.iterdir())) == 1
    assert str(read.graph) == str(own.graph)
    for one, other in zip(own.graph.nodes, read.graph.nodes, strict=True):
        assert (one.name, one.target, one.meta) == (other.name, other.target, other.meta)
    fields = {field.name for field in dataclasses.fields(own)} - {"graph", "weight_data"}
    assert all(vars(own)[name] == vars(read)[name] for name in fields)
    assert own.weight_data.keys() == read.weight_data.keys()
    parameters = dict(second.named_parameters())
    assert all(
        data.data_ptr() == parameters[name].data_ptr() for name, data in read.weight_data.items() if name in parameters
    )
    assert all(torch.equal(data, read.weight_data[name]) for name, data in own.weight_data.items())
    ids = partitioned.tokens("llama", 5)
    ranks = [compile_program(program, Plan(tp=2)) for program in (own, read)]
    assert ranks[0].rank(1).graph_module.code == ranks[1].rank(1).graph_module.code
    assert torch.equal(ranks[0].simulate(input_ids=ids), ranks[1].simulate(input_ids=ids))


def test_a_model_that_a_test_has_changed_is_not_left_to_others(traced, folder):
    model = fresh()
    _forward(model)
    trace(model)
    assert traced == [model]
    assert not list(folder.iterdir())


@pytest.mark.parametrize("change", [_weight, _field, _attribute, _tied, _activation])
def test_two_that_differ_have_two_names(change):
    first, second = fresh(), fresh()
    names = [stored_traces.key(shared_traces.describe(model)) for model in (first, second)]
    change(second)
    assert names[0] == names[1] != stored_traces.key(shared_traces.describe(second))


def test_a_function_is_told_by_its_code_and_by_what_it_wraps():
    def one(x):
        return x + 1

    def other(x):
        return x + 2

    other.__qualname__ = one.__qualname__
    wrapping = [functools.wraps(each)(lambda x: x) for each in (one, other)]
    assert stored_traces.key((one,)) != stored_traces.key((other,))
    assert stored_traces.key((wrapping[0],)) != stored_traces.key((wrapping[1],))
