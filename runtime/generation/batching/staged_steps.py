"""Steps of many requests over pipeline stages: as many groups of sequences as stages take turns.

    slot    0        1        2        3
    stage 0 group 0  group 1  group 0  group 1
    stage 1          group 0  group 1  group 0

In each slot a stage runs what the stage before ran in the slot before, hands it on, and all stages hear which tokens
the last one chose, or choose them together, where they share out the vocabulary head. So every rank has the same
sequences, knows what each stage does next, and how large it is: nothing is sent but values and tokens. A prompt and
single tokens of others may stand behind each other in the pipeline.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from runtime.communication.channels import Handle
from runtime.communication.communicator import Communicator
from runtime.execution.profile import Profiler
from runtime.generation.batching.choose_rows import Choice, choice_of, numbers_of
from runtime.generation.batching.places import Run
from runtime.generation.batching.work import Work
from runtime.pipeline.links import Links
from runtime.program.rank_program import Stage

__all__ = ["StagedSteps"]


@dataclass(frozen=True)
class _Passing:
    """A step on its way through the stages. is_new: whether none before was of its sizes."""

    run: Run
    sizes: dict[str, int]
    is_new: bool


class StagedSteps:
    """One rank's part. run: of a step and what came for it, what the stage yields. choose: as `BatchLoop.choose`.

    prefill, decode: the stage as the programs for prompts and for single tokens have it, between which other values
    may cross, or other rows of them.
    sampled: the numbers of a step's sequences that are to be told a token. named: how many of the most probable tokens
    a sequence is told as well, or None. head: of a step and what the last stage yields, None on the others, logits on
    all stages; None where the last one has the head.
    """

    def __init__(
        self,
        prefill: Stage,
        decode: Stage,
        communicator: Communicator,
        device: torch.device,
        profiler: Profiler,
        *,
        run: Callable[[Run, Any], Any],
        choose: Callable[[Run, Tensor], dict[int, Choice]],
        sampled: Callable[[Work], list[int]],
        named: Callable[[int], int | None],
        sizes: Callable[[Run], dict[str, int]],
        head: Callable[[Run, Any], Tensor] | None,
    ) -> None:
        self._stage, self._communicator, self._device = prefill, communicator, device
        self._run, self._choose, self._sampled, self._sizes = run, choose, sampled, sizes
        self._named, self._head = named, head
        self._links = {
            is_decode: Links(communicator, stage, profiler) for is_decode, stage in ((False, prefill), (True, decode))
        }
        self._all = profiler.watched_transfers(communicator.channel("pp", node="tokens"))
        self._passing: deque[_Passing | None] = deque([None] * prefill.count, maxlen=prefill.count)
        """By stage: what it runs in this slot."""
        self._received: list[Tensor] = []
        self._seen: set[tuple[int, ...]] = set()
        self._told: set[tuple[int, ...]] = set()

    def advance(self, run: Run | None) -> tuple[Work, dict[int, Choice]] | None:
        """One slot, in which the first stage begins `run`; what the last one has done in it."""
        self._passing.appendleft(None if run is None else self._passed(run))
        index, count = self._stage.index, self._stage.count
        mine, done = self._passing[index], self._passing[-1]
        made: Any = None if mine is None else self._run(mine.run, self._received)
        choices = None if done is None else self._tell(done.run, made if index + 1 == count else None)
        sending: list[Handle] = []
        if mine is not None and index + 1 < count:
            sending = self._links_of(mine).send(list(made))
        before = self._passing[index - 1] if index else None
        self._received = []
        if before is not None:
            self._received = [handle.finish() for handle in self._links_of(before).receive(before.sizes)]
        for handle in sending:
            handle.finish()
        return None if done is None or choices is None else (done.run.work, choices)

    def _passed(self, run: Run) -> _Passing:
        sizes = self._sizes(run)
        # runs of packed rows are alike, whatever their sizes
        key = (int(run.work.decode), *(() if run.work.packed else sizes.values()))
        is_new = key not in self._seen
        self._seen.add(key)
        return _Passing(run, sizes, is_new)

    def _links_of(self, passing: _Passing) -> Links:
        links = self._links[passing.run.work.decode]
        links.begin(new_shapes=passing.is_new)
        return links

    def _tell(self, run: Run, made: Any) -> dict[int, Choice]:
        """On all stages, what the last one chooses from its logits, or all from those of the head that they share."""
        numbers = self._sampled(run.work)
        if not numbers:
            return {}
        if self._head is not None:
            assert made is None or isinstance(made, tuple)
            return self._choose(run, self._head(run, made))
        logits: Tensor | None = made
        most = max((count + 1 for number in numbers if (count := self._named(number)) is not None), default=0)
        choices = {} if logits is None else self._choose(run, logits)
        own = torch.tensor([[numbers_of(choices.get(number), most) for number in numbers]], dtype=torch.float64)
        shape = own.shape[1:]
        self._communicator.begin_run(new_shapes=shape not in self._told)
        self._told.add(shape)
        everyone = self._all.all_gather(own.to(self._device), dim=0).cpu()
        return choices or {
            number: choice_of(row, whose="the last stage's")
            for number, row in zip(numbers, everyone[-1].tolist(), strict=True)
        }
