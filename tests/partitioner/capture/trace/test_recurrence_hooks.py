"""Which of a model's functions are recurrences that we know: by their parameters, and by what they compute."""

import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from partitioner.capture.trace import recurrence_hooks
from partitioner.capture.trace.recurrence_hooks import OPS, recurrences_installed
from runtime.ops.state import selective_scan


def scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,  # noqa: N803 - as kernels call them
    B: Tensor,  # noqa: N803
    C: Tensor,  # noqa: N803
    D: Tensor | None = None,  # noqa: N803
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    use_mambapy: bool = False,
    use_associative_scan: bool = False,
    reset: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """Token by token, as a model may have it."""
    dt = dt if delta_bias is None else dt + delta_bias[:, None]
    dt = nn.functional.softplus(dt) if delta_softplus else dt
    state, found = hidden_states.new_zeros((len(hidden_states), *A.shape)), []
    for t in range(dt.shape[-1]):
        state = (dt[..., t, None] * A).exp() * state + (dt * hidden_states)[..., t, None] * B[:, None, :, t]
        found.append((state * C[:, None, :, t]).sum(-1))
    out = torch.stack(found, -1)
    out = out if D is None else out + hidden_states * D[:, None]
    out = out if z is None else out * nn.functional.silu(z)
    return (out, state) if return_last_state else out


def forgetful(*args: Any, **kwargs: Any) -> Any:
    out, state = scan(*args, **kwargs)
    return out, state * 0.5


forgetful.__wrapped__ = scan  # type: ignore[attr-defined]  # the same parameters


class Layer(nn.Module):
    """In a file of its own, beside the functions."""


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> Any:
    file = types.ModuleType("a_model_with_recurrences")
    monkeypatch.setitem(sys.modules, file.__name__, file)
    monkeypatch.setattr(Layer, "__module__", file.__name__)
    file.scan, file.forgetful = scan, forgetful  # type: ignore[attr-defined]
    return file


def test_a_function_that_computes_the_recurrence_is_replaced_and_put_back(beside: Any) -> None:
    with recurrences_installed(Layer()):
        assert beside.scan is not scan
        assert beside.forgetful is forgetful, "its last state is another"
    assert beside.scan is scan


def test_what_is_asked_beyond_the_recurrence_is_left_to_the_function(
    beside: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def counted(*args: Any) -> Any:
        asked.append("op")
        return selective_scan(*args)

    given = [torch.rand(1, 2, 3), torch.rand(1, 2, 3), -torch.rand(2, 4), torch.rand(1, 4, 3), torch.rand(1, 4, 3)]
    found = recurrence_hooks._recognised(scan)
    assert found is not None
    assert OPS[found.op] is selective_scan
    monkeypatch.setattr(type(found), "__setattr__", object.__setattr__)
    monkeypatch.setattr(found, "op", counted)
    run = recurrence_hooks._by_op(scan, found)
    assert torch.allclose(run(*given, more=None), scan(*given))
    assert asked == ["op"]
    run(*given, reset=torch.ones(1))
    run(*given, cu_seqlens=torch.ones(1))
    assert asked == ["op"]
