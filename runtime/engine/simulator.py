"""All ranks of a program in this process: one engine and one thread per rank, meeting in a ThreadGroup.

The simulator is not a second interpreter: the engines, graphs and weights are those of a real run.
"""

from __future__ import annotations

import contextlib
import functools
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from torch import Tensor

from partitioner.errors import CommunicationError, InputError
from runtime.communication.thread_communicator import ThreadGroup
from runtime.engine.engine import Engine
from runtime.execution.chrome_trace import Trace
from runtime.processes.capacity import require_threads
from runtime.program.rank_program import Entry, RankProgram
from runtime.program.shards import WeightSource
from runtime.weights.read_shards import Reader

__all__ = ["Simulator"]

T = TypeVar("T")


class Simulator:
    """Loads every rank once; each call runs all of them and returns their results in order of rank.

    `entries(entry, rank)` makes a rank's programs for continuing sequences, when they are first asked for.
    """

    def __init__(
        self,
        programs: Sequence[RankProgram],
        *,
        entries: Callable[[Entry, int], RankProgram] | None = None,
        weights: WeightSource | None = None,
        timeout_s: float = 60.0,
    ) -> None:
        require_threads(len(programs), weights_bytes=_copied(programs, weights))
        self._busy = threading.Lock()
        self._thread_group = ThreadGroup(programs[0].mesh, timeout_s=timeout_s)
        self.engines = [
            Engine(
                program,
                self._thread_group.communicator(program.rank),
                weights=weights,
                entries=None if entries is None else functools.partial(_at, entries, program.rank),
            )
            for program in programs
        ]

    def __call__(self, **inputs: Tensor | bool | None) -> list[Any]:
        return self.run(lambda engine: engine(**inputs))

    def run(self, work: Callable[[Engine], T]) -> list[T]:
        """What `work` returns on each rank, all of them at once."""
        with self._alone():
            return self._run(work)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """The ranks have one rendezvous and one cache each: what runs on them runs by itself."""
        if not self._busy.acquire(blocking=False):
            raise CommunicationError(
                "these ranks are in the middle of something: read an unfinished stream to its end, or close() it, first"
            )
        try:
            yield
        finally:
            self._busy.release()

    @contextlib.contextmanager
    def profile(self, *, by_node: bool = True) -> Iterator[Trace]:
        """Records what all ranks do in the block; see `Engine.profile`."""
        with self._alone():
            for engine in self.engines:
                engine.profiler.start(by_node=by_node)
        trace = Trace()
        try:
            yield trace
        finally:
            recorded = [engine.profiler.stop() for engine in self.engines]
        trace.complete(recorded)

    def _run(self, work: Callable[[Engine], T]) -> list[T]:
        self._thread_group.reset()
        results: list[Any] = [None] * len(self.engines)
        errors: list[tuple[int, BaseException]] = []

        def run(rank: int) -> None:
            try:
                results[rank] = work(self.engines[rank])
            except BaseException as error:
                errors.append((rank, error))
                self._thread_group.abort(rank, error)
            finally:
                self._thread_group.end(rank)

        threads = [threading.Thread(target=run, args=(rank,), name=f"rank {rank}") for rank in range(len(results))]
        begun = []
        try:
            for thread in threads:
                thread.start()
                begun.append(thread)
        except RuntimeError as error:  # the system has no more threads: those that there are would wait for the rest
            refused = InputError(f"no more than {len(begun)} of {len(threads)} threads can be started: {error}")
            self._thread_group.abort(len(begun), refused)
            raise refused from error
        finally:
            for thread in begun:
                thread.join()
        if errors:
            raise _cause(errors)
        return results

    def stream(self, work: Callable[[Engine], Iterator[T]]) -> Iterator[T]:
        """What `work` yields on rank 0, while all ranks run it; a consumer that stops early stops them all."""
        with self._alone():
            yield from self._stream(work)

    def _stream(self, work: Callable[[Engine], Iterator[T]]) -> Iterator[T]:
        said: queue.Queue[tuple[str, Any]] = queue.Queue()

        def follow(engine: Engine) -> None:
            for item in work(engine):
                if engine.program.rank == 0:
                    said.put(("item", item))

        def run() -> None:
            try:
                self._run(follow)
                said.put(("end", None))
            except BaseException as error:
                said.put(("error", error))

        thread = threading.Thread(target=run, name="ranks")
        thread.start()
        try:
            while True:
                kind, item = said.get()
                if kind == "error":
                    raise item
                if kind == "end":
                    return
                yield item
        finally:
            self._thread_group.abort(0, CommunicationError("nobody reads the stream any more"))
            thread.join()


def _copied(programs: Sequence[RankProgram], weights: WeightSource | None) -> int:
    """How many bytes of weights are made for these ranks, beside those that are there already."""
    total = 0
    for program in programs:
        source = program.source if weights is None else weights
        if isinstance(source, Reader) and source.mapped:
            continue
        is_shared = not callable(source) and not isinstance(source, Reader)
        total += sum(weight.bytes for weight in program.weights if not (is_shared and weight.is_whole))
    return total


def _at(entries: Callable[[Entry, int], RankProgram], rank: int, entry: Entry) -> RankProgram:
    return entries(entry, rank)


def _cause(errors: list[tuple[int, BaseException]]) -> BaseException:
    """The failure that the others follow from: a rank's own error rather than what the ranks waiting for it met."""
    own = [pair for pair in errors if not isinstance(pair[1], CommunicationError)]
    return min(own or errors, key=lambda pair: pair[0])[1]
