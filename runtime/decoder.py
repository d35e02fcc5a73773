"""Decode steps of one shape: compiled once, or captured as a CUDA graph and replayed.

A step takes one token per sequence, [B, 1], from the same memory each time; where in its sequence a token stands is
read on the device. Attention looks at `seen` slots, rounded up, so that a few graphs serve all lengths.
CUDA graphs: launching a captured step costs the host microseconds instead of the launch of each of its kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from partitioner.errors import InputError
from runtime.cache import Cache
from runtime.executable import Executable, build
from runtime.rank_program import RankProgram
from runtime.traceable import Traceable

__all__ = ["Decoder", "require_fixed_shapes"]

_ROUND_TO = 256
_WARM_UP = 3


def require_fixed_shapes(program: RankProgram, device: torch.device, *, cuda_graph: bool) -> None:
    """Raises InputError where steps of this program cannot be run from fixed memory."""
    if cuda_graph and device.type != "cuda":
        raise InputError(f"cuda_graph=True needs a CUDA device; this engine is on {str(device)!r}")
    of_sequences = [state.name for state in program.states if not state.per_token]
    others = [wanted.name for wanted in program.inputs if wanted.name not in ("input_ids", "position_ids", "last")]
    if of_sequences or others:
        what = f"the state {of_sequences[0]!r}" if of_sequences else f"the input {others[0]!r}"
        raise InputError(
            f"compile and cuda_graph are for models that remember keys and values only; this one has {what}: "
            "leave them out"
        )


class Decoder:
    """See the module's docstring; for `batch` sequences. `compile`: through torch.compile, with inductor."""

    def __init__(
        self,
        program: RankProgram,
        execute: Executable,
        cache: Cache,
        *,
        batch: int,
        device: torch.device,
        compile: bool,
        cuda_graph: bool,
    ) -> None:
        self.batch, self.cache = batch, cache
        self._compiled, self._captures = compile, cuda_graph
        self._execute = execute
        self._inputs = {
            "input_ids": torch.zeros(batch, 1, dtype=torch.int64, device=device),
            "position_ids": torch.zeros(batch, 1, dtype=torch.int64, device=device),
            "last": torch.zeros(batch, dtype=torch.int64, device=device),
        }
        self._order = [wanted.name for wanted in program.inputs]
        self._function: Callable[..., Any] = execute.function
        if compile:
            traceable = build(program, Traceable(execute.communicator), device, cache)
            self._function = torch.compile(functools.partial(traceable, *execute.weights), dynamic=False)
        self._compared = not compile
        """Whether the ranks have made sure that they are about to do the same: a compiled step does not."""
        self._graphs: dict[int, tuple[Any, Tensor]] = {}

    def __call__(self, tokens: Sequence[int], positions: Sequence[int]) -> Tensor:
        """The logits [B, V/n] after one more token per sequence, at its position; valid until the next call."""
        device = self._inputs["input_ids"].device
        both = torch.tensor([tokens, positions])
        if device.type == "cuda":
            both = both.pin_memory().to(device, non_blocking=True)
        self._inputs["input_ids"].copy_(both[0, :, None])
        self._inputs["position_ids"].copy_(both[1, :, None])
        # one compiled graph only: compiling takes far longer than looking at empty slots
        most = self.cache.max_length
        seen = most if self._compiled else min(most, -(-(max(positions) + 1) // _ROUND_TO) * _ROUND_TO)
        if not self._compared:
            self._compare(seen)
        if not self._captures:
            return self._run(seen)
        if seen not in self._graphs:
            self._graphs[seen] = self._capture(seen)
        graph, logits = self._graphs[seen]
        graph.replay()
        return logits

    def _compare(self, seen: int) -> None:
        """One step as it is, with every collective compared; the next one does it again, and writes the same."""
        self.cache.begin_fixed(self._inputs["position_ids"], seen)
        self._execute([self._inputs[name] for name in self._order])
        self._execute.communicator.begin_run(new_shapes=False)
        self._compared = True

    def release(self) -> None:
        """Gives the captured steps back now: an error's traceback may keep this object for long."""
        for graph, _ in self._graphs.values():
            graph.reset()
        self._graphs.clear()

    @torch.no_grad()
    def _run(self, seen: int) -> Tensor:
        self.cache.begin_fixed(self._inputs["position_ids"], seen)
        communicator = self._execute.communicator
        try:
            logits: Tensor = self._function(*(self._inputs[name] for name in self._order))
        except BaseException as error:
            reason = communicator.explained(error)
            communicator.abort(reason)
            raise reason from (None if reason is error else error)
        return logits[:, 0]

    def _capture(self, seen: int) -> tuple[Any, Tensor]:
        # a step that is run again writes what it has written: the warm-up is free of effects
        self._execute.communicator.begin_run(new_shapes=True)
        self._run(seen)
        self._execute.communicator.begin_run(new_shapes=False)
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                self._run(seen)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self._run(seen)
        return graph, logits
