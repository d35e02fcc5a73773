"""Nodes know the line of the model's code that they came from, as torch's own stacks tell it."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch.utils import _traceback

from partitioner.capture.trace import export_graph
from partitioner.compile.tracing.trace import trace
from tests.support import zoo


def test_lines_are_those_that_torch_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = zoo.tiny("llama", num_hidden_layers=1)
    own = [(node.name, node.meta.get("source")) for node in trace(model).graph.nodes]
    monkeypatch.setattr(export_graph, "innermost_lines", contextlib.nullcontext)
    assert own == [(node.name, node.meta.get("source")) for node in trace(model).graph.nodes]
    assert sum(source is not None and source.startswith("modeling_llama.py:") for _, source in own) > 20


def test_no_stacks_of_nodes_are_kept_meanwhile_and_torch_has_its_own_back(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []
    symbolize = torch._C._profiler.symbolize_tracebacks
    monkeypatch.setattr(
        torch._C._profiler, "symbolize_tracebacks", lambda stacks: kept.append(len(stacks)) or symbolize(stacks)
    )
    model, _ = zoo.tiny("gpt2", num_hidden_layers=1)
    nodes = len(trace(model).graph.nodes)
    assert sum(kept) < 5  # of the inputs
    assert torch.fx.proxy.CapturedTraceback is _traceback.CapturedTraceback  # type: ignore[attr-defined]
    monkeypatch.setattr(export_graph, "innermost_lines", contextlib.nullcontext)
    trace(model)
    assert sum(kept) > nodes / 2
