"""Chains of kernels that are launched before their predecessors have ended."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Chain(Protocol):
    """waits: behind every kernel, so that none meets another."""

    def __call__(self, x: Tensor, *, waits: bool) -> Tensor: ...


def assert_replays_are_exact(run: Chain, first: Tensor) -> None:
    """A captured chain says, 300 times, what it says where each kernel is waited for."""
    exact = run(first, waits=True)
    given = first.clone()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run(given, waits=False)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = run(given, waits=False)
    for _ in range(300):
        given.copy_(first)
        graph.replay()
        assert torch.equal(made, exact)
