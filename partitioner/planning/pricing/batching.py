"""Requests that share an engine's steps, played through step by step: when each has its first token, and its last.

    step       tokens of all that run, and beside them tokens of prompts, `budget` in all (Sarathi, arXiv:2403.02310);
               where `mixed` is off, prompts alone, while all tokens wait (Orca, OSDI 2022, selects by iteration too)
    ahead      how many steps are made up before the one that runs has ended: who comes meanwhile waits for those too
    load       so many requests at any time: a new one is sent when one ends (a closed loop), the first all at once
    front end  one process through which requests come in, one after the other, and all tokens go out

Requests of one length end in the order in which they began, one step after the other, so that the prompts of the next
ones come one in each step: a first token then waits for `ahead` + 2 prompts however few requests there are, and where
prompts go first, all end together and wait for each other again. No formula of queues with chance arrivals gives that.
What the front end does not keep up with piles up there: a step's tokens leave after those of the steps before, and a
request has ended when its last token has left. Stretches without prompts are one addition: a run of 1,280 requests
takes some 20 ms.
"""

from __future__ import annotations

import heapq
import math
import random
from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

__all__ = ["Curve", "FrontEnd", "Load", "Scheduler", "Served", "StepSeconds", "play"]

TILE = 256
"""Rows of a product that are computed together: two tiles of 128, as kernels of large products have on Hopper."""


@dataclass(frozen=True)
class Scheduler:
    """What an engine puts into a step.

    budget: tokens of a step, in each of `replicas` that run in step. most: where it is given, a step takes prompts
    until they reach the budget, and no more tokens than this. mixed: whether tokens and prompts share steps. chunked:
    whether a prompt may be cut where a step ends. ahead: see the module's docstring. patience: for how many steps
    prompts wait until those that wait fill `full` of the budget.
    """

    budget: int = 8192
    most: int | None = None
    mixed: bool = True
    chunked: bool = True
    ahead: int = 1
    patience: int = 0
    full: float = 0.9


@dataclass(frozen=True)
class Load:
    """waves: requests in all, over those at a time. shortest: lengths are spread evenly from this share to all of the
    asked ones. turn_s: from a request's last token to the next one's arrival.
    """

    waves: int = 10
    shortest: float = 1.0
    turn_s: float = 1e-3


@dataclass(frozen=True)
class FrontEnd:
    """token_s: to send one token. request_s: to take one request in; requests that are sent together come as far apart,
    in the mean, by chance (from a client's threads, over a network).
    """

    token_s: float = 0.0
    request_s: float = 0.0


@dataclass(frozen=True)
class Served:
    """Means over requests, in seconds. running: of all requests at a time, how many have room."""

    ttft_s: float
    tpot_s: float
    running: int


@dataclass(frozen=True)
class Curve:
    """Linear between its points, and beyond its ends as between the two next to them."""

    xs: Sequence[float]
    ys: Sequence[float]

    def at(self, x: float) -> float:
        if len(self.xs) == 1:
            return self.ys[0]
        i = min(max(bisect_left(self.xs, x), 1), len(self.xs) - 1)
        left, right = self.xs[i - 1], self.xs[i]
        return self.ys[i - 1] + (self.ys[i] - self.ys[i - 1]) * (x - left) / (right - left)


@dataclass(frozen=True)
class StepSeconds:
    """By how many run, or tokens of prompts. decode: without a past. past: what a thousand tokens in each cache add.
    drain: from the end of a prompt's step to its first token, where stages follow each other. launch: what the host
    needs at least to launch a step with prompts, which is not captured. kernels: of a step with prompts, one by one.
    """

    decode: Curve
    past: Curve
    prompt: Curve
    drain: float = 0.0
    launch: float = 0.0
    kernels: int = 0

    def tokens(self, running: int, past: float) -> float:
        """A step of tokens alone. past: the mean of their caches."""
        return self.decode.at(running) + self.past.at(running) * past / 1000

    def prompts(self, tokens: float) -> float:
        """A step of prompts alone."""
        return max(self.prompt.at(tokens), self.launch)

    def mixed(self, tokens: float, running: int, past: float) -> float:
        """Both: weights are read once; tokens add their attention, and their rows, which come in tiles."""
        if not running:
            return self.prompts(tokens)
        rows = -(-(tokens + running) // TILE) * TILE
        return max(self.prompt.at(rows) + self.past.at(running) * past / 1000, self.launch)

    def at_speed(self, efficiency: float, launch: float) -> StepSeconds:
        """efficiency: of kernels, over that of the tables."""
        decode, past, prompt = (
            Curve(each.xs, [y / efficiency for y in each.ys]) for each in (self.decode, self.past, self.prompt)
        )
        return replace(self, decode=decode, past=past, prompt=prompt, drain=self.drain / efficiency, launch=launch)


@dataclass
class _Request:
    sent: float
    arrival: float
    prompt: int
    new: int
    left: int
    first: float = 0.0


def play(
    seconds: StepSeconds, prompt: int, new: int, requests: int, slots: int, *, scheduler: Scheduler, load: Load,
    front_end: FrontEnd | None = None,
) -> Served:  # fmt: skip
    """requests: at a time. slots: how many of them have room in the cache. front_end: None: one that takes no time."""
    front_end = FrontEnd() if front_end is None else front_end
    return _Engine(seconds, prompt, new, requests, slots, scheduler, load, front_end).run()


class _Engine:
    def __init__(
        self, seconds: StepSeconds, prompt: int, new: int, requests: int, slots: int, scheduler: Scheduler, load: Load,
        front_end: FrontEnd,
    ) -> None:  # fmt: skip
        self.seconds, self.prompt, self.new, self.slots = seconds, prompt, new, max(1, slots)
        self.scheduler, self.load, self.front_end, self.at_a_time = scheduler, load, front_end, requests
        self.draw, self.apart = random.Random(0), random.Random(1)
        self.unsent = max(1, load.waves) * requests
        self.waiting: deque[_Request] = deque()
        self.begun: deque[_Request] = deque()
        self.now = self.before = 0.0
        self.taken_in = self.sent_out = 0.0
        self.step = self.running = self.held = 0
        self.past = 0.0
        self.ends: list[tuple[int, int, _Request]] = []
        self.ttft = self.tpot = 0.0
        self.done = self.timed = self.number = 0

    def run(self) -> Served:
        for _ in range(self.at_a_time):
            self.send(0.0)
        while self.waiting or self.begun or self.running:
            if not self.running and not self.begun and self.waiting[0].arrival > self.now:
                self.now = self.before = self.waiting[0].arrival  # idle: nothing is ahead
            taken, finished = self.choose()
            if taken:
                self.prompts(taken, finished)
            else:
                self.tokens()
        return Served(self.ttft / self.done, self.tpot / max(1, self.timed), min(self.slots, self.at_a_time))

    def send(self, sent: float) -> None:
        if self.unsent:
            self.unsent -= 1
            if takes := self.front_end.request_s:
                sent += self.apart.expovariate(1 / takes)
            self.taken_in = max(self.taken_in, sent) + takes
            share = 1.0 if self.load.shortest == 1.0 else self.draw.uniform(self.load.shortest, 1.0)
            other = 1.0 if self.load.shortest == 1.0 else self.draw.uniform(self.load.shortest, 1.0)
            prompt, new = max(1, round(self.prompt * share)), max(1, round(self.new * other))
            self.waiting.append(_Request(sent, self.taken_in, prompt, new, prompt))

    def choose(self) -> tuple[int, list[_Request]]:
        """Tokens of prompts of the next step, and the requests whose prompts end in it."""
        rule = self.scheduler
        made_up = self.before if rule.ahead and self.running + len(self.begun) else self.now
        beside = self.running if rule.mixed else 0
        enough, room = rule.budget - beside, (rule.most or rule.budget) - beside
        free = self.slots - self.running - len(self.begun)
        left = sum(each.left for each in self.begun)
        while self.waiting and free > 0 and self.waiting[0].arrival <= made_up:
            if not self._enough(made_up):
                break
            self.begun.append(self.waiting.popleft())
            free -= 1
            left += self.begun[-1].left
            if left >= enough:
                break
        taken, finished = 0, []
        while self.begun:
            request = self.begun[0]
            if request.left > room - taken and not rule.chunked and taken:
                break
            size = min(request.left, max(1, room - taken)) if rule.chunked else request.left
            request.left -= size
            taken += size
            if request.left:
                break
            finished.append(self.begun.popleft())
            if taken >= enough:
                break
        self.held = 0 if taken else self.held + bool(self.waiting)
        return taken, finished

    def _enough(self, made_up: float) -> bool:
        rule = self.scheduler
        if not rule.patience or self.begun or not self.running or self.held >= rule.patience:
            return True
        come = sum(each.prompt for each in self.waiting if each.arrival <= made_up)
        return come >= rule.full * rule.budget

    def prompts(self, taken: int, finished: list[_Request]) -> None:
        if self.scheduler.mixed:
            mean = self.past / self.running if self.running else 0.0
            took = self.seconds.mixed(taken, self.running, mean)
        else:
            took = self.seconds.prompts(taken)
        writing = self.running if self.scheduler.mixed else 0
        self._advance(took, 1 if self.scheduler.mixed else 0, writing + len(finished))
        for request in finished:
            request.first = max(self.now, self.sent_out) + self.seconds.drain
            self.ttft += request.first - request.sent
            self.done += 1
            self.running += 1
            self.past += request.prompt + 1
            self.number += 1
            heapq.heappush(self.ends, (self.step + request.new - 1, self.number, request))
        self._finish()

    def tokens(self) -> None:
        """Steps of tokens alone: up to the next end, or one where a request may come into the next step."""
        steps = max(1, self.ends[0][0] - self.step)
        mean = self.past / self.running
        one = self.seconds.tokens(self.running, mean)
        if self.waiting and self.running < self.slots:
            until = (self.waiting[0].arrival - self.now) / one
            steps = min(steps, max(1, math.floor(until)))
        took = self.seconds.tokens(self.running, mean + (steps - 1) / 2)
        self._advance(took, steps, self.running)
        self._finish()

    def _advance(self, took: float, steps: int, tokens: int) -> None:
        """took: seconds of each of `steps` steps of tokens, or of a step of prompts alone (0). tokens: of each step."""
        # of equal steps the tokens of the last leave behind those of all before, or as soon as they are there
        leave, times = tokens * self.front_end.token_s, max(steps, 1)
        first, last = self.now + took, self.now + took * times
        self.sent_out = max(max(self.sent_out, first) + leave * times, last + leave)
        self.before = self.now + took * (max(steps, 1) - 1)
        self.now += took * max(steps, 1)
        self.step += steps
        self.past += steps * self.running

    def _finish(self) -> None:
        while self.ends and self.ends[0][0] <= self.step:
            _, _, request = heapq.heappop(self.ends)
            self.running -= 1
            self.past = max(0.0, self.past - request.prompt - request.new)
            ended = max(self.now, self.sent_out)
            if request.new > 1:
                self.tpot += max(0.0, ended - request.first) / (request.new - 1)
                self.timed += 1
            self.send(ended + self.load.turn_s)
