"""Pieces of prompts that come again, captured as CUDA graphs: a launch for each op of a short piece takes the host
longer than the GPU needs.

A piece comes again if all but its tokens is the same: how many places for tokens there are, and the position of the
first. The first time it runs node by node; the second time it does so again, in the form in which it is then captured,
for the ranks to compare what they do and for its kernels to be loaded; from the third time on it is replayed. Captured
pieces share memory, as one is replayed at a time. There are `MOST` at most: another one takes the place of the rarest
when it has come more often, so that a long prompt in many pieces does not push out, one by one, those that it comes
back to.

Only what never asks the host while it runs is captured (`asks_host`), unknown ops are taken to ask. A capture runs the
same collectives in the same order as the ops one by one, so ranks may differ in what they have captured; which form a
piece has, whole or in turns, follows from what has come before alone, and that is the same on all ranks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from runtime.ops.cached_attention import cached_attention, last_token
from runtime.ops.collectives import all_gather, all_reduce
from runtime.ops.embedding import vocab_parallel_embedding
from runtime.ops.expert_exchange import localise_experts
from runtime.ops.experts import expert_combine, expert_dispatch, grouped_linear, multiplies_at_once
from runtime.ops.state.latent_attention import latent_attention
from runtime.program.rank_program import RankProgram

__all__ = ["CapturedPieces", "Made", "Runnable", "asks_host"]

_log = logging.getLogger("partitioner")
MOST, MOST_REMEMBERED = 32, 256
"""Pieces that are captured at a time, and of how many it is known how often they have come."""
_OURS = frozenset({all_gather, all_reduce, cached_attention, last_token, latent_attention, vocab_parallel_embedding})
_OF_EXPERTS = frozenset({expert_combine, expert_dispatch, grouped_linear, localise_experts})
"""Of ours too, where torch multiplies the rows of all experts at once, however many each has (`grouped_linear`): in
bfloat16, of widths in whole units of 16 bytes."""
_ASKING = frozenset(
    {"bincount", "index", "index_put", "item", "masked_select", "nonzero", "repeat_interleave", "tolist", "unique"}
)
"""Ops of torch that may wait for the GPU, by what they are given."""


def asks_host(program: RankProgram, device: torch.device) -> bool:
    """Whether an op of the program may do what depends on the numbers that the GPU has, or is not known not to."""
    stacks = [weight for weight in program.weights if len(weight.local_shape) == 3]
    at_once = multiplies_at_once(device) and all(
        w.dtype == torch.bfloat16 and all(size % 8 == 0 for size in w.local_shape[1:]) for w in stacks
    )
    ours = _OURS | _OF_EXPERTS if at_once else _OURS
    for node in program.graph.nodes:
        if node.op == "call_method":
            asks = str(node.target) in _ASKING
        elif node.op == "call_function":
            name, module = getattr(node.target, "__name__", ""), str(getattr(node.target, "__module__", None))
            of_torch = module == "None" or module.partition(".")[0] in ("torch", "_operator", "math")
            asks = name.partition(".")[0] in _ASKING if of_torch else node.target not in ours
        else:
            asks = node.op == "call_module"
        if asks:
            return True
    return False


Made = Tensor | tuple[Tensor, ...]
"""Logits, or what a stage hands on."""


@dataclass
class Runnable:
    """A piece ready to run. varying: what its tokens are read from; all else that it reads is the same whenever it
    comes.

    begin: tells the cache of it. run: with what others are told of it, and compared. bare: without.
    """

    varying: Sequence[Tensor]
    begin: Callable[[], object]
    run: Callable[[], Made]
    bare: Callable[[], Made]


@dataclass
class _Captured:
    place: Hashable
    piece: Runnable
    graph: Any
    result: Made


class CapturedPieces:
    """Those of one rank over one cache. capture: yields a graph of what it is given, and what that yields."""

    def __init__(self, capture: Callable[[Callable[[], Made]], tuple[Any, Made]]) -> None:
        self._captured_as = capture
        self._captured: dict[Hashable, _Captured] = {}
        self._came: dict[Hashable, int] = {}
        """How often, lately."""
        self._chosen: dict[Hashable, None] = {}
        """Those that are captured when they come, in an order that all ranks have, as they have `_came`."""
        self._gave_up = False

    def __call__(
        self,
        key: Hashable,
        *,
        place: Hashable,
        first: Callable[[], Runnable],
        again: Callable[[], Runnable],
        varying: Callable[[], Sequence[Tensor]],
    ) -> Any:
        """What the piece yields. key: equal for those that differ in their tokens only, and the same on all ranks.

        place: where the memory is that it uses besides. first: how it runs as long as it is not captured. again: later.
        varying: its tokens, as `again` has them.
        """
        if not self._comes_often(key):
            return first().run()
        known = self._captured.get(key)
        if known is not None and known.place == place:
            known.piece.begin()
            for held, new in zip(known.piece.varying, varying(), strict=True):
                held.copy_(new)
            known.graph.replay()
            result = known.result
            return tuple(each.clone() for each in result) if isinstance(result, tuple) else result.clone()
        piece = again()
        result = piece.run()
        if not self._gave_up:
            self._capture(key, place, piece)
        return result

    def _comes_often(self, key: Hashable) -> bool:
        """Whether it is one of those that are to be captured; counts that it has come."""
        came = self._came[key] = self._came.get(key, 0) + 1
        if len(self._came) > MOST_REMEMBERED:  # what came long ago counts for less and less
            halved = ((each, count // 2) for each, count in self._came.items())
            self._came = {each: count for each, count in halved if count or each in self._chosen}
        if key in self._chosen or came < 2:
            return key in self._chosen
        if len(self._chosen) >= MOST:
            rarest = min(self._chosen, key=lambda each: self._came.get(each, 0))
            if came <= self._came.get(rarest, 0) + 1:
                return False
            del self._chosen[rarest]
            self._forget(rarest)
        self._chosen[key] = None
        return True

    def _capture(self, key: Hashable, place: Hashable, piece: Runnable) -> None:
        self._forget(key)
        try:
            with torch.no_grad():
                graph, found = self._captured_as(piece.bare)
        except RuntimeError as error:  # no memory, say: the piece has run, and others will
            self._gave_up = True
            _log.warning("pieces of prompts run node by node: %s", str(error).partition("\n")[0])
            return
        self._captured[key] = _Captured(place, piece, graph, found)

    def _forget(self, key: Hashable) -> None:
        known = self._captured.pop(key, None)
        if known is not None:
            known.graph.reset()

    def release(self) -> None:
        """Gives their memory back; which came often is still known."""
        for key in list(self._captured):
            self._forget(key)
