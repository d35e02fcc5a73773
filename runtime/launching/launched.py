"""A model that runs on ranks of this machine, as the one process has it that started them: `partitioner.launch`.

    llm.generate(prompts, max_new_tokens=20)     as `Engine.generate`; rows go to the replica with the least to do
    llm.stream(prompts)                          a step at a time
    llm.submit(prompts)                          a future per prompt, with its new tokens
    llm.begin(prompts, heard=f)                  what will come of them, for who waits for many things at once
    llm.status()                                 how busy the replicas are

Several threads may call at once. A replica that is lost is told of by a warning; what it was doing raises RankLost,
and the others go on. `close()`, or the end of the `with` block, ends all ranks.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Unpack

from torch import Tensor

from partitioner.errors import PartitionerError
from partitioner.sharding.mesh import Mesh
from runtime.generation.generation_options import Options
from runtime.generation.generation_request import Generated, GenerationRequest, Prompts, Step
from runtime.kv_cache.cache_size import CacheSize, Room
from runtime.launching.jobs import Call
from runtime.launching.reserving import Reserving
from runtime.launching.status import ServingStatus
from runtime.launching.supervisor import Supervisor

__all__ = ["Launched"]


class Launched:
    """See the module's docstring."""

    def __init__(self, supervisor: Supervisor, *, closing: contextlib.ExitStack) -> None:
        """closing: what is to be done at the end, ending the ranks first."""
        self._supervisor = supervisor
        self._told = supervisor.replicas[0].ready[0]
        # whoever forgets to close: no rank outlives this object
        self._ending = weakref.finalize(self, closing.close)

    @property
    def mesh(self) -> Mesh:
        """The ranks of one replica."""
        return self._supervisor.replicas[0].place.mesh

    @property
    def replicas(self) -> int:
        """How many were started."""
        return len(self._supervisor.replicas)

    @property
    def lost(self) -> dict[int, PartitionerError]:
        """By its number, why a replica is lost."""
        return {each.place.replica: each.lost for each in self._supervisor.replicas if each.lost is not None}

    @property
    def pids(self) -> list[list[int]]:
        """The process of each rank, by replica."""
        return [[process.pid for process in each.processes] for each in self._supervisor.replicas]

    def generate(
        self, prompts: Prompts | None = None, *, attention_mask: Tensor | None = None, **options: Unpack[Options]
    ) -> Tensor | Generated:
        """Prompts and what follows them, in the order of the prompts; see `Engine.generate`.

        The tokens are those of one replica, whichever does a row.
        """
        call = self._call(self._request(prompts, attention_mask, options))
        try:
            return call.result()
        finally:
            self._leave(call)

    def stream(
        self, prompts: Prompts | None = None, *, attention_mask: Tensor | None = None, **options: Unpack[Options]
    ) -> Iterator[Step]:
        """The same, a step at a time, each as soon as all replicas have it."""
        return self._steps(self._request(prompts, attention_mask, options))

    def submit(
        self, prompts: Prompts | None = None, *, attention_mask: Tensor | None = None, **options: Unpack[Options]
    ) -> list[Future[list[int]]]:
        """The new tokens of each prompt, once it has ended; does not wait."""
        return self._call(self._request(prompts, attention_mask, options)).futures

    def begin(
        self,
        prompts: Prompts | None = None,
        *,
        heard: Callable[[], None],
        attention_mask: Tensor | None = None,
        **options: Unpack[Options],
    ) -> Call:
        """The steps as they come, without a thread that waits for them: `heard()` says that there is something new.

        It is called by a thread of ours, and must neither wait nor raise: `loop.call_soon_threadsafe`, for one. Then
        `call.come(n)` has the steps from the n-th on, and `leave(call)` gives up what is still to come.
        """
        return self._call(self._request(prompts, attention_mask, options), heard=heard)

    def leave(self, call: Call) -> None:
        """Nobody waits for it any more: its rows are free for others. Nothing happens where it is over."""
        self._leave(call)

    @property
    def longest(self) -> int | None:
        """Tokens of the longest text, prompt and new ones, that the model was made for; None: no limit is known."""
        longest: int | None = self._told["longest"]
        return longest

    @property
    def generation(self) -> dict[str, Any]:
        """What the model's generation config says, which is what holds where an option is not given."""
        return {**self._told["generation"], "eos_token_id": self._told["eos_token_id"]}

    def status(self) -> ServingStatus:
        """How many rows each replica continues, how full its cache is, and what it has run; does not wait for ranks."""
        return ServingStatus(tuple(replica.status() for replica in self._supervisor.replicas))

    def reserve(self, size: CacheSize) -> Room:
        """Sets the caches of all ranks aside; see `Engine.reserve`. Of several replicas, what the first has."""
        jobs = [Reserving(size) for _ in self._supervisor.replicas]
        self._supervisor.reserve(jobs)
        left = [job for job in jobs if job.found.exception() is None]
        return (left or jobs)[0].found.result()

    def close(self) -> None:
        """Ends all ranks, and returns when none of their processes is left; may be called again."""
        self._ending()

    def __enter__(self) -> Launched:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _request(self, prompts: Prompts | None, attention_mask: Tensor | None, options: Options) -> GenerationRequest:
        eos: tuple[int, ...] = tuple(self._told["eos_token_id"])
        model = self._told["generation"]
        return GenerationRequest.of(prompts, attention_mask, options, eos_token_id=eos, model=model)

    def _call(self, request: GenerationRequest, *, heard: Callable[[], None] | None = None) -> Call:
        call = Call(request, heard=heard)
        self._supervisor.submit(call)
        return call

    def _steps(self, request: GenerationRequest) -> Iterator[Step]:
        call = self._call(request)
        try:
            yield from call.steps()
        finally:
            self._leave(call)

    def _leave(self, call: Call) -> None:
        """Nobody waits for it any more: an interrupt, an error, or a stream that is closed early."""
        if not all(job.is_over for job in call.jobs):
            call.leave()
            self._supervisor.look()
