"""The vocabulary head whose rows all stages share out, on one rank.

    head(values, sizes, made)    values: inputs of the run; made: what the last stage yields, None on the others
                                 -> logits of the rank's own rows, or all of them where its graph gathers them

What the last stage has is sent to all by a sum to which the others bring zeros. Every stage calls it for the same
pieces in the same order (`runtime.pipeline.schedule.Head`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from runtime.communication.communicator import Communicator
from runtime.execution.executable import Executable
from runtime.execution.profile import Profiler
from runtime.pipeline.links import shape_of
from runtime.program.rank_program import RankProgram

__all__ = ["HeadOfAll"]


class HeadOfAll:
    """See the module's docstring."""

    def __init__(
        self,
        program: RankProgram,
        weights: Sequence[Tensor],
        communicator: Communicator,
        device: torch.device,
        profiler: Profiler,
    ) -> None:
        own, head = program.of_head, program.shared_head
        assert own is not None
        assert head is not None
        self._executable = Executable(own, weights, communicator, device, profiler=profiler)
        self._receives, self._communicator, self._device = head.receives, communicator, device
        self._channels = [
            profiler.watched_transfers(communicator.channel("pp", node=crossing.name)) for crossing in head.receives
        ]
        self._seen: set[tuple[tuple[int, ...], ...]] = set()

    @classmethod
    def of(
        cls,
        program: RankProgram,
        weights: Sequence[Tensor],
        communicator: Communicator,
        device: torch.device,
        profiler: Profiler,
    ) -> HeadOfAll | None:
        """None where the last stage has the head, or there is one stage."""
        return None if program.shared_head is None else cls(program, weights, communicator, device, profiler)

    @property
    def takes_last_tokens(self) -> bool:
        """Whether what it receives is of each sequence's last token only."""
        return all("sequence" not in crossing.shape for crossing in self._receives)

    def __call__(self, values: Sequence[Tensor], sizes: Mapping[str, int], made: Sequence[Tensor] | None) -> Any:
        mesh, rank = self._communicator.mesh, self._communicator.rank
        shapes = tuple(tuple(shape_of(crossing, sizes, mesh, rank)) for crossing in self._receives)
        self._communicator.begin_run(new_shapes=shapes not in self._seen)
        if made is None:
            pairs = zip(shapes, self._receives, strict=True)
            made = [torch.zeros(shape, dtype=each.dtype, device=self._device) for shape, each in pairs]
        received = [c.all_reduce(value.contiguous()) for c, value in zip(self._channels, made, strict=True)]
        self._seen.add(shapes)
        return self._executable([*values, *received])

    def step(self, values: Sequence[Tensor], made: Sequence[Tensor]) -> Any:
        """The same from fixed memory, bare, as it can be captured. made: zeros on stages but the last."""
        with torch.no_grad():
            return self._executable.function(
                *values, *(c.all_reduce(v) for c, v in zip(self._channels, made, strict=True))
            )
