"""Requests over replicas, which are worlds of their own: who does which rows, and results in the order of the prompts.

    deal(work, replicas=2)     the rows of each replica: the longest first, to the one with the least work
    merged(steps, deal)        the steps of all rows from those of each replica's
    ReplicaResults             under torchrun: what each replica has made, told to all through the launcher's store

Nothing else couples replicas. What a row is told does not depend on the others, so the tokens are those of one replica.
"""

from __future__ import annotations

import heapq
import json
import time
from collections.abc import Sequence
from typing import Any

from torch.distributed import DistError
from torch.distributed.distributed_c10d import PrefixStore

from partitioner.errors import RankLost
from runtime.communication.process_groups import Meeting
from runtime.generation.generation_request import GenerationRequest, Step
from runtime.processes.heartbeat import Heartbeat

__all__ = ["ReplicaResults", "deal", "merged", "work_of"]

_POLL_S = 0.002
_MOST_POLL_S = 0.05


def work_of(request: GenerationRequest) -> list[int]:
    """Of each row: its prompt, and the new tokens that it may be given."""
    return [len(prompt) + request.settings.max_new_tokens for prompt in request.prompts]


def deal(work: Sequence[int], *, replicas: int, loads: Sequence[int] | None = None) -> list[list[int]]:
    """Which rows each replica does, in ascending order. loads: what they have to do already.

    The longest first, each to the replica that has least to do, the first of these where several have: Graham (1969),
    at most 4/3 of the best. The same wherever it is computed.
    """
    least = [(load, number) for number, load in enumerate(loads or [0] * replicas)]
    heapq.heapify(least)
    dealt: list[list[int]] = [[] for _ in least]
    for row in sorted(range(len(work)), key=lambda row: (-work[row], row)):
        load, number = least[0]
        dealt[number].append(row)
        heapq.heapreplace(least, (load + work[row], number))
    return [sorted(rows) for rows in dealt]


def merged(steps: Sequence[Sequence[Step]], dealt: Sequence[Sequence[int]]) -> list[Step]:
    """The steps of all rows. A row whose replica has no more steps has ended."""
    num_rows = sum(map(len, dealt))
    scored = any(step.logprobs is not None for each in steps for step in each)
    named = any(step.top is not None for each in steps for step in each)
    found = []
    for number in range(max(map(len, steps), default=0)):
        tokens: list[int | None] = [None] * num_rows
        logprobs: list[float | None] = [None] * num_rows
        tops: list[tuple[tuple[int, float], ...] | None] = [None] * num_rows
        for mine, rows in zip(steps, dealt, strict=True):
            if number < len(mine):
                step = mine[number]
                for place, row in enumerate(rows):
                    tokens[row] = step.tokens[place]
                    logprobs[row] = None if step.logprobs is None else step.logprobs[place]
                    tops[row] = None if step.top is None else step.top[place]
        found.append(Step(tuple(tokens), tuple(logprobs) if scored else None, tuple(tops) if named else None))
    return found


class ReplicaResults:
    """One process's part in telling all replicas what each has made; all take part equally often.

    A replica that is lost is named: the ranks 0 of all know of each other as the ranks of one replica do.
    """

    def __init__(self, meeting: Meeting, *, timeout_s: float) -> None:
        self.place, self._own, self._timeout_s = meeting.place, meeting.heartbeat, timeout_s
        self._store = PrefixStore(f"replicas/{meeting.number}", meeting.store)
        self._calls = 0
        self._others: Heartbeat | None = None
        if self.place.rank == 0:
            place = self.place
            self._others = Heartbeat.connect(
                self._store, place.main_host, place.replica, place.replicas, timeout_s=timeout_s, names=_names
            )

    def exchange(self, mine: Sequence[Step]) -> list[list[Step]]:
        """Every replica's steps, in their order."""
        call, self._calls = self._calls, self._calls + 1
        if self.place.rank == 0:
            told = json.dumps([[step.tokens, step.logprobs] for step in mine])
            self._store.set(f"{call}/{self.place.replica}", told)
        try:
            texts = [self._wait(f"{call}/{replica}", replica) for replica in range(self.place.replicas)]
            self._see_all_through(call)
        except DistError as error:
            raise RankLost(f"the store at which replicas tell their results is gone: {error}") from error
        return [[_step(*each) for each in json.loads(text)] for text in texts]

    def _see_all_through(self, call: int) -> None:
        """The process that may be host to the store stays until all have read it."""
        readers = self._store.add(f"{call}/read", 1)
        if self._others is None or self.place.replica:
            return
        pause_s, deadline = _POLL_S, time.monotonic() + self._timeout_s
        while readers < self.place.replicas * self.place.mesh.world_size and time.monotonic() < deadline:
            if not (self._own.is_well and self._others.is_well):
                return  # who is lost reads no more; the next call says so
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _MOST_POLL_S)
            readers = self._store.add(f"{call}/read", 0)

    def _wait(self, key: str, replica: int) -> bytes:
        pause_s = _POLL_S
        while not self._store.check([key]):
            if not self._own.is_well:
                lost = self._own.lost() or {0: "is lost"}
                raise RankLost("; ".join(f"{self.place.name(rank)} {how}" for rank, how in lost.items()))
            if self._others is not None:
                if not self._others.is_well:
                    lost = self._others.lost() or {0: "is lost"}
                    raise RankLost("; ".join(f"{_names([each])} {how}" for each, how in lost.items()))
                if replica != self.place.replica and self._others.silent_s(replica) > self._timeout_s:
                    raise RankLost(f"{_names([replica])} gave no sign of life for {self._timeout_s:g} s")
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _MOST_POLL_S)
        return self._store.get(key)

    def failed(self, error: BaseException) -> None:
        """Tells the other replicas why this one ends."""
        if self._others is not None:
            self._others.tell("failed", f"{type(error).__name__}: {error}")

    def close(self) -> None:
        if self._others is not None:
            self._others.close()
            self._others = None


def _names(replicas: Any) -> str:
    numbers = list(map(str, replicas))
    return f"{'replica' if len(numbers) == 1 else 'replicas'} {', '.join(numbers)}"


def _step(tokens: list[int | None], logprobs: list[float | None] | None) -> Step:
    return Step(tuple(tokens), None if logprobs is None else tuple(logprobs))
