"""Steps of single tokens on one rank of a stage, from fixed memory: what comes from the stage before, and what goes on.

Two ways, of a group of rows that has its memory to itself:

    begin_turns, turn, choose_by_all        devices hand on by themselves, and choose alike  `runtime.pipeline.relay`
    begin_rows, run, choose, learn          many requests, each of which chooses as it asks
                                            `runtime.generation.batching.stages`

Both read a token where the choice before has left it, so that no host stands between two steps of a group.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from runtime.generation.decode_graphs.decoder import Decoder, FixedStep
from runtime.pipeline.message import Box
from runtime.sampling.likeliest.likeliest_tokens import advance
from runtime.sampling.row_sampler import Kind, RowOptions

__all__ = ["StageDecoder"]

_TURN: FixedStep = ("turn", None, False)
_MESSAGE: FixedStep = ("message", None, False)
_HEAD: FixedStep = ("head", None, False)


class StageDecoder(Decoder):
    """See the module's docstring."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        stage, shared = self._program.stage, self._program.shared_head
        assert stage is not None
        self.outbox = Box(stage.sends, self.batch, self._device)
        self._for_head = Box(() if shared is None else shared.receives, self.batch, self._device)
        """What the last stage has made; zeros on the others."""
        self._choose: Callable[[Tensor], Tensor] | None = None
        self._latest = 0
        """Position of the next step."""
        self._kind: Kind | None = None
        self._chosen_by_own: tuple[Tensor, Tensor] | None = None
        self._steps = torch.zeros(self.batch, dtype=torch.int64, device=self._device)

    # -- turns of a relay ----------------------------------------------------------------------------------------------

    def begin_turns(self, choose: Callable[[Tensor], Tensor], tokens: Sequence[int], positions: Sequence[int]) -> None:
        """Before the first `turn`: the token of each row, and its position. choose: as of a chain.

        The ranks of a stage compare and capture the step here: no other stage waits for one that does that.
        """
        self._choose = self._choose or choose
        self._set(tokens, positions)
        self.inbox.said.zero_()
        self.inbox.said[0].copy_(self._inputs["input_ids"][:, 0])
        self._latest = max(positions)
        seen = self._seen(self._latest)
        self._compare(seen)
        if self._captures:
            self._graph(seen, _TURN)
            if self._head is not None:
                self._graph(0, _HEAD)

    def turn(self) -> None:
        """One step of the tokens in `inbox`, and what it hands on into `outbox`: on the last stage, what is chosen."""
        self._done(self._seen(self._latest), _TURN)
        self._latest += 1

    def choose_by_all(self) -> None:
        """Of a head that all stages share out, behind the last one's turn: the next tokens, into `inbox`, on all."""
        self._done(0, _HEAD)

    # -- rows of many requests -----------------------------------------------------------------------------------------

    @property
    def chooses(self) -> bool:
        """Whether this rank has logits to choose from: that of the last stage, or all where they share out the head."""
        return self._is_last or self._head is not None

    def begin_rows(
        self, rows: Sequence[RowOptions], tokens: Sequence[int], positions: Sequence[int], *, latest: int
    ) -> None:
        """Before a `run` of tokens that the host knows. rows: what the first ones ask, on ranks that choose."""
        self._set(tokens, positions)
        self._latest = max(*positions, latest)
        self._kind = self._kind_for(self.rows.begin(rows)) if self.chooses else None

    def end_rows(self, over: Sequence[int]) -> None:
        """Before a `run`: these are nobody's from now on, and begin anew so as to stay within their tables."""
        self._begin_anew(over)

    def run(self, received: Tensor | None) -> Tensor | None:
        """One step of all rows: the message [bytes] that the stage hands on; None on the last one.

        received: that of the stage before; None on the first one.
        """
        if received is not None:
            self.inbox.packed.copy_(received)
        seen = self._seen(self._latest)
        self._compare(seen)
        if self._is_last and self._head is None:
            self._chosen_by_own = self._done(seen, ("choice", self._kind, False))
        else:
            self._done(seen, _MESSAGE)
        return None if self._is_last else self.outbox.packed

    def choose(self) -> tuple[Tensor, Tensor] | None:
        """Behind the last stage's run, on all stages at once: logits [B, V/n], and as `RowSampler.choose` says them
        [4, B], what is chosen; None on ranks that have no logits. Both valid until another step runs.
        """
        if self._head is not None:
            found: tuple[Tensor, Tensor] = self._done(0, ("head", self._kind, False))
            return found
        found_here, self._chosen_by_own = self._chosen_by_own, None
        return found_here

    def learn(self, said: Tensor) -> None:
        """The next run is of what was chosen, [4, B] of all stages."""
        ids, positions = self._inputs["input_ids"], self._inputs["position_ids"]
        if self._kind is not None:
            self.rows.advance(said, self._kind, ids, positions)
        else:
            advance(said, ids, positions, self._steps)
        self._latest += 1

    # -- what is captured ----------------------------------------------------------------------------------------------

    def _body(self, step: FixedStep) -> Callable[[int], Any]:
        what, kind, _ = step
        if what in ("turn", "message"):
            return self._turn if what == "turn" else self._handed_on
        if what == "head":
            return self._turn_of_head if kind is None else functools.partial(self._chosen_from_head, kind=kind)
        return super()._body(step)

    @torch.no_grad()
    def _turn(self, seen: int) -> None:
        assert self._choose is not None
        self._inputs["input_ids"].copy_(self.inbox.said[0, :, None])
        made = self._run(seen)
        chooses = self._is_last and self._head is None
        self.outbox.said.copy_(self._choose(made) if chooses else self.inbox.said)
        if not chooses:
            self._hand_on(made)
        if self._head is None:
            self._inputs["position_ids"].add_(1)

    @torch.no_grad()
    def _handed_on(self, seen: int) -> None:
        self._hand_on(self._run(seen))

    def _hand_on(self, made: tuple[Tensor, ...]) -> None:
        to = self._for_head if self._is_last else self.outbox
        for held, value in zip(to.values, made, strict=True):
            held.copy_(value)

    @torch.no_grad()
    def _turn_of_head(self, _: int) -> None:
        """The head takes the inputs of the turn, which are those of the next one behind it."""
        assert self._choose is not None
        self.inbox.said.copy_(self._choose(self._logits_of_head()))
        self._inputs["position_ids"].add_(1)

    @torch.no_grad()
    def _chosen_from_head(self, _: int, kind: Kind) -> tuple[Tensor, Tensor]:
        logits = self._logits_of_head()
        return logits, self.rows.choose(logits, kind)

    def _logits_of_head(self) -> Tensor:
        assert self._head is not None
        logits: Tensor = self._head.step(self._of_run, self._for_head.values)
        return logits[:, 0]
