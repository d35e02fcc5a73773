"""Decode over stages with the host in each slot: in slot t stage k runs group t - k, then all shift by one.

The last stage chooses tokens. They go to the first stage at once, and on from there with the hidden states of their own
group, so that every rank knows every token a few slots later: each has the conversations, knows who has ended, and
returns the result. A group that has ended sends messages without values. All ranks leave the ring after the slot in
which the last of them has learnt the last token, which each computes from when it learnt it.

Where the stages share out the vocabulary head, all of them choose, behind the shift of the same slot: everybody knows
every token at once, messages carry values only, and all leave behind the slot in which the last token was chosen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from runtime.generation.choose_tokens import TokenChooser
from runtime.generation.conversation import Conversation
from runtime.generation.generation_request import Step
from runtime.generation.staged.group_results import GroupResults
from runtime.generation.staged.part import Part
from runtime.pipeline.message import Message, MessageReader, MessageWriter
from runtime.pipeline.schedule import Action, Head, Run, Shift, in_slot

__all__ = ["Ring"]

_NOTHING = Message()


class Ring:
    """The slots of one request on one rank. length: of messages; scored: whether they tell log-probabilities."""

    def __init__(
        self,
        part: Part,
        groups: list[Conversation],
        rows: list[slice],
        chooser: TokenChooser,
        results: GroupResults,
        length: int,
        *,
        scored: bool,
    ) -> None:
        self.part, self.groups, self.rows, self.chooser, self.results = part, groups, rows, chooser, results
        self.most = max(len(group.texts) for group in groups)
        self.stage, self.count = part.stage.index, part.stage.count
        self.slot = 0
        every = range(self.count + len(groups))  # from then on they come again
        shares = part.shares_head
        self._slots = [_flat(in_slot(self.stage, self.count, len(groups), slot, shares_head=shares)) for slot in every]
        self._writer = MessageWriter(length, self.most, part.device)
        self._reader = MessageReader(self.most, part.stage.receives if self.stage else (), scored=scored)
        self._permute = part.channel.persistent_permute(self._writer.packed, 1)
        self.received: dict[int, tuple[Tensor, ...]] = {}
        self.made: tuple[Tensor, ...] | None = None
        """On the last stage of those that share the head: what it has made in this slot."""
        self.chosen: Message | None = None
        """On the last stage of others: what it has chosen in this slot, and not learnt."""
        self.last_chosen = -1
        """The latest slot in which the last stage chose tokens that this rank knows."""
        self.latest: dict[int, Message] = {}
        """What each group was given last."""

    def steps(self) -> Iterator[Step]:
        while not (self.results.is_over and self.slot > self._end):
            self.advance(runs=True)
            if self.results.has_next:
                try:
                    yield self.results.next()
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
        message = _NOTHING
        again = self.count + (self.slot - self.count) % len(self.groups)
        runs_group, own, takes, head = self._slots[min(self.slot, again)]
        if runs_group is not None:
            message = self._turn(runs_group, runs=runs)
        self._writer.write(*message)
        self.part.communicator.begin_run(new_shapes=self.slot == 0)
        self._permute.begin()
        if own is not None and self.chosen is not None:  # while the others have their message already
            self.results.learn(own, self.chosen.tokens, self.chosen.logprobs)
            self.chosen = None
        packed = self._permute.finish()
        if takes is not None:
            self._take(takes, packed)
        if head is not None:
            self._choose(head)
        self.slot += 1

    def _turn(self, number: int, *, runs: bool) -> Message:
        """What this stage has to say of a group: its tokens, and what the stage hands on."""
        group, received = self.groups[number], self.received.pop(number, ())
        known = self.latest.get(number, _NOTHING)
        if group.is_over or not runs or (self.stage and not received):
            return _NOTHING if self.part.is_last else known
        made = self.part.run.decode(group.next_piece(), received, rows=self.rows[number])
        if self.part.is_last and self.part.shares_head:
            self.made = made
            return _NOTHING
        if not self.part.is_last:
            return Message(known.step, known.tokens, known.logprobs, tuple(made))
        tokens, logprobs = self.chooser.choose(made, group)
        self.last_chosen = self.slot
        self.chosen = Message(group.step + 1, tuple(tokens), None if logprobs is None else tuple(logprobs))
        return self.chosen

    def _choose(self, number: int) -> None:
        """What all stages choose of a group that the last one has just run: they know the same, so all know that."""
        group = self.groups[number]
        if group.is_over:
            return
        made, self.made = self.made, None
        logits = self.part.run.head(group.next_piece(), made, decode=True)
        self.results.learn(number, *self.chooser.choose(logits[:, 0], group))

    def _take(self, number: int, packed: Tensor) -> None:
        group = self.groups[number]
        message = self._reader.read(packed, len(group.texts))
        if message.values:
            self.received[number] = message.values
        if message.step == group.step + 1:
            self.latest[number] = message._replace(values=())
            self.results.learn(number, message.tokens, message.logprobs)
            self.last_chosen = max(self.last_chosen, self.slot - self._delay(self.stage))


def _flat(actions: Sequence[Action]) -> tuple[int | None, int | None, int | None, int | None]:
    """What one stage does in one slot, which has one order: the group that it runs; that which it hands on and that
    which it takes in the shift; the one that all choose for behind it.
    """
    order = [(Run, Shift, Head).index(type(each)) for each in actions]
    assert order == sorted(order)
    runs = next((each.piece for each in actions if isinstance(each, Run)), None)
    shift = next(each for each in actions if isinstance(each, Shift))
    head = next((each.piece for each in actions if isinstance(each, Head)), None)
    return runs, shift.piece, shift.takes, head
