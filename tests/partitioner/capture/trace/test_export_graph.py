"""Turning gradients on and off leaves nothing in a trace, and is done all the same."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from partitioner.capture.overheads import unread
from partitioner.capture.trace import export_graph

_seen: list[bool] = []


class _Switching(nn.Module):
    """With gradients at first, and without; it notes which."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Linear(4, 4)

    def forward(self, *given: Tensor) -> Tensor:
        (x,) = given
        with torch.enable_grad():
            _seen.append(torch.is_grad_enabled())
            y = self.model(x)
        _seen.append(torch.is_grad_enabled())
        with torch.no_grad():
            return y + x.cos()


def _ops(model: nn.Module, x: Tensor) -> list[str]:
    masks, dims = export_graph._Masks([]), {"x": {0: torch.export.Dim.DYNAMIC}}
    exported = export_graph.run_export(model, {"x": x}, masks, dims)
    assert torch.equal(exported.module()(x), model(x))
    modules = [each for each in exported.graph_module.modules() if isinstance(each, torch.fx.GraphModule)]
    return [str(node.target) for each in modules for node in each.graph.nodes if node.op == "call_function"]


def test_the_grad_mode_is_switched_and_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    _seen.clear()
    model, x = _Switching(), torch.randn(3, 4)
    assert _ops(model, x) == ["aten.linear.default", "aten.cos.default", "aten.add.Tensor"]
    assert _seen[:2] == [True, False]
    assert "forward" not in vars(model)
    monkeypatch.setattr(unread, "_grad_mode_unrecorded", lambda traced: contextlib.nullcontext())
    assert "wrap_with_set_grad_enabled" in _ops(model, x)


class _Keeps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kept: Tensor | None = None

    def forward(self, *given: torch.Tensor) -> torch.Tensor:
        self.kept = 2 * given[0]
        return self.kept + 1


def test_what_a_model_keeps_in_its_attributes_is_no_error() -> None:
    """Also where warnings are errors: torch warns about it, and puts back what was there."""
    model = _Keeps()
    exported = export_graph.run_export(model, {"x": torch.ones(2, 3)}, export_graph._Masks([]), {"x": {0: Dim.DYNAMIC}})
    assert torch.equal(exported.module()(torch.ones(4, 3)), torch.full((4, 3), 3.0))
    assert model.kept is None
