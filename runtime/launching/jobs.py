"""A call of a user, as jobs: the rows of one request, each of which a replica continues, and what has come of them.

    call = Call(request)                 rows not dealt yet
    Job(call, row)                       one of them; `take(token, ..)` as its replica tells it
    call.result()                        as `generate` returns it, once all jobs are over; raises what a job met
    call.steps()                         a step of all rows at a time
    call.futures                         one per row: its new tokens
    call.come(n)                         the steps from the n-th on that are there; does not wait

A replica's jobs that fail raise; those of others go on to their end.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from typing import Any

from torch import Tensor

from runtime.engine.replicas import merged
from runtime.generation.generation_request import Generated, GenerationRequest, Step
from runtime.launching.request_data import request_data

__all__ = ["Call", "Job"]


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
    """See the module's docstring. The supervisor's thread alone changes it, but for `is_wanted`."""

    def __init__(self, call: Call, row: int) -> None:
        self.call, self.row = call, row
        self.request = call.request.of_rows([row])
        self.steps: list[Step] = []
        self.failure: BaseException | None = None
        self.is_over, self.is_wanted = False, True
        self._text = list(self.request.prompts[0])

    @property
    def rows(self) -> list[int]:
        return [self.row]

    @property
    def future(self) -> Future[list[int]]:
        return self.call.futures[self.row]

    @property
    def left(self) -> int:
        """Tokens that are still to be run at most: the prompt before the first step, then new ones."""
        if self.is_over or not self.is_wanted:
            return 0
        new = self.request.settings.max_new_tokens - len(self.steps)
        return new + (0 if self.steps else len(self.request.prompts[0]))

    def said(self) -> dict[str, Any]:
        return {"request": request_data(self.request)}

    def take(self, token: int, logprob: float | None, top: Sequence[Sequence[Any]] | None = None) -> None:
        """The next token, as rank 0 tells it. What comes after a stop string does not count."""
        if self.is_over or not self.is_wanted:
            return
        self._text.append(token)
        with self.call.changed:
            scored = self.request.settings.logprobs
            named = None if top is None else (tuple((int(each), float(value)) for each, value in top),)
            self.steps.append(Step((token,), (logprob,) if scored else None, named))
        self.call.tell()
        if self.call.request.has_ended(self._text):
            self.end()

    def end(self, failure: BaseException | None = None) -> None:
        if self.is_over:
            return
        future = self.future
        with self.call.changed:
            self.failure, self.is_over, self.is_wanted = failure, True, False
        self.call.tell()
        with contextlib.suppress(InvalidStateError):  # who waits for it has cancelled it
            if failure is None:
                future.set_result(self._text[len(self.request.prompts[0]) :])
            else:
                future.set_exception(failure)
