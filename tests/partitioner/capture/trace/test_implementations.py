"""Capture takes the branch of a model's code that its own attention implementation takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from partitioner.capture import capture
from partitioner.capture.inputs.probe import Probe
from partitioner.capture.trace.transformers_hooks import ATTENTION, installed
from partitioner.proof.float64 import ExactArithmetic
from partitioner.sharding.mesh import Mesh
from runtime.ops.attention import attention
from tests.support import zoo
from tests.support.interpret import run

ALIBI = {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}


def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """By the model's own code, with the attention implementation that it has."""
    with torch.no_grad(), ExactArithmetic():
        found: Tensor = model(input_ids=ids, use_cache=False).logits
    return found


def error(model: PreTrainedModel, ids: Tensor, *, of: PreTrainedModel) -> float:
    """The difference of what is captured from `model` from the logits of `of`, relative to the largest."""
    expected = logits(of, ids)
    found = run(capture(model, mesh=Mesh.of()), lifted=True, input_ids=ids)
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("falcon", ALIBI),  # eager adds the slopes twice, sdpa once
        ("gpt2", {"reorder_and_upcast_attn": True}),  # which eager alone reads
        pytest.param("gemma2", {"attn_implementation": "eager"}, marks=pytest.mark.slow),  # which alone caps scores
    ],
)
def test_the_models_own_branch(name: str, fields: dict[str, Any]) -> None:
    model, ids = zoo.tiny(name, **fields)
    assert error(model, ids[:, :9], of=model) < 1e-10


def test_a_cap_on_scores_is_kept_where_the_models_own_attention_leaves_it_out() -> None:
    """As sdpa does, by which transformers loads such models up to 5.17."""
    model, ids = zoo.tiny("gemma2", num_hidden_layers=1)
    capped, _ = zoo.tiny("gemma2", num_hidden_layers=1, attn_implementation="eager")
    assert error(model, ids[:, :9], of=capped) < 1e-10


def test_eager_where_the_user_chose_it() -> None:
    model, ids = zoo.tiny("falcon", **ALIBI, attn_implementation="eager")
    assert model.config._attn_implementation == "eager"
    assert error(model, ids[:, :9], of=model) < 1e-10


def test_another_branch_is_another_model() -> None:
    """Negative control: the branches of this model differ, and the reference tells."""
    model, ids = zoo.tiny("falcon", **ALIBI)
    eager, _ = zoo.tiny("falcon", **ALIBI, attn_implementation="eager")
    assert error(eager, ids[:, :9], of=model) > 1e-3


def test_attention_that_a_model_asks_torch_for_is_attention() -> None:
    model, _ = zoo.tiny("falcon")
    targets = [node.target for node in capture(model, mesh=Mesh.of()).graph.nodes]
    assert targets.count(attention) == zoo.LAYERS


@pytest.mark.parametrize(
    ("queries", "keys", "options", "becomes"),
    [
        ((2, 4, 3, 4), (2, 4, 3, 4), {}, True),
        ((2, 4, 3, 4), (2, 1, 3, 4), {}, True),
        ((2, 4, 3, 4), (2, 2, 3, 4), {"enable_gqa": True}, True),
        ((2, 3, 4), (2, 3, 4), {}, False),
        ((2, 4, 3, 4), (2, 4, 3, 4), {"dropout_p": 0.1}, False),
    ],
)
def test_direct_calls_that_the_op_cannot_say_stay_as_they_are(
    queries: tuple[int, ...], keys: tuple[int, ...], options: dict[str, Any], becomes: bool
) -> None:
    q, k = torch.randn(queries), torch.randn(keys)
    called: list[Any] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.append(func)
            return torch.empty_like(args[0]) if func is ATTENTION else func(*args, **(kwargs or {}))

    with installed(Probe()), Watch():  # type: ignore[no-untyped-call]
        functional.scaled_dot_product_attention(q, k, k, **options)
    assert (ATTENTION in called) == becomes
