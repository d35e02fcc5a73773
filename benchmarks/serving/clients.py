"""Clients that ask one question after the other, of any side: the same loop for ours and for theirs, and what it shows.

    asked = run(side, questions, clients=64, seconds=10, say=print)
    asked.tokens_per_s        of all new tokens, those of answers included that were not complete when the time was up

It ends when all questions are answered, or the time is up; what is still asked for then is given up. It says how far it
is every 5 s, and raises `NoAnswer` where no token comes for 20 s.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

__all__ = ["Asked", "NoAnswer", "Question", "Side", "run"]

Question = tuple[list[int], int]
"""Ids of a prompt, and how many new tokens."""
SAY_S = 5.0
LONGEST_SILENCE_S = 20.0


class NoAnswer(Exception):
    """A side has failed, or says nothing any more; the text says which."""


class Side(Protocol):
    """What answers."""

    def ask(self, question: Question) -> None: ...

    def answered(self, timeout_s: float) -> int | None:
        """How many new tokens one more answer has; None: none came within the time. Raises `NoAnswer`."""
        ...

    def under_way(self) -> int:
        """New tokens so far of what is not answered yet."""
        ...

    def give_up(self) -> None:
        """Nobody wants what is not answered yet; returns when all of it is gone."""
        ...


@dataclass(frozen=True)
class Asked:
    """What has come of a round."""

    seconds: float
    new: int
    answered: int
    given_up: int

    @property
    def tokens_per_s(self) -> float:
        return self.new / self.seconds

    def __str__(self) -> str:
        rest = f", {self.given_up} given up" if self.given_up else ""
        return f"{self.answered} answered{rest}, {self.new} new tokens in {self.seconds:.1f} s"


def run(
    side: Side, questions: Iterable[Question], *, clients: int, seconds: float, say: Callable[[str], None]
) -> Asked:
    left = iter(questions)
    began = heard = said = looked = time.perf_counter()
    asked = answered = new = most = 0

    def ask() -> None:
        nonlocal asked
        for question in left:
            side.ask(question)
            asked += 1
            return

    for _ in range(clients):
        ask()
    while answered < asked and (now := time.perf_counter()) < began + seconds:
        found = side.answered(min(1.0, began + seconds - now))
        if found is not None:
            new, answered = new + found, answered + 1
            ask()
        if now - looked < 1.0:
            continue
        looked, told = now, new + side.under_way()
        if told > most:
            most, heard = told, now
        far = f"{answered} of {asked} answered, {most} new tokens"
        if now - heard > LONGEST_SILENCE_S:
            raise NoAnswer(f"no new token for {now - heard:.0f} s: {far}")
        if now - said >= SAY_S:
            said = now
            say(f"{now - began:.0f} s: {far}")
    took, new = time.perf_counter() - began, new + side.under_way()
    if answered < asked:
        side.give_up()
    return Asked(took, new, answered, asked - answered)
