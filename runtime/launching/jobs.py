"""A call of a user, as jobs: the rows of one request that one replica continues, and what has come of them.

    call = Call(request)                 rows not dealt yet
    Job(call, rows)                      some of them; `take(step)` as the replica tells it
    call.result()                        as `generate` returns it, once all jobs are over; raises what a job met
    call.steps()                         a step of all rows at a time
    call.futures                         one per row: its new tokens
    call.come(n)                         the steps from the n-th on that are there; does not wait

A replica's jobs that fail raise; those of others go on to their end.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

from torch import Tensor

from runtime.engine.replicas import merged
from runtime.generation.generation_request import Generated, GenerationRequest, Step
from runtime.launching.line import Message
from runtime.launching.request_data import request_data

__all__ = ["Call", "Job"]

_AHEAD = 32
"""Steps that a replica may go without hearing whether somebody still wants them."""


class Call:
    """See the module's docstring.

    heard: called after every change, by the thread that watches over the replicas: it must not wait, nor raise.
    """

    def __init__(self, request: GenerationRequest, *, heard: Callable[[], None] | None = None) -> None:
        self.request, self._heard = request, heard
        self.jobs: list[Job] = []
        self.changed = threading.Condition()
        self.futures: list[Future[list[int]]] = [Future() for _ in request.prompts]

    def result(self) -> Tensor | Generated:
        with self.changed:
            self.changed.wait_for(lambda: all(job.is_over for job in self.jobs))
        self._raise_failure()
        dealt = [job.rows for job in self.jobs]
        return self.request.result(merged([job.steps for job in self.jobs], dealt))

    def steps(self) -> Iterator[Step]:
        for number in itertools.count():
            step = self._step(number)
            if step is None:
                return
            yield step

    def _step(self, number: int) -> Step | None:
        """Once every job has it, or has ended before; None: all have."""
        with self.changed:
            self.changed.wait_for(lambda: all(job.is_over or len(job.steps) > number for job in self.jobs))
            if any(job.failure is not None and len(job.steps) <= number for job in self.jobs):
                # the others' rows come to their end
                self.changed.wait_for(lambda: all(job.is_over for job in self.jobs))
                self._raise_failure()
            found = merged([job.steps[number : number + 1] for job in self.jobs], [job.rows for job in self.jobs])
        return found[0] if found else None

    def come(self, start: int) -> list[Step]:
        """Of all rows, as far as every job has them; raises what a job met once all before it have been taken."""
        with self.changed:
            count = min((len(job.steps) for job in self.jobs if not job.is_over), default=None)
            steps = [job.steps[start:count] for job in self.jobs]
            found = merged(steps, [job.rows for job in self.jobs])
            if not found and self.is_over:
                self._raise_failure()
        return found

    @property
    def is_over(self) -> bool:
        """Whether all that will come is there."""
        return bool(self.jobs) and all(job.is_over for job in self.jobs)

    def tell(self) -> None:
        """Something has changed."""
        with self.changed:
            self.changed.notify_all()
        if self._heard is not None:
            self._heard()

    def leave(self) -> None:
        """Nobody wants what is still to come."""
        with self.changed:
            for job in self.jobs:
                job.is_wanted = False

    def _raise_failure(self) -> None:
        for job in self.jobs:
            if job.failure is not None:
                raise job.failure


class Job:
    """See the module's docstring. Its replica's thread alone changes it, but for `is_wanted`."""

    kind = "generate"

    def __init__(self, call: Call, rows: list[int]) -> None:
        self.call, self.rows = call, rows
        self.request = call.request.of_rows(rows)
        self.steps: list[Step] = []
        self.failure: BaseException | None = None
        self.is_over, self.is_wanted = False, True
        self.granted = _AHEAD
        self._texts = [list(prompt) for prompt in self.request.prompts]
        self._ended = [False] * len(rows)

    @property
    def left(self) -> int:
        """Tokens that are still to be run at most: all prompts before the first step, then new ones."""
        new = self.request.settings.max_new_tokens - len(self.steps)
        rows = self._ended.count(False)
        return rows * new + (0 if self.steps else sum(map(len, self.request.prompts)))

    def said(self) -> dict[str, Any]:
        return {"request": request_data(self.request), "granted": self.granted}

    def next_grant(self) -> int | None:
        """How far the replica may go now, where that is further than before."""
        if not self.is_wanted or self.granted - len(self.steps) > _AHEAD // 2:
            return None
        self.granted = len(self.steps) + _AHEAD
        return self.granted

    def take(self, message: Message) -> None:
        """What rank 0 tells: a step."""
        scores = message["logprobs"]
        tokens: list[int | None] = []
        logprobs: list[float | None] = []
        for row, token in enumerate(message["tokens"]):
            is_on = token is not None and not self._ended[row]
            tokens.append(token if is_on else None)
            logprobs.append(scores[row] if is_on and scores is not None else None)
            if is_on:
                self._texts[row].append(token)
            if not is_on or self.call.request.has_ended(self._texts[row]):
                self._end(row)
        with self.call.changed:
            if any(token is not None for token in tokens):
                self.steps.append(Step(tuple(tokens), None if scores is None else tuple(logprobs)))
            self.is_wanted = self.is_wanted and not all(self._ended)
        self.call.tell()

    def _end(self, row: int) -> None:
        if not self._ended[row]:
            self._ended[row] = True
            self.call.futures[self.rows[row]].set_result(self._texts[row][len(self.request.prompts[row]) :])

    def end(self, failure: BaseException | None = None) -> None:
        for row in range(len(self.rows)):
            if failure is None:
                self._end(row)
            elif not self._ended[row]:
                self._ended[row] = True
                self.call.futures[self.rows[row]].set_exception(failure)
        with self.call.changed:
            self.failure, self.is_over = failure, True
        self.call.tell()
