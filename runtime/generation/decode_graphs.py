"""Decode steps of one shape: compiled once, or captured as a CUDA graph and replayed.

A step takes one token per sequence, [B, 1], from the same memory each time; where in its sequence a token stands is
read on the device. Where attention is a kernel that stops at each row's length, one graph serves all lengths, and what
is compiled serves any cache. Elsewhere it looks at `seen` slots, rounded up, so that a few graphs serve all lengths.
States per sequence stay in one place: a step reads and writes them there, for rows that are active.
CUDA graphs: launching a captured step costs the host microseconds instead of the launch of each of its kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from partitioner.errors import InputError
from runtime.communication.traceable import Traceable
from runtime.execution.executable import Executable, build
from runtime.kv_cache.cache import Cache
from runtime.program.rank_program import RankProgram

__all__ = ["Decoder", "GraphPool", "require_fixed_shapes"]

# a product with one row is a sum over the weights' rows, whose tiles are found by trying. By default the compiler
# computes again what several kernels use, in each of them: cosines and sines of the position in every layer, and norms
# in every row of a product
_ON_GPU: dict[str, Any] = {
    "coordinate_descent_tuning": True,
    "realize_reads_threshold": 1,
    "realize_acc_reads_threshold": 2,
}
_INPUTS = ("input_ids", "position_ids", "last", "active")
_ROUND_TO = 256
_WARM_UP = 3


def require_fixed_shapes(program: RankProgram, device: torch.device, *, cuda_graph: bool) -> None:
    """Raises InputError where steps of this program cannot be run from fixed memory."""
    if cuda_graph and device.type != "cuda":
        raise InputError(f"cuda_graph=True needs a CUDA device; this engine is on {str(device)!r}")
    others = [wanted.name for wanted in program.inputs if wanted.name not in _INPUTS]
    if others:
        raise InputError(
            "compile and cuda_graph are for models whose attention reads keys and values from a cache by itself; this "
            f"one is given the input {others[0]!r}: leave them out"
        )


class GraphPool:
    """Memory that captured steps share, of which one is replayed at a time."""

    def __init__(self) -> None:
        self._handle: Any = None

    @property
    def handle(self) -> Any:
        """What torch.cuda.graph takes."""
        if self._handle is None:
            self._handle = torch.cuda.graph_pool_handle()
        return self._handle

    def renew(self) -> None:
        """For when none of its graphs is left: torch captures nothing more into a pool that all graphs have left."""
        self._handle = None


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
        pool: GraphPool,
    ) -> None:
        self.batch, self.cache, self._pool = batch, cache, pool
        self._compiled, self._captures = compile, cuda_graph
        self._execute = execute
        self._inputs = {
            "input_ids": torch.zeros(batch, 1, dtype=torch.int64, device=device),
            "position_ids": torch.zeros(batch, 1, dtype=torch.int64, device=device),
            "last": torch.zeros(batch, dtype=torch.int64, device=device),
            "active": torch.ones(batch, dtype=torch.bool, device=device),
        }
        self._order = [wanted.name for wanted in program.inputs]
        self._function: Callable[..., Any] = execute.function
        if compile:
            traceable = build(program, Traceable(execute.communicator), device, cache)
            function = functools.partial(traceable, *execute.weights)
            options = _ON_GPU if device.type == "cuda" else None
            self._function = torch.compile(function, dynamic=False, options=options)
        self._compared = not compile
        """Whether the ranks have made sure that they are about to do the same: a compiled step does not."""
        self._graphs: dict[tuple[int, bool], tuple[Any, Tensor]] = {}
        self._choose: Callable[[Tensor], Tensor] | None = None

    def __call__(self, tokens: Sequence[int], positions: Sequence[int], active: Sequence[bool] = ()) -> Tensor:
        """The logits [B, V/n] after one more token per sequence, at its position; valid until the next call.

        active: rows whose states move on; (): all.
        """
        self._set(tokens, positions, active)
        seen = self._seen(max(positions))
        if not self._compared:
            self._compare(seen)
        return self._replayed(seen, chained=False) if self._captures else self._run(seen)

    def chain(
        self, choose: Callable[[Tensor], Tensor], tokens: Sequence[int], positions: Sequence[int], count: int
    ) -> Iterator[Tensor]:
        """What `choose` makes of the logits of each of `count` steps, on the host, where a CUDA graph is captured.

        `choose` yields [2, B] float64, the tokens first, which the next step takes without the host: a step runs
        while the host reads what the one before it has chosen.
        """
        assert self._captures
        self._choose = self._choose or choose  # whose memory the captured steps use
        self._set(tokens, positions)
        latest = max(positions)
        if not self._compared:
            self._compare(self._seen(latest))
        started: list[tuple[Tensor, torch.cuda.Event]] = []
        for step in range(count):
            said = self._replayed(self._seen(latest + step), chained=True)
            copy = torch.empty(said.shape, dtype=said.dtype, pin_memory=True)
            copy.copy_(said, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            started.append((copy, event))
            if step:
                yield _arrived(*started.pop(0))
        yield from (_arrived(*each) for each in started)

    def _set(self, tokens: Sequence[int], positions: Sequence[int], active: Sequence[bool] = ()) -> None:
        self.cache.fixed_states.settle(self.cache.buffers)
        device = self._inputs["input_ids"].device
        self._inputs["active"].copy_(torch.tensor(active or [True] * self.batch))
        both = torch.tensor([tokens, positions])
        if device.type == "cuda":
            both = both.pin_memory().to(device, non_blocking=True)
        self._inputs["input_ids"].copy_(both[0, :, None])
        self._inputs["position_ids"].copy_(both[1, :, None])

    def _seen(self, latest: int) -> int:
        """How many slots a step looks at."""
        most = self.cache.max_length
        # one compiled graph only: compiling takes far longer than looking at empty slots
        return most if self._compiled or self.cache.any_length else min(most, -(-(latest + 1) // _ROUND_TO) * _ROUND_TO)

    def _replayed(self, seen: int, *, chained: bool) -> Tensor:
        if (seen, chained) not in self._graphs:
            self._graphs[seen, chained] = self._capture(self._step if chained else self._run, seen)
        graph, result = self._graphs[seen, chained]
        graph.replay()
        return result

    def _step(self, seen: int) -> Tensor:
        """One step, and what it chooses as the input of the next."""
        assert self._choose is not None
        said = self._choose(self._run(seen))
        self._inputs["input_ids"].copy_(said[0, :, None])
        self._inputs["position_ids"].add_(1)
        return said

    def _compare(self, seen: int) -> None:
        """One step as it is, with every collective compared; the next one does it again, and writes the same."""
        self.cache.begin_fixed(self._inputs["position_ids"], seen)
        states = self.cache.fixed_states.copies()
        self._execute([self._inputs[name] for name in self._order])
        self.cache.fixed_states.restore(states)
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

    @torch.no_grad()
    def _capture(self, run: Callable[[int], Tensor], seen: int) -> tuple[Any, Tensor]:
        # a step that is run again on the same inputs and states writes what it has written: the warm-up is free of
        # effects
        before = {name: given.clone() for name, given in self._inputs.items()}
        states = self.cache.fixed_states.copies()

        def warm_up() -> None:
            run(seen)
            for name, given in before.items():
                self._inputs[name].copy_(given)
            self.cache.fixed_states.restore(states)

        self._execute.communicator.begin_run(new_shapes=True)
        warm_up()
        self._execute.communicator.begin_run(new_shapes=False)
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                warm_up()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool.handle):
            result = run(seen)
        return graph, result


def _arrived(copy: Tensor, event: torch.cuda.Event) -> Tensor:
    event.synchronize()
    return copy
