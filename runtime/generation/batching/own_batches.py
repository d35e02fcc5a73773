"""Many requests at once over ranks of dp that share out experts: each has sequences of its own, and all go in step.

    DealtScheduler   a scheduler per rank of dp; a sequence goes to the one that has least to do
    OwnBatches       one step: this rank's own part of it, and the tokens of all

Every rank is told of all sequences, and knows what each rank of dp runs next and how large it is. So all run the same
program at the same time (the one for prompts where any of them runs a prompt's piece), also one that has nothing to
run: it takes a row of nobody. Only the tokens that each has chosen are told to the others. They fail together, as the
ranks of one world do.

Over pipeline stages each rank of dp has a pipeline of its own (`staged_steps.py`), and all begin a step in the same
slot: so each stage runs the same program as its counterparts, slot by slot. Where ranks share out the tokens of a
sequence, single tokens run in steps of their own, since a prompt's step would deal them out otherwise than a token's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

import torch

from partitioner.errors import InputError
from runtime.communication.communicator import Communicator, all_stages
from runtime.execution.profile import Profiler
from runtime.generation.batching.choose_rows import Choice, choice_of, numbers_of
from runtime.generation.batching.places import Places, Run
from runtime.generation.batching.scheduler import Scheduler, next_alike
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

    def next_of_all(self, group: int) -> list[Work | None]:
        """What each rank runs next; group: as `Scheduler.next` has it."""
        is_shared = self.limits.shared_out is not None
        found = next_alike(self.each, group) if is_shared else [each.next(group) for each in self.each]
        return [None if work is None else replace(work, group=rank) for rank, work in enumerate(found)]

    def learn(self, work: Work, chosen: Mapping[int, int], ended: Collection[int] = ()) -> None:
        self.each[work.group].learn(work, chosen, ended)
        for number in ended:
            self._owners.pop(number, None)


class OwnBatches:
    """One rank's part. run: begins a step, or a slot without one, and yields the step that has been done in it, which
    is as many slots old as there are stages before the last; sampled: as that of `BatchLoop`.

    last: of a row, as `Places.run_of` has it. named: of a sequence, how many of the most probable tokens are to be told
    beside the chosen one; None: none is asked for.
    """

    def __init__(
        self,
        prefill: RankProgram,
        decode: RankProgram,
        communicator: Communicator,
        device: torch.device,
        profiler: Profiler,
        places: Places,
        *,
        run: Callable[[Run | None], tuple[Work, dict[int, Choice]] | None],
        last: Callable[[int], tuple[int, int]],
        sampled: Callable[[Work], list[int]],
        named: Callable[[int], int | None],
    ) -> None:
        (axis,) = prefill.batch_axes
        self._index, self._device, self._communicator = prefill.coordinates[axis], device, communicator
        # a stage of dense layers alone goes along with those that have experts: their runs are each other's
        alone = all_stages(not brings_alike(prefill), prefill, communicator, device)
        self._alike = {False: not alone, True: True}
        """By whether single tokens are run: whether all ranks bring as many rows, as captured steps have to."""
        if self._alike[False] and places.limits.alike:
            raise InputError(
                "experts over dp gather tokens, as many of each rank, and this model's state counts each token, so "
                "that rows cannot be filled up. Give expert-parallel.exchange=exchange, or auto"
            )
        self._places = places
        self._run, self._last, self._sampled, self._named = run, last, sampled, named
        stages = 1 if prefill.stage is None else prefill.stage.count
        self._passing: deque[tuple[Work | None, ...]] = deque([()] * stages, maxlen=stages)
        """By stage: what all ranks run there; nothing where none has anything."""
        self._all = profiler.watched_transfers(communicator.channel(axis, node="tokens"))
        self._told: set[tuple[int, int]] = set()

    def run_of(self, works: Sequence[Work | None]) -> Run:
        """What this rank runs of a step; works: what each rank runs, of which some run something."""
        decode = all(work is None or work.decode for work in works)
        works = [work if work is None or work.decode == decode else replace(work, decode=decode) for work in works]
        mine = works[self._index] or Work((), decode, self._index)
        counts = [0 if work is None else self._places.rows_of(work) for work in works]
        sizes = [1 if work is None else max(len(turn.tokens) for turn in work.turns) for work in works]
        alike = self._alike[decode]
        run = self._places.run_of(mine, self._last, count=max(1, *counts) if alike else 1)
        return replace(run, least=max(sizes) if alike else 1, like=(*counts, *sizes), others=tuple(works))

    def advance(self, run: Run | None) -> list[tuple[Work, dict[int, Choice]]]:
        """Begins a step of all ranks, or none; what has come of the one that has been done, rank by rank."""
        self._passing.appendleft(() if run is None else run.others)
        done = self._run(run)
        works = self._passing[-1]
        if not works:
            return []
        numbers = [[] if work is None else self._sampled(work) for work in works]
        told = self.tell(numbers, {} if done is None else done[1])
        return [(work, choices) for work, choices in zip(works, told, strict=True) if work is not None]

    def tell(self, numbers: Sequence[Sequence[int]], choices: Mapping[int, Choice]) -> list[dict[int, Choice]]:
        """What has been chosen for the sequences of each rank, told in one meeting; choices: this rank's."""
        most = max(map(len, numbers))
        if not most:
            return [{} for _ in numbers]
        asked = [self._named(number) for each in numbers for number in each]
        named = max((count + 1 for count in asked if count is not None), default=0)
        mine = [numbers_of(choices[number], named) for number in numbers[self._index]]
        mine += [numbers_of(None, named)] * (most - len(mine))
        self._communicator.begin_run(new_shapes=(most, named) not in self._told)
        self._told.add((most, named))
        own = torch.tensor([mine], dtype=torch.float64).to(self._device)
        everyone = self._all.all_gather(own, dim=0).cpu().tolist()
        return [
            # a rank's own refusals say why
            {number: choices[number] for number in those}
            if rank == self._index
            else {number: choice_of(row, whose="its rank's") for number, row in zip(those, rows, strict=False)}
            for rank, (those, rows) in enumerate(zip(numbers, everyone, strict=True))
        ]
