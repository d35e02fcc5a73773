"""What the tests' shared traces must not do: hand a test the trace of a model that is not its own."""

import copy

import pytest
import torch
from torch import nn

from partitioner import Plan, partition
from partitioner.compile.partition import trace
from tests.support import partitioned, reference, shared_traces, zoo
from tests.support.layers import Gated, layered


@pytest.fixture
def traced(monkeypatch):
    """The models that are really traced while this is in use."""
    found, own = [], shared_traces.compiling.capture
    monkeypatch.setattr(shared_traces, "_known", type(shared_traces._known)())

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
