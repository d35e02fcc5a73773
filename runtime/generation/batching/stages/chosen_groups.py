"""Groups of rows that take turns on stages, whose devices choose tokens and go on with them: hosts read a turn later.

    slot    0        1        2        3
    stage 0 group 0  group 1  group 0  group 1
    stage 1          group 0  group 1  group 0
    host             reads    group 0  group 1

What the last stage chooses in a slot is gathered by all devices, and is in the memory of the group's next step when the
first stage begins it. Its host begins that step before it has read the tokens, as `chosen_steps.py` has it: where the
scheduler would run the same rows whatever they are told. Otherwise it reads them first. A step of prompts runs in the
same slots; hosts choose for it, and all wait for them.

All ranks begin the same, from the same tokens, and so do all that is told here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from runtime.execution.cuda_graphs import to_host
from runtime.generation.batching.chosen_steps import Choices, StepsAhead, UnderWay
from runtime.generation.batching.places import InBlocks, Run
from runtime.generation.batching.stages.staged_steps import StagedSteps
from runtime.generation.batching.work import Turn, Work
from runtime.generation.decode_graphs.decoder import Decoder
from runtime.generation.decode_graphs.stage_decoder import StageDecoder
from runtime.generation.steps import Steps
from runtime.sampling.row_sampler import RowOptions

__all__ = ["ChosenGroups", "GroupDevice", "GroupStep"]


class GroupStep:
    """A step of a group on this rank, which runs when it comes to its stage."""

    def __init__(self, decoder: StageDecoder) -> None:
        self._decoder = decoder
        self.logits: Tensor | None = None
        self._wait: Callable[[], Tensor] | None = None

    @property
    def rows(self) -> int:
        return self._decoder.batch

    @property
    def wait(self) -> Callable[[], Tensor]:
        assert self._wait is not None
        return self._wait

    @property
    def received_bytes(self) -> int:
        return self._decoder.inbox.packed.nbytes

    def run(self, received: Tensor | None) -> Tensor | None:
        """As `StageDecoder.run`."""
        return self._decoder.run(received)

    def choose(self) -> Tensor | None:
        """When the last stage has run it, on all ranks: what this one chooses, if it does."""
        chosen = self._decoder.choose()
        if chosen is None:
            return None
        # another step may run before it turns out that a row was not certain
        self.logits = chosen[0].clone()
        return chosen[1]

    def learn(self, said: Tensor) -> None:
        """Behind `choose`: what has been chosen, of all ranks that choose."""
        self._wait = to_host(said)
        self._decoder.learn(said)


class GroupDevice:
    """As `chosen_steps.Device`, of steps that are begun here and run when they come to this rank's stage."""

    def __init__(self, places: InBlocks, steps: Steps) -> None:
        self._places, self._steps = places, steps

    def begin(self, run: Run, rows: Sequence[RowOptions], also: Sequence[RowOptions]) -> tuple[Decoder, GroupStep]:
        decoder, tokens, positions = self._places.decoder(self._steps, run)
        assert isinstance(decoder, StageDecoder)
        decoder.begin_rows(rows, tokens, positions, latest=run.latest)
        return decoder, GroupStep(decoder)

    def again(
        self, decoder: Decoder, begun: object, turns: Sequence[Turn], at: Sequence[int], *, over: Sequence[int]
    ) -> GroupStep:
        assert isinstance(decoder, StageDecoder)
        self._places.fix(decoder, turns, at)
        decoder.end_rows(over)
        return GroupStep(decoder)

    def begin_size(self, size: int) -> None:
        for group in range(self._places.groups):
            decoder = self._places.decoder_of_nobody(self._steps, size, group=group)
            assert isinstance(decoder, StageDecoder)
            decoder.begin_rows([RowOptions()] * size, [0] * size, [0] * size, latest=0)
            step = GroupStep(decoder)
            step.run(None)
            step.choose()


class ChosenGroups:
    """One rank's part; see the module's docstring."""

    def __init__(self, ahead: StepsAhead, staged: StagedSteps) -> None:
        self._ahead, self._staged = ahead, staged
        self._latest: dict[int, UnderWay] = {}
        """By group: the step that it has begun last, until it is read."""

    @property
    def why_behind(self) -> str:
        return self._ahead.why_behind

    def advance(
        self, group: int, next_run: Callable[[], Run | None], chooses: Callable[[Run], bool]
    ) -> tuple[list[tuple[Work, Choices]], bool]:
        """What has come of steps, and whether a slot has been run, in which the first stage begins one of the group:
        otherwise what has come of its step before has to be learnt first.

        next_run: what it runs, once that has been learnt. chooses: whether devices may choose for such a run.
        """
        self._staged.run_handed_on()  # which does not hang on what is read
        latest = self._latest.pop(group, None)
        if latest is None:
            run = next_run()
            begun = self._ahead.begin(run) if run is not None and chooses(run) else None
            found = self._slot(run, begun)
        else:
            begun = self._ahead.begin_next(latest) if chooses(latest.run) and self._ahead.wants(latest) else None
            if begun is None:
                return self._ahead.read(latest, None), False
            found = self._slot(begun.run, begun)
            found += self._ahead.read(latest, begun)
        if begun is not None:
            self._latest[group] = begun
        return found, True

    def _slot(self, run: Run | None, begun: UnderWay | None) -> list[tuple[Work, Choices]]:
        step = None if begun is None else begun.begun
        assert step is None or isinstance(step, GroupStep)
        done = self._staged.advance(run, step)
        return [] if done is None else [done]
