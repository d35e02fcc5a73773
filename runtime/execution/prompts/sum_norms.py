"""Sums over the ranks with the residual and the norm behind them as one op, in a graph whose runs take turns.

    s = all_reduce(x); total = residual + s; n = rms_norm(total) * w     ->     begin .. | .. total, n = finish

A channel that can does it by rows (`Channel.sum_norm_begin`): then the total is this rank's rows, and nothing but the
residual of the next such op may read it. Where anything else reads a total, the graph stays as it is there. Whether a
channel takes a run's sizes is known when it runs: otherwise an all_reduce begins, and `added_norm` ends it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from runtime.communication.channels import Channel, OwnRows
from runtime.execution.fusion.operations import added_norm

__all__ = ["SumNorm", "begin_sum_norm", "sum_norms"]


@dataclass(frozen=True)
class SumNorm:
    """An `added_norm` of `reduce`, which nobody else reads, and of `residual`."""

    norm: fx.Node
    reduce: fx.Node
    residual: fx.Node


def sum_norms(graph: fx.Graph, reduces: Iterable[fx.Node], axes: Callable[[fx.Node], Any]) -> Iterator[SumNorm]:
    """Those of `graph` that can be one op. reduces: its all_reduces; axes: over which ranks one of them sums."""
    alone = {node for node in reduces if len(node.users) == 1}
    found: dict[Any, SumNorm] = {}
    for node in graph.nodes:
        if node.op == "call_function" and node.target is added_norm:
            for residual, reduce in (node.args[:2], node.args[1::-1]):
                if reduce in alone and isinstance(residual, fx.Node) and residual is not reduce and node not in found:
                    found[node] = SumNorm(node, reduce, residual)

    def read_by_next(each: SumNorm) -> bool:
        followers = [found.get(user) for total in _totals(each.norm) for user in total.users]
        return all(
            other is not None and other.residual in _totals(each.norm) and axes(other.reduce) == axes(each.reduce)
            for other in followers
        )

    # one that stays as it is reads its residual whole: so does not who comes before it
    while any(not read_by_next(each) for each in found.values()):
        found = {node: each for node, each in found.items() if read_by_next(each)}
    yield from found.values()


def _totals(norm: fx.Node) -> list[fx.Node]:
    return [user for user in norm.users if user.target is operator.getitem and user.args[1] == 0]


def begin_sum_norm(
    channel: Channel, residual: Tensor | OwnRows, x: Tensor, size: list[int], weight: Tensor | None, eps: float | None,
    *, scales: bool, overwrite: bool = False,
) -> Callable[[], tuple[Tensor | OwnRows, Tensor]]:  # fmt: skip
    """What it returns yields the total and the normed, as `added_norm` does, or of the total this rank's rows.

    overwrite: nobody reads x afterwards.
    """
    if eps is not None and size == list(x.shape[-1:]) and residual.shape == x.shape:
        finish = channel.sum_norm_begin(x, residual, weight, eps)
        if finish is not None:
            return finish
    handle = channel.all_reduce_begin(x, overwrite=overwrite)
    whole = residual.whole(channel) if isinstance(residual, OwnRows) else residual
    return lambda: added_norm(whole, handle.finish(), size, weight, eps, scales=scales)
