"""Many requests at once over ranks of dp that share out experts: each has sequences of its own, and all go in step.

    DealtScheduler   a scheduler per rank of dp; a sequence goes to the one that has least to do
    OwnBatches       one step: this rank's own part of it, and the tokens of all

Every rank is told of all sequences, and knows what each rank of dp runs next and how large it is. So all run the same
program at the same time (the one for prompts where any of them runs a prompt's piece), also one that has nothing to
run: it takes a row of nobody. Only the tokens that each has chosen are told to the others. They fail together, as the
ranks of one world do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from partitioner.errors import InputError, SamplingError
from runtime.communication.communicator import Communicator
from runtime.execution.profile import Profiler
from runtime.generation.batching.choose_rows import Choice
from runtime.generation.batching.places import InBlocks, Run
from runtime.generation.batching.scheduler import Scheduler
from runtime.generation.batching.work import Counts, Limits, Work
from runtime.ops.communicating import as_axes
from runtime.ops.rows import collect_rows
from runtime.program.rank_program import RankProgram

__all__ = ["DealtScheduler", "OwnBatches", "brings_alike"]


def brings_alike(program: RankProgram) -> bool:
    """Whether ranks that have sequences of their own must bring equally many tokens of them to experts."""
    return any(
        node.target is collect_rows and as_axes(node.args[2]) == program.batch_axes for node in program.graph.nodes
    )


class DealtScheduler:
    """As `Scheduler`, of `parts` ranks with `limits` each. The group of a work is the number of its rank."""

    def __init__(self, limits: Limits, parts: int, counts: Counts | None = None) -> None:
        self.limits, self.counts = limits, Counts() if counts is None else counts
        self.each = [Scheduler(limits, self.counts) for _ in range(parts)]
        self._owners: dict[int, Scheduler] = {}

    @property
    def running(self) -> int:
        return sum(each.running for each in self.each)

    @property
    def waiting(self) -> int:
        return sum(each.waiting for each in self.each)

    @property
    def tokens_cached(self) -> int:
        return sum(each.tokens_cached for each in self.each)

    def last_of(self, block: int) -> tuple[int, int]:
        """Nothing: sequences lie in blocks, of which a run takes those that it names."""
        return 0, 0

    def add(self, number: int, tokens: Sequence[int], *, most: int, piece: int | None = None) -> None:
        """The first of those that have least to do."""
        least = min(self.each, key=lambda each: each.left)
        least.add(number, tokens, most=most, piece=piece)
        self._owners[number] = least

    def cancel(self, number: int, *, keep: bool = True) -> list[int]:
        return self._owners.pop(number).cancel(number, keep=keep) if number in self._owners else []

    def rank_of(self, number: int) -> int:
        """Whose sequence it is."""
        return self.each.index(self._owners[number])

    def next_of_all(self) -> list[Work | None]:
        """What each rank runs next."""
        found = [each.next() for each in self.each]
        return [None if work is None else replace(work, group=rank) for rank, work in enumerate(found)]

    def learn(self, work: Work, chosen: Mapping[int, int], ended: Collection[int] = ()) -> None:
        self.each[work.group].learn(work, chosen, ended)
        for number in ended:
            self._owners.pop(number, None)


class OwnBatches:
    """One rank's part. run: the rank's programs on a step; choose, sampled: as those of `BatchLoop`.

    in_step: of a step and what all ranks run, the choices where it makes them itself; None where it does not.
    tops: of a sequence, how many of the most probable tokens are to be told beside the chosen one; None: none is asked
    for.
    """

    def __init__(
        self,
        prefill: RankProgram,
        decode: RankProgram,
        communicator: Communicator,
        device: torch.device,
        profiler: Profiler,
        places: InBlocks,
        *,
        run: Callable[[Run, int, Hashable], Tensor],
        choose: Callable[[Run, Tensor], dict[int, Choice]],
        in_step: Callable[[Run, Sequence[Work]], dict[int, Choice] | None],
        sampled: Callable[[Work], list[int]],
        tops: Callable[[int], int | None],
    ) -> None:
        (axis,) = prefill.batch_axes
        self._index, self._device, self._communicator = prefill.coordinates[axis], device, communicator
        self._alike = {False: brings_alike(prefill), True: True}
        """By whether single tokens are run: whether all ranks bring as many rows, as captured steps have to."""
        if self._alike[False] and places.limits.alike:
            raise InputError(
                "experts over dp gather tokens, as many of each rank, and this model's state counts each token, so "
                "that rows cannot be filled up. Give expert-parallel.exchange=exchange, or auto"
            )
        self._places = places
        self._run, self._choose, self._in_step, self._sampled, self._tops = run, choose, in_step, sampled, tops
        self._all = profiler.watched_transfers(communicator.channel(axis, node="tokens"))
        self._told: set[tuple[int, int]] = set()

    def advance(self, works: Sequence[Work | None]) -> list[tuple[Work, dict[int, Choice]]]:
        """A step of all ranks; what has come of it, rank by rank."""
        decode = all(work is None or work.decode for work in works)
        counts = [0 if work is None else len(work.turns) for work in works]
        sizes = [1 if work is None else max(len(turn.tokens) for turn in work.turns) for work in works]
        mine = works[self._index] or Work((), decode, self._index)
        alike = self._alike[decode]
        run = self._places.run_of(replace(mine, decode=decode), _no_row)
        run = self._places.filled(run, max(1, *counts) if alike else max(1, len(mine.turns)))
        choices = self._in_step(run, [work for work in works if work is not None])
        if choices is None:
            logits = self._run(run, max(sizes) if alike else 1, (*counts, *sizes))
            choices = self._choose(run, logits)
        return self._tell(works, choices)

    def _tell(self, works: Sequence[Work | None], choices: dict[int, Choice]) -> list[tuple[Work, dict[int, Choice]]]:
        """What all ranks have chosen, told in one meeting."""
        numbers = [[] if work is None else self._sampled(work) for work in works]
        asked = [self._tops(number) for each in numbers for number in each]
        most = max(map(len, numbers))
        named = max((count + 1 for count in asked if count is not None), default=0)
        everyone: list[Any] = [[] for _ in works]
        if most:
            mine = torch.full((most, 2 + 2 * named), math.nan, dtype=torch.float64)
            for row, number in enumerate(numbers[self._index]):
                mine[row] = torch.tensor(_numbers_of(choices[number], named), dtype=torch.float64)
            self._communicator.begin_run(new_shapes=(most, named) not in self._told)
            self._told.add((most, named))
            everyone = self._all.all_gather(mine[None].to(self._device), dim=0).cpu().tolist()
        found = []
        for rank, (work, those, rows) in enumerate(zip(works, numbers, everyone, strict=True)):
            if work is not None:
                # a rank's own refusals say why
                own = choices if rank == self._index else dict(zip(those, map(_choice, rows), strict=False))
                found.append((work, own))
        return found


def _no_row(block: int) -> tuple[int, int]:
    return 0, 0


def _numbers_of(choice: Choice, named: int) -> list[float]:
    """The token, its log-probability, then pairs of the most probable ones; nan where there is none."""
    pairs = [value for pair in choice.top or () for value in pair]
    rest = [math.nan] * (2 * named - len(pairs))
    return [choice.token, math.nan if choice.logprob is None else choice.logprob, *pairs, *rest]


def _choice(said: Sequence[float]) -> Choice:
    token, logprob, *rest = said
    if token < 0:
        return Choice(-1, error=SamplingError("no token can be chosen: its rank's logits or rules leave none"))
    pairs = [(int(each), value) for each, value in zip(rest[::2], rest[1::2], strict=True) if not math.isnan(each)]
    return Choice(int(token), None if math.isnan(logprob) else logprob, tuple(pairs) or None)
