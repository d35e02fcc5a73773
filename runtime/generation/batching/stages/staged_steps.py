"""Steps of many requests over pipeline stages: as many groups of sequences as stages take turns.

    slot    0        1        2        3
    stage 0 group 0  group 1  group 0  group 1
    stage 1          group 0  group 1  group 0

In each slot a stage runs what the stage before ran in the slot before, hands it on, and all stages hear which tokens
the last one chose, or choose them together, where they share out the vocabulary head. So every rank has the same
sequences, knows what each stage does next, and how large it is: nothing is sent but values and tokens. A prompt and
single tokens of others may stand behind each other in the pipeline.

Hosts choose, and all wait for them; or devices do, of a step that can (`chosen_groups.py`), and hosts read it later.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from runtime.communication.channels import Handle
from runtime.communication.communicator import Communicator
from runtime.execution.profile import Profiler
from runtime.generation.batching.choose_rows import Choice, choice_of, numbers_of
from runtime.generation.batching.places import Run
from runtime.generation.batching.work import Work
from runtime.pipeline.links import Links, shape_of
from runtime.program.rank_program import Stage

__all__ = ["ChoosingStep", "StagedSteps"]


class ChoosingStep(Protocol):
    """A step of single tokens whose devices choose the next ones, for `rows` rows, of which some may be nobody's.

    received_bytes: how long the message is that comes from the stage before.
    """

    @property
    def rows(self) -> int: ...

    @property
    def received_bytes(self) -> int: ...

    def run(self, received: Tensor | None) -> Tensor | None:
        """The message [bytes] that the stage hands on; None on the last one. received: None on the first one."""
        ...

    def choose(self) -> Tensor | None:
        """On all ranks, when the last stage has run it: [4, rows], None on those that do not choose."""
        ...

    def learn(self, said: Tensor) -> None:
        """On all ranks: what has been chosen."""
        ...


@dataclass(frozen=True)
class _Passing:
    """A step on its way through the stages."""

    run: Run
    sizes: dict[str, int]
    step: ChoosingStep | None = None


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
        head: Callable[[Run, Any], Tensor] | None = None,
    ) -> None:
        self._stage, self._communicator, self._device = prefill, communicator, device
        self._run, self._choose, self._sampled, self._sizes = run, choose, sampled, sizes
        self._named, self._head = named, head
        self._links = {
            is_decode: Links(communicator, stage, profiler) for is_decode, stage in ((False, prefill), (True, decode))
        }
        self._all = profiler.watched_transfers(communicator.channel("pp", node="tokens"))
        self._messages = profiler.watched_transfers(communicator.channel("pp", node="message"))
        self._passing: deque[_Passing | None] = deque([None] * prefill.count, maxlen=prefill.count)
        """By stage: what it runs in this slot."""
        self._received: list[Tensor] = []
        self._ran: tuple[Any] | None = None
        """What this stage has made in this slot, if it has run what was handed on to it."""
        self._met: set[tuple[object, ...]] = set()
        """What ranks have compared: where to, of which run, and of which sizes."""
        self._silent: dict[int, Tensor] = {}
        """Of `_silence`."""

    def run_handed_on(self) -> None:
        """Runs what the stage before ran in the last slot, which does not hang on what the first one begins in this."""
        if self._stage.index and self._ran is None:
            self._ran = (self._made(self._passing[self._stage.index - 1]),)

    def advance(self, run: Run | None, step: ChoosingStep | None = None) -> tuple[Work, dict[int, Choice]] | None:
        """One slot, in which the first stage begins `run`; what hosts have chosen from what the last one has run in it.

        step: what runs in its place, and tells by itself what it has chosen.
        """
        self.run_handed_on()
        sizes = {} if run is None or step is not None else self._sizes(run)
        self._passing.appendleft(None if run is None else _Passing(run, sizes, step))
        index = self._stage.index
        mine, done, before = self._passing[index], self._passing[-1], self._passing[index - 1] if index else None
        (made,), self._ran = self._ran or (self._made(mine),), None
        sending = [] if mine is None or index + 1 == self._stage.count else self._send(mine, made)
        self._received = [] if before is None else [handle.finish() for handle in self._receive(before)]
        for handle in sending:
            handle.finish()
        if done is None:
            return None
        if done.step is not None:
            self._learn(done.step)
            return None
        return done.run.work, self._choices(done.run, made if index + 1 == self._stage.count else None)

    def nothing_handed_on(self, run: Run) -> list[Tensor]:
        """Zeros as the stage before would hand them on, of a run of prompts."""
        mesh, rank, sizes = self._communicator.mesh, self._communicator.rank, self._sizes(run)
        return [
            torch.zeros(shape_of(crossing, sizes, mesh, rank), dtype=crossing.dtype, device=self._device)
            for crossing in self._stage.receives
        ]

    def _made(self, passing: _Passing | None) -> Any:
        if passing is None:
            return None
        if passing.step is not None:
            return passing.step.run(self._received[0] if self._received else None)
        return self._run(passing.run, self._received)

    def _send(self, passing: _Passing, made: Any) -> list[Handle]:
        if passing.step is not None:
            self._begin("message on", passing.step.rows)
            return [self._messages.send_begin(made, self._stage.index + 1)]
        return self._links_of(passing, sends=True).send(list(made))

    def _receive(self, passing: _Passing) -> list[Handle]:
        if passing.step is not None:
            self._begin("message", passing.step.rows)
            shape = [passing.step.received_bytes]
            return [self._messages.receive_begin(shape, torch.uint8, self._stage.index - 1)]
        return self._links_of(passing, sends=False).receive(passing.sizes)

    def _links_of(self, passing: _Passing, *, sends: bool) -> Links:
        """To the stage behind, or to that before."""
        work, links = passing.run.work, self._links[passing.run.work.decode]
        named = {dim for each in (links.stage.sends if sends else links.stage.receives) for dim in each.shape}
        # runs of packed rows are alike, whatever their sizes; and sizes that nothing has that crosses say nothing
        sizes = () if work.packed else (size for name, size in passing.sizes.items() if name in named)
        key = (sends, work.decode, *sizes)
        links.begin(new_shapes=key not in self._met)
        self._met.add(key)
        return links

    def _begin(self, *key: object) -> None:
        """Before ranks meet: those that have met for as much before do not compare it again."""
        self._communicator.begin_run(new_shapes=key not in self._met)
        self._met.add(key)

    def _learn(self, step: ChoosingStep) -> None:
        """On all stages, what devices have chosen: nothing here waits for them."""
        said = step.choose()
        if self._head is None:
            said = self._of_all(self._silence(step.rows) if said is None else said)[-1]
        assert said is not None
        step.learn(said)

    def _silence(self, rows: int) -> Tensor:
        """What a rank brings that does not choose."""
        if rows not in self._silent:
            self._silent[rows] = torch.zeros(4, rows, dtype=torch.float64, device=self._device)
        return self._silent[rows]

    def _choices(self, run: Run, made: Any) -> dict[int, Choice]:
        """On all stages, what the last one chooses from its logits, or all from those of the head that they share."""
        numbers = self._sampled(run.work)
        if not numbers:
            return {}
        if self._head is not None:
            assert made is None or isinstance(made, tuple)
            return self._choose(run, self._head(run, made))
        return self.tell(numbers, {} if made is None else self._choose(run, made))

    def tell(self, numbers: Sequence[int], choices: Mapping[int, Choice]) -> dict[int, Choice]:
        """On all stages, what the last one has chosen for these; choices: there, and nothing on the others."""
        most = max((count + 1 for number in numbers if (count := self._named(number)) is not None), default=0)
        own = torch.tensor([numbers_of(choices.get(number), most) for number in numbers], dtype=torch.float64)
        everyone = self._of_all(own.to(self._device)).cpu()
        return dict(choices) or {
            number: choice_of(row, whose="the last stage's")
            for number, row in zip(numbers, everyone[-1].tolist(), strict=True)
        }

    def tell_one(self, numbers: Sequence[Sequence[int]], choices: Mapping[int, Choice]) -> list[dict[int, Choice]]:
        """`tell`, as `StepsAhead` has it."""
        return [self.tell(each, choices) for each in numbers]

    def _of_all(self, own: Tensor) -> Tensor:
        """[stages, ..]"""
        self._begin("tokens", own.shape)
        return self._all.all_gather(own[None], dim=0)
