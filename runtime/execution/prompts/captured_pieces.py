"""Pieces of prompts that come again, captured as CUDA graphs: a launch for each op of a short piece takes the host
longer than the GPU needs.

A piece comes again if all but its tokens is the same: how many there are, and the position of the first. So what is
most often captured are first pieces. The first time it runs node by node; the second time it does so again, in the form
in which it is then captured, for the ranks to compare what they do and for its kernels to be loaded; from the third
time on it is replayed. Captured pieces share memory, as one is replayed at a time.

Only what never asks the host while it runs is captured (`asks_host`), unknown ops are taken to ask. A capture runs the
same collectives in the same order as the ops one by one, so ranks may differ in what they have captured.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from runtime.ops.cached_attention import cached_attention, last_token
from runtime.ops.collectives import all_gather, all_reduce
from runtime.ops.embedding import vocab_parallel_embedding
from runtime.program.rank_program import RankProgram

__all__ = ["CapturedPieces", "Runnable", "asks_host"]

_log = logging.getLogger("partitioner")
MOST, MOST_REMEMBERED = 8, 256
"""Pieces that are captured at a time, and that are known to have come once."""
_OURS = frozenset({all_gather, all_reduce, cached_attention, last_token, vocab_parallel_embedding})
_ASKING = frozenset(
    {"bincount", "index", "index_put", "item", "masked_select", "nonzero", "repeat_interleave", "tolist", "unique"}
)
"""Ops of torch that may wait for the GPU, by what they are given."""


def asks_host(program: RankProgram) -> bool:
    """Whether an op of the program may do what depends on the numbers that the GPU has, or is not known not to."""
    for node in program.graph.nodes:
        if node.op == "call_method":
            asks = str(node.target) in _ASKING
        elif node.op == "call_function":
            name, module = getattr(node.target, "__name__", ""), str(getattr(node.target, "__module__", None))
            of_torch = module == "None" or module.partition(".")[0] in ("torch", "_operator", "math")
            asks = name.partition(".")[0] in _ASKING if of_torch else node.target not in _OURS
        else:
            asks = node.op == "call_module"
        if asks:
            return True
    return False


@dataclass
class Runnable:
    """A piece ready to run. ids: what its tokens are read from; all else that it reads is the same whenever it comes.

    begin: tells the cache of it. run: with what others are told of it, and compared. bare: without.
    """

    ids: Sequence[Tensor]
    begin: Callable[[], object]
    run: Callable[[], Tensor]
    bare: Callable[[], Tensor]


@dataclass
class _Captured:
    piece: Runnable
    graph: Any
    result: Tensor


class CapturedPieces:
    """Those of one rank over one cache. capture: yields a graph of what it is given, and what that yields."""

    def __init__(self, capture: Callable[[Callable[[], Tensor]], tuple[Any, Tensor]]) -> None:
        self._captured_as = capture
        self._captured: OrderedDict[Hashable, _Captured] = OrderedDict()
        """The one that came last at the end."""
        self._seen: OrderedDict[Hashable, None] = OrderedDict()
        self._gave_up = False

    def __call__(
        self,
        key: Hashable,
        *,
        first: Callable[[], Runnable],
        again: Callable[[], Runnable],
        ids: Callable[[], Sequence[Tensor]],
    ) -> Tensor:
        """What the piece yields. key: equal for those that differ in their tokens only.

        first: how it runs when it comes for the first time. again: later. ids: its tokens, as `again` has them.
        """
        known = self._captured.get(key)
        if known is not None:
            self._captured.move_to_end(key)
            known.piece.begin()
            for held, new in zip(known.piece.ids, ids(), strict=True):
                held.copy_(new)
            known.graph.replay()
            return known.result.clone()
        piece = again() if key in self._seen else first()
        result = piece.run()
        if key in self._seen and not self._gave_up:
            self._capture(key, piece)
        self._seen[key] = None
        self._seen.move_to_end(key)
        if len(self._seen) > MOST_REMEMBERED:
            self._seen.popitem(last=False)
        return result

    def _capture(self, key: Hashable, piece: Runnable) -> None:
        while len(self._captured) >= MOST:
            _, oldest = self._captured.popitem(last=False)
            oldest.graph.reset()
        try:
            with torch.no_grad():
                graph, found = self._captured_as(piece.bare)
        except RuntimeError as error:  # no memory, say: the piece has run, and others will
            self._gave_up = True
            _log.warning("pieces of prompts run node by node: %s", str(error).partition("\n")[0])
            return
        self._captured[key] = _Captured(piece, graph, found)

    def release(self) -> None:
        """Gives their memory back; what has come once is still known."""
        for each in self._captured.values():
            each.graph.reset()
        self._captured.clear()
