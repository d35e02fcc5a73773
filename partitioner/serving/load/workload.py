"""What is asked and when, made from a seed: the same seed asks the same of every server.

    arrivals   a Poisson process: gaps are exponential with mean 1 / rate; or `clients` that ask one request after the
               other
    lengths    log-normal, with the means of conversations in ShareGPT as PagedAttention's authors found them: 161
               tokens of a prompt, 338 of an answer (arXiv:2309.06180, figure 11), or other means with the same spread

Prompts are words, so that every server and tokenizer takes them; how many tokens they are, the server counts.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

from partitioner.errors import InputError

__all__ = ["Question", "Workload"]

PROMPT_MEAN = 161.31
ANSWER_MEAN = 337.99
_SPREAD = 1.0
"""Of the logarithm: the 90th percentile is 3.6 times the median."""
_WORDS = """
the of a value is returned if object that to and name list in with string it for may be called by first each type file
raise error when not given as default argument function class module other number same line new
""".split()  # noqa: SIM905 - words are read more easily than a list of them


@dataclass(frozen=True)
class Question:
    """arrival_s: after the first. new: how many tokens are asked for."""

    arrival_s: float
    prompt: str
    new: int


@dataclass(frozen=True, kw_only=True)
class Workload:
    """rate: requests per second; None: as fast as `clients` go. longest: of a prompt with its answer, in tokens."""

    requests: int = 100
    rate: float | None = None
    clients: int | None = None
    prompt_mean: float = PROMPT_MEAN
    answer_mean: float = ANSWER_MEAN
    longest: int = 2048
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.rate is None) == (self.clients is None):
            raise InputError("give either a rate of arrivals or a number of clients")
        for name, value in vars(self).items():
            if value is not None and name != "seed" and not 0 < value < math.inf:
                raise InputError(f"{name} must be more than 0, got {value}")

    def questions(self, *, cut: Callable[[str, int], str] | None = None) -> list[Question]:
        """cut(words, n): the first n tokens of a text; None: a word counts as a token."""
        chance = random.Random(self.seed)
        at, found = 0.0, []
        for _ in range(self.requests):
            prompt = _length(chance, self.prompt_mean, self.longest // 2)
            new = _length(chance, self.answer_mean, self.longest - prompt)
            words = " ".join(chance.choice(_WORDS) for _ in range(prompt))
            found.append(Question(at, words if cut is None else cut(words, prompt), new))
            at += 0.0 if self.rate is None else chance.expovariate(self.rate)
        return found


def _length(chance: random.Random, mean: float, most: int) -> int:
    """Log-normal with that mean, from 1 to `most`."""
    drawn = chance.lognormvariate(math.log(mean) - _SPREAD**2 / 2, _SPREAD)
    return max(1, min(most, round(drawn)))
