"""Continuing sequences over pipeline stages: groups of rows, as many as stages, take turns.

    prompts   pieces, group by group, through a chain of stages                    `runtime.pipeline.schedule.chain`
    decode    in slot t stage k runs group t - k; then one permute moves all on    `runtime.pipeline.schedule.ring`
    relay     stages hand on by themselves, the host queues turns ahead            `runtime.pipeline.relay`

The last stage chooses tokens. They go to the first stage at once, and on from there with the hidden states of their own
group, so that every rank knows every token a few slots later: each has the conversations, knows who has ended, and
returns the result. A group that has ended sends messages without values. All ranks leave the ring after the slot in
which the last of them has learnt the last token, which each computes from when it learnt it.

Where the stages share out the vocabulary head, all of them choose, behind the shift of the same slot: everybody knows
every token at once, messages carry values only, and all leave behind the slot in which the last token was chosen.

In a relay the device chooses tokens and hands them on; the host hears of them a round of groups later, and heeds that
all have ended a round after that. So all ranks queue the same turns, and those behind the last token count for nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from partitioner.errors import SamplingError
from runtime.communication.communicator import Communicator
from runtime.execution.profile import Profiler
from runtime.generation.choose_tokens import TokenChooser
from runtime.generation.conversation import Conversation, Piece
from runtime.generation.decode_graphs import Decoder
from runtime.generation.generation_request import GenerationRequest, Step
from runtime.generation.steps import Steps
from runtime.pipeline.lanes import Lanes
from runtime.pipeline.links import Links
from runtime.pipeline.message import Message, message_bytes
from runtime.pipeline.perform import perform
from runtime.pipeline.relay import Relay
from runtime.pipeline.schedule import PIECES_PER_STAGE, Head, Run, Shift, chain, chunk_ends, groups_of, in_slot
from runtime.program.rank_program import RankProgram

__all__ = ["StagedLoop"]


class StagedLoop:
    """One rank's part of one request; see the module's docstring."""

    def __init__(
        self,
        run: Steps,
        prefill: RankProgram,
        decode: RankProgram,
        communicator: Communicator,
        device: torch.device,
        profiler: Profiler,
        *,
        alike: bool,
        relays: bool = False,
    ) -> None:
        """alike: as in `Conversation`, for all stages. relays: whether the device may choose and hand on by itself."""
        assert prefill.stage is not None
        assert decode.stage is not None
        self._run, self._communicator, self._device = run, communicator, device
        self._stage, self._alike = decode.stage, alike
        self._links = Links(communicator, prefill.stage, profiler)
        self._program = prefill
        self._ring = profiler.watched_transfers(communicator.channel("pp", node="shift"))
        self._is_last = self._stage.index + 1 == self._stage.count
        self._shares_head = run.shares_head
        self._relays = relays and not self._shares_head
        self.relay: Relay | None = None
        """What is under way while a stream of it is."""

    def steps(self, request: GenerationRequest, chooser: TokenChooser, size: int) -> Iterator[Step]:
        """One `Step` per token, on all ranks, until every sequence has ended."""
        rows = groups_of(len(request.prompts), self._stage.count, groups=request.settings.pipeline_groups)
        groups = [Conversation(request, vocab_size=self._program.vocab_size, rows=group) for group in rows]
        logits = self._prefill(groups, rows, size)
        said = _Said(groups)
        if self._shares_head:
            length = self._choose_first(groups, logits, chooser, said)
        else:
            length = self._tell_first(groups, logits, chooser, said, scored=request.settings.logprobs)
        yield said.next()
        if self._relays:
            yield from self._relayed(request, groups, rows, chooser, said)
            return
        ring = _Ring(self, groups, rows, chooser, said, length, scored=request.settings.logprobs)
        yield from ring.steps()

    def _prefill(self, groups: list[Conversation], rows: list[slice], size: int) -> dict[int, Tensor]:
        """The logits [B, V/n] of each prompt's last token, by group: on the last stage, or all that share the head."""
        pieces = [
            (number, piece)
            for number, group in enumerate(groups)
            if group.texts
            for piece in group.pieces_between(
                self._ends(group, sum(bool(each.texts) for each in groups), size), alike=self._alike
            )
        ]
        found: dict[int, Tensor] = {}

        def run(number: int, received: list[Tensor]) -> tuple[Tensor, ...]:
            group, piece = pieces[number]
            made = self._run.execute(piece, received, rows=rows[group])
            if not self._is_last:
                return made  # type: ignore[no-any-return]
            if self._shares_head:
                return made if any(piece.completes) else ()
            keep(number, made)
            return ()

        def head(number: int, made: tuple[Tensor, ...] | None) -> None:
            keep(number, self._run.head(pieces[number][1], made))

        def keep(number: int, logits: Tensor) -> None:
            group, piece = pieces[number]
            completes = torch.tensor(piece.completes, device=self._device)
            found[group] = torch.where(completes[:, None], logits[:, 0], found.get(group, logits[:, 0]))

        # compared once for each request: what crosses has other shapes with other prompts
        self._links.begin(new_shapes=True)
        # only where a prompt ends does anybody want logits
        heads = [n for n, (_, piece) in enumerate(pieces) if any(piece.completes)] if self._shares_head else []
        timeline = chain(self._stage.count, len(pieces), heads=heads)[self._stage.index]
        perform(timeline, self._links, [self._run.sizes(piece) for _, piece in pieces], run, head)
        return found

    def _ends(self, group: Conversation, groups: int, size: int) -> list[int]:
        """Chunks of one group: enough of them to keep all stages busy, `size` tokens at most."""
        return chunk_ends(
            max(map(len, group.texts)),
            least=-(-PIECES_PER_STAGE * self._stage.count // groups),
            longest=size,
            pairs_per_token=self._stage.pairs_per_token,
            # not as this stage's cache has it: all stages cut alike, also one without attention
            multiple_of=self._program.mesh.size("sp"),
        )

    def _choose_first(
        self, groups: list[Conversation], logits: dict[int, Tensor], chooser: TokenChooser, said: _Said
    ) -> int:
        """Chooses the first tokens, on all stages at once, and agrees on the length of messages."""
        for number, found in sorted(logits.items()):
            said.learn(number, *chooser.choose(found, groups[number]))
        most = max(len(group.texts) for group in groups)
        mine = torch.tensor([message_bytes(self._stage.sends, most)], device=self._device)
        self._communicator.begin_run(new_shapes=True)
        return int(self._ring.all_gather(mine, dim=0).max().item())

    def _tell_first(
        self,
        groups: list[Conversation],
        logits: dict[int, Tensor],
        chooser: TokenChooser,
        said: _Said,
        *,
        scored: bool,
    ) -> int:
        """Chooses the first tokens, tells all stages, and agrees on the length of messages."""
        most = max(len(group.texts) for group in groups)
        told = torch.zeros((1, len(groups), most, 2), dtype=torch.float64)
        lengths = torch.tensor([message_bytes(self._stage.sends, most)], dtype=torch.float64)
        for number, found in logits.items():
            tokens, logprobs = chooser.choose(found, groups[number])
            told[0, number, : len(tokens), 0] = torch.tensor(tokens, dtype=torch.float64)
            if logprobs is not None:
                told[0, number, : len(tokens), 1] = torch.tensor(logprobs, dtype=torch.float64)
        mine = torch.cat([told.view(1, -1), lengths[None]], dim=1).to(self._device)
        self._communicator.begin_run(new_shapes=True)
        everyone = self._ring.all_gather(mine, dim=0).cpu()
        told = everyone[-1, :-1].view(len(groups), most, 2)
        for number, group in enumerate(groups):
            tokens = [int(token) for token in told[number, : len(group.texts), 0].tolist()]
            logprobs = told[number, : len(group.texts), 1].tolist()
            said.learn(number, tokens, logprobs if scored else None)
        return int(everyone[:, -1].max().item())

    def _relayed(
        self,
        request: GenerationRequest,
        groups: list[Conversation],
        rows: list[slice],
        chooser: TokenChooser,
        said: _Said,
    ) -> Iterator[Step]:
        """The steps behind the first: what is learnt in a turn was chosen two rounds of groups before."""
        num, turns = len(groups), len(groups) * (request.settings.max_new_tokens - 1)
        if said.is_over:
            return
        members = [self._member(group, rows[at], chooser) if group.texts else None for at, group in enumerate(groups)]
        relay = self.relay = Relay(self._stage, members, self._ring, self._communicator, Lanes(self._device))

        def learn(turn: int, best: Tensor) -> None:
            group = groups[turn % num]
            if group.texts and not group.is_over:
                said.learn(turn % num, chooser.sampler.chosen(best), None)

        def heard(turn: int) -> None:
            """What was chosen in a turn, by what the group's next one began with."""
            if groups[turn % num].texts:
                learn(turn, relay.said(turn + num))

        try:
            for turn in range(turns):
                if turn >= 2 * num:
                    heard(turn - 2 * num)
                if said.has_next:
                    yield said.next()
                more = not said.is_over and turn + 1 < turns
                relay.turn(more=more)
                if not more:
                    break
        except (GeneratorExit, SamplingError):
            relay.leave()  # the other ranks do the same
            raise
        if not said.is_over:
            for turn in range(max(0, turns - 2 * num), turns - num):
                heard(turn)
            for turn, best in enumerate(self._last_chosen(members), start=turns - num):
                learn(turn, best)
        while said.has_next:
            yield said.next()

    def _member(self, group: Conversation, rows: slice, chooser: TokenChooser) -> Decoder:
        piece = group.next_piece()
        member = self._run.decoder(len(group.texts), rows)
        member.begin_turns(chooser.sampler.best, [row[0] for row in piece.tokens], piece.starts)
        return member

    def _last_chosen(self, members: Sequence[Decoder | None]) -> list[Tensor]:
        """By group [2, rows] on the host: what the last stage has chosen last, which it tells all."""
        sizes = [0 if member is None else member.batch for member in members]
        mine = torch.zeros(1, 2, sum(sizes), dtype=torch.float64, device=self._device)
        if self._is_last:
            held = [member.outbox.said for member in members if member is not None]
            torch.cat(held, dim=1, out=mine[0])
        self._communicator.begin_run(new_shapes=True)
        everyone = self._ring.all_gather(mine, dim=0).cpu()
        return list(torch.split(everyone[-1], sizes, dim=1))

    def shift(self, message: Message, length: int, most: int, *, first: bool) -> Tensor:
        """Hands on `message`, and returns the bytes of the one that came."""
        packed = message.pack(length, most, self._device)
        self._communicator.begin_run(new_shapes=first)
        return self._ring.permute_begin(packed, 1).finish()

    def decode(self, piece: Piece, received: tuple[Tensor, ...], rows: slice) -> object:
        return self._run.decode(piece, received, rows=rows)

    def head(self, piece: Piece, made: tuple[Tensor, ...] | None) -> Tensor:
        return self._run.head(piece, made, decode=True)


class _Said:
    """What the groups were given, and the steps of all rows together that follow from it."""

    def __init__(self, groups: list[Conversation]) -> None:
        self.groups = groups
        self._steps: list[list[Step]] = [[] for _ in groups]
        self._yielded = 0

    def learn(self, group: int, tokens: list[int], logprobs: list[float] | None) -> None:
        if self.groups[group].texts:
            self._steps[group].append(self.groups[group].learn(tokens, logprobs))

    @property
    def has_next(self) -> bool:
        """Whether every group has been given its next token, or has ended before, and some have not."""
        number = self._yielded
        through = [group.is_over or len(steps) > number for group, steps in zip(self.groups, self._steps, strict=True)]
        return all(through) and any(len(steps) > number for steps in self._steps)

    @property
    def is_over(self) -> bool:
        return all(group.is_over for group in self.groups)

    def next(self) -> Step:
        tokens: list[int | None] = []
        logprobs: list[float | None] = []
        scored = False
        for group, steps in zip(self.groups, self._steps, strict=True):
            step = steps[self._yielded] if len(steps) > self._yielded else None
            nothing = (None,) * len(group.texts)
            tokens += nothing if step is None else step.tokens
            scored |= step is not None and step.logprobs is not None
            logprobs += nothing if step is None or step.logprobs is None else step.logprobs
        self._yielded += 1
        return Step(tuple(tokens), tuple(logprobs) if scored else None)


class _Ring:
    """The slots of one request on one rank."""

    def __init__(
        self,
        loop: StagedLoop,
        groups: list[Conversation],
        rows: list[slice],
        chooser: TokenChooser,
        said: _Said,
        length: int,
        *,
        scored: bool,
    ) -> None:
        self.loop, self.groups, self.rows, self.chooser, self.said = loop, groups, rows, chooser, said
        self.length, self.scored = length, scored
        self.most = max(len(group.texts) for group in groups)
        self.stage, self.count = loop._stage.index, loop._stage.count
        self.slot = 0
        self.received: dict[int, tuple[Tensor, ...]] = {}
        self.made: tuple[Tensor, ...] | None = None
        """On the last stage of those that share the head: what it has made in this slot."""
        self.last_chosen = -1
        """The latest slot in which the last stage chose tokens that this rank knows."""
        self.latest: dict[int, Message] = {}
        """What each group was given last."""

    def steps(self) -> Iterator[Step]:
        while not (self.said.is_over and self.slot > self._end):
            self.advance(runs=True)
            if self.said.has_next:
                try:
                    yield self.said.next()
                except GeneratorExit:
                    # the other ranks have not learnt this step yet
                    while self.slot <= self._end:
                        self.advance(runs=False)
                    raise

    @property
    def _end(self) -> int:
        """The slot after which every rank knows the tokens that were chosen in `last_chosen`."""
        return -1 if self.last_chosen < 0 else self.last_chosen + self._delay(self.count - 2)

    def _delay(self, stage: int) -> int:
        """How many slots after the first stage, which hears of tokens when they are chosen, another hears of them.

        The first one tells them when it is the group's turn again.
        """
        return stage + len(self.groups) - self.count if stage else 0

    def advance(self, *, runs: bool) -> None:
        """One slot. runs: whether a group's step is computed, or only what is known already is told."""
        message = Message()
        shares_head = self.loop._shares_head
        for action in in_slot(self.stage, self.count, len(self.groups), self.slot, shares_head=shares_head):
            match action:
                case Run(group):
                    message = self._turn(group, runs=runs)
                case Shift(_, takes):
                    packed = self.loop.shift(message, self.length, self.most, first=self.slot == 0)
                    if takes is not None:
                        self._take(takes, packed)
                case Head(group):
                    self._choose(group)
        self.slot += 1

    def _turn(self, number: int, *, runs: bool) -> Message:
        """What this stage has to say of a group: its tokens, and what the stage hands on."""
        group, received = self.groups[number], self.received.pop(number, ())
        known = self.latest.get(number, Message())
        if group.is_over or not runs or (self.stage and not received):
            return Message() if self.loop._is_last else known
        made = self.loop.decode(group.next_piece(), received, self.rows[number])
        if self.loop._is_last and self.loop._shares_head:
            self.made = made  # type: ignore[assignment]
            return Message()
        if not self.loop._is_last:
            return Message(known.step, known.tokens, known.logprobs, tuple(made))  # type: ignore[arg-type]
        tokens, logprobs = self.chooser.choose(made, group)  # type: ignore[arg-type]
        self.said.learn(number, tokens, logprobs)
        self.last_chosen = self.slot
        return Message(group.step, tuple(tokens), None if logprobs is None else tuple(logprobs))

    def _choose(self, number: int) -> None:
        """What all stages choose of a group that the last one has just run: they know the same, so all know that."""
        group = self.groups[number]
        if group.is_over:
            return
        made, self.made = self.made, None
        logits = self.loop.head(group.next_piece(), made)
        self.said.learn(number, *self.chooser.choose(logits[:, 0], group))

    def _take(self, number: int, packed: Tensor) -> None:
        group = self.groups[number]
        message = Message.unpack(
            packed,
            self.most,
            count=len(group.texts),
            crossings=self.loop._stage.receives if self.stage else (),
            scored=self.scored,
        )
        if message.values:
            self.received[number] = message.values
        if message.step == group.step + 1:
            self.latest[number] = Message(message.step, message.tokens, message.logprobs)
            self.said.learn(number, list(message.tokens), None if message.logprobs is None else list(message.logprobs))
            self.last_chosen = max(self.last_chosen, self.slot - self._delay(self.stage))
