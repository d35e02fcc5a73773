"""What nothing here reads is left out of a trace of this thread, and of no other one."""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx import graph_module
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import masking_utils

from partitioner.capture.overheads.unread import unread_left_out
from partitioner.capture.trace import export_graph

POSITIONS = torch.tensor([[0, 1, 2, 0, 1]])


class Doubling(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + x


def test_packed_texts_are_looked_for_where_the_mask_is_written_out() -> None:
    """The control: of the same positions, with a mask whose kind is not known."""
    known = [True]
    with unread_left_out(Doubling(), lambda: known[0]):
        assert masking_utils.find_packed_sequence_indices(POSITIONS) is None
        known[0] = False
        found = masking_utils.find_packed_sequence_indices(POSITIONS)
    assert found is not None
    assert found.tolist() == [[0, 0, 0, 1, 1]]


def test_the_next_mask_is_known_by_how_many_were_asked_for() -> None:
    causal: Any = object()
    masks = export_graph._Masks([causal, None])
    told = []
    for masks.asked in range(3):
        told.append(masks.next_is_known())
    assert told == [True, False, False]


def _traced() -> fx.GraphModule:
    made: fx.GraphModule = make_fx(Doubling(), tracing_mode="symbolic")(torch.ones(3))
    return made


def test_no_memory_formats_and_no_code_until_it_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    own = graph_module._forward_from_src
    monkeypatch.setattr(
        graph_module, "_forward_from_src", lambda src, *a, **k: written.append(src) or own(src, *a, **k)
    )
    for left_out in (False, True):
        written.clear()
        with unread_left_out(Doubling(), lambda: True) if left_out else contextlib.nullcontext():
            made = _traced()
        assert [node.meta.get("tensor_meta") is None for node in made.graph.nodes if "val" in node.meta].count(
            left_out
        ) == 2
        assert bool(written) is not left_out
        assert made(torch.ones(3)).tolist() == [2, 2, 2]
        assert written


def test_other_threads_go_without_nothing() -> None:
    found: list[fx.GraphModule] = []
    with unread_left_out(Doubling(), lambda: True):
        thread = threading.Thread(target=lambda: found.append(_traced()))
        thread.start()
        thread.join()
    assert all("tensor_meta" in node.meta and node.meta["tensor_meta"] for node in found[0].graph.nodes if node.users)
