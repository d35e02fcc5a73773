"""Decode over stages without the host: devices choose tokens and hand them on, the host queues turns ahead.

    turn t    group t % n runs; its message tells what the group was given in the round before, turn t - n
    host      before it queues turn t it hears what was chosen in turn t - 2n, and heeds that all have ended

So all ranks queue the same turns, and the last rounds behind the last token count for nothing. What was chosen in the
last round of all is told to all at the end. Where the stages share out the vocabulary head, all of them choose, when
the last one has run a turn, and each has the tokens where its own next turn of the group reads them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from partitioner.errors import SamplingError
from runtime.generation.choose_tokens import TokenChooser
from runtime.generation.conversation import Conversation
from runtime.generation.decode_graphs.stage_decoder import StageDecoder
from runtime.generation.generation_request import Step
from runtime.generation.staged.group_results import GroupResults
from runtime.generation.staged.part import Part
from runtime.pipeline.relay import Relay
from runtime.pipeline.streams import Streams

__all__ = ["Relayed"]


class Relayed:
    """The turns of one request on one rank. groups: not all over; rows: of each in the cache."""

    def __init__(
        self,
        part: Part,
        groups: list[Conversation],
        rows: list[slice],
        chooser: TokenChooser,
        results: GroupResults,
        *,
        most: int,
    ) -> None:
        """most: how many steps there are at most."""
        self._part, self._groups, self._chooser, self._results = part, groups, chooser, results
        self._turns = len(groups) * most
        self._members = [
            self._member(group, of_group) if group.texts else None for group, of_group in zip(groups, rows, strict=True)
        ]
        self._relay = Relay(
            part.stage,
            self._members,
            part.channel,
            part.communicator,
            Streams(part.device),
            shares_head=part.shares_head,
        )

    def _member(self, group: Conversation, rows: slice) -> StageDecoder:
        piece = group.next_piece()
        member = self._part.run.decoder(len(group.texts), rows)
        assert isinstance(member, StageDecoder)
        member.begin_turns(self._chooser.sampler.best, [row[0] for row in piece.tokens], piece.starts)
        return member

    def leave(self) -> None:
        """Ends what is under way; all ranks do so behind the same step."""
        self._relay.leave()

    def steps(self) -> Iterator[Step]:
        num, turns, results = len(self._groups), self._turns, self._results
        try:
            for turn in range(turns):
                if turn >= 2 * num:
                    self._hear(turn - 2 * num)
                if results.has_next:
                    yield results.next()
                more = not results.is_over and turn + 1 < turns
                self._relay.turn(more=more)
                if not more:
                    break
        except (GeneratorExit, SamplingError):
            self.leave()
            raise
        if not results.is_over:
            for turn in range(max(0, turns - 2 * num), turns - num):
                self._hear(turn)
            for turn, best in enumerate(self._last_chosen(), start=turns - num):
                self._learn(turn, best)
        while results.has_next:
            yield results.next()

    def _hear(self, turn: int) -> None:
        """What was chosen in a turn, by what the group's next one began with."""
        if self._groups[turn % len(self._groups)].texts:
            self._learn(turn, self._relay.said(turn + len(self._groups)))

    def _learn(self, turn: int, best: Tensor) -> None:
        number = turn % len(self._groups)
        if not self._groups[number].is_over:
            self._results.learn(number, self._chooser.sampler.chosen(best), None)

    def _last_chosen(self) -> list[Tensor]:
        """By group [2, rows] on the host: what was chosen last. A stage that alone knows it tells all."""
        part, sizes = self._part, [len(group.texts) for group in self._groups]
        if part.shares_head:
            known = [member.inbox.said for member in self._members if member is not None]
            return list(torch.split(torch.cat(known, dim=1).cpu(), sizes, dim=1))
        mine = torch.zeros(1, 2, sum(sizes), dtype=torch.float64, device=part.device)
        if part.is_last:
            held = [member.outbox.said for member in self._members if member is not None]
            torch.cat(held, dim=1, out=mine[0])
        part.communicator.begin_run(new_shapes=True)
        everyone = part.channel.all_gather(mine, dim=0).cpu()
        return list(torch.split(everyone[-1], sizes, dim=1))
