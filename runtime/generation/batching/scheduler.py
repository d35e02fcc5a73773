"""Which sequences run in the next step: a policy without I/O, the same wherever it is asked the same.

    scheduler.add(7, prompt, most=120)      a sequence; raises InputError where it can never fit
    work = scheduler.next()                 what runs next: pieces of prompts, or one token each; None: nothing
    scheduler.learn(work, {7: 42}, {7})     the tokens that came of it, and who has ended
    scheduler.cancel(7)

Prompts run in pieces under a budget, so that a long one holds nobody up. Where tokens of several sequences may stand
in one row of a run, every other sequence gets its next token in the same step as a piece, by one pass over the weights
(Sarathi, arXiv:2308.16369); elsewhere between two of them. Sequences are served in the order in which they came. One is
given a row when the cache has room for its tokens so far. Where the cache is full, the one that came last gives its
blocks up, and runs its tokens again when there is room (recomputation: PagedAttention, arXiv:2309.06180, section 4.5).
The oldest always goes on, so that all come to their end.

Where ranks share out the tokens of a row, prompts that run together stand at the same position, take as many tokens and
lie in rows that follow each other: then no row is filled up, and none is run in vain.

Where `groups` take turns (pipeline stages), `next(group)` is about one of them, and others may be under way.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Collection, Mapping
from collections.abc import Sequence as Tokens

from partitioner.errors import InputError
from runtime.generation.batching.prefixes.blocks import BlockPool
from runtime.generation.batching.prefixes.row_texts import RowTexts, alike
from runtime.generation.batching.sequence import Sequence
from runtime.generation.batching.work import Counts, Limits, Turn, Work

__all__ = ["Scheduler", "next_alike"]


def next_alike(schedulers: Tokens[Scheduler], group: int = 0) -> list[Work | None]:
    """What the sequences of a group of each run next: all of them pieces of prompts, or all single tokens."""
    if all(each.limits.packs for each in schedulers):
        return [each._packed(group) for each in schedulers]
    ready = [(each, *each._ready(group)) for each in schedulers]
    waits, works = any(others for _, _, others in ready), list[Work | None]()
    if not (waits and any(each.prompts_last[group] for each in schedulers)):
        works = [each._prompts(prompts, group, beside=waits) for each, prompts, _ in ready]
    decode = not any(works)
    if decode:
        works = [each._work(each._single_tokens(others), group, decode=True) for each, _, others in ready]
    if any(works):
        for each in schedulers:
            each.prompts_last[group] = not decode
    return works


class Scheduler:
    """See the module's docstring."""

    def __init__(self, limits: Limits, counts: Counts | None = None) -> None:
        """counts: to go on from."""
        self.limits, self.counts = limits, Counts() if counts is None else counts
        self.pool = BlockPool(limits.blocks)
        self._waiting: deque[Sequence] = deque()
        self._running: dict[int, Sequence] = {}  # by number, in the order in which they were given rows
        self._rows: list[int | None] = [None] * limits.rows
        shared = limits.shared_out
        self._texts = RowTexts(shared) if shared is not None and shared.keeps else None
        """Where rows take over prefixes of others."""
        self._multiple = 1 if shared is None else shared.parts
        self._pending: set[bytes] = set()
        """Keys of blocks that are being computed."""
        self.prompts_last = [False] * limits.groups
        self._arrivals = self._admissions = 0

    # -- what is asked and told ----------------------------------------------------------------------------------------

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def left(self) -> int:
        """How many tokens are still to be run at most."""
        return sum(each.most - each.computed for each in (*self._running.values(), *self._waiting))

    @property
    def tokens_cached(self) -> int:
        """In the cache, also without users; what several share counts once."""
        size = self.limits.block_size
        # what is not full is nobody else's
        empty = sum(len(each.blocks) * size - each.computed for each in self._running.values())
        return self.pool.holding * size - empty

    def last_of(self, block: int) -> tuple[int, int]:
        """The last token that was computed of the sequence that starts in `block`, and its position; or (0, 0)."""
        for each in self._running.values():
            if each.blocks[:1] == [block] and each.computed:
                return each.tokens[each.computed - 1], each.computed - 1
        return 0, 0

    def add(self, number: int, tokens: Tokens[int], *, most: int, piece: int | None = None) -> None:
        """A sequence, of which at most `most` tokens are ever run; piece: how many of its prompt at a time at most."""
        if most > (room := self.limits.room):
            raise InputError(
                f"prompt and new tokens make up to {most + 1}, of which {most} are run, and the cache has room for "
                f"{room} of one request even if there is no other: give a shorter prompt or fewer new tokens, or set a "
                "larger cache aside"
            )
        self._waiting.append(Sequence(number, list(tokens), most, piece, self._arrivals))
        self._arrivals += 1

    def cancel(self, number: int, *, keep: bool = True) -> list[int]:
        """Nobody wants it any more; what is under way of it counts for nothing. The blocks that nobody uses now.

        keep: whether what it has computed may serve others.
        """
        sequence = self._running.get(number)
        if sequence is not None:
            return self._leave(sequence, keep=keep)
        self._waiting = deque(each for each in self._waiting if each.number != number)
        return []

    def next(self, group: int = 0) -> Work | None:
        """What the sequences of a group, none of which is under way, run next."""
        return next_alike([self], group)[0]

    def _ready(self, group: int) -> tuple[list[Sequence], list[Sequence]]:
        """Those of a group that are at their prompts, and those that run single tokens."""
        self._admit(group)
        mine = [each for each in self._running.values() if each.group == group]
        if self.limits.piece == 1:
            return [], mine
        return [each for each in mine if each.left > 1], [each for each in mine if each.left == 1]

    def _prompts(self, prompts: list[Sequence], group: int, *, beside: bool) -> Work | None:
        """Pieces of prompts; beside: whether others wait for their next token."""
        return self._work(self._prompt_pieces(prompts, self._budget(beside=beside)), group, decode=False)

    def _packed(self, group: int) -> Work | None:
        """Single tokens, and pieces of prompts behind them."""
        prompts, others = self._ready(group)
        pieces = self._packed_pieces(prompts, self._budget(beside=bool(others)))
        return self._work(self._single_tokens(others) + pieces, group)

    def _budget(self, *, beside: bool) -> int:
        """Tokens of prompts; beside: whether others wait for their next token."""
        return min(self.limits.budget, self.limits.beside or self.limits.budget) if beside else self.limits.budget

    def learn(self, work: Work, chosen: Mapping[int, int], ended: Collection[int] = ()) -> None:
        """`work` has been run. chosen: the tokens that came of the turns that sample. ended: who needs no more."""
        size = self.limits.block_size
        for turn in work.turns:
            end = turn.start + len(turn.tokens)
            sequence = self._running.get(turn.number)
            if sequence is not None and sequence.admission == turn.admission:
                sequence.computed = end
                if self._texts is not None:
                    self._texts.add(turn.table[0], turn.start, turn.tokens, dealt_out=not work.decode)
            else:
                # it has lost its place meanwhile, or was cancelled: the token is right all the same
                sequence = next((each for each in self._waiting if each.number == turn.number), None)
            self._pending.difference_update(turn.keys)
            if sequence is not None and sequence.row >= 0:
                keys = turn.keys or self._completed(sequence, turn.start, end)
                for index, key in enumerate(keys, turn.start // size):
                    self.pool.keep(sequence.blocks[index], key)
                self._give_back(sequence)
            if sequence is not None and turn.number in chosen:
                sequence.tokens.append(chosen[turn.number])
                if turn.number in ended:
                    self.cancel(turn.number)

    # -- the policy ----------------------------------------------------------------------------------------------------

    def may_admit(self, group: int, *, unread: int = 0) -> bool:
        """Whether the group's next step may give a row to one that waits; unread: tokens that it has not learnt of."""
        left = [-unread if each == group else 0 for each in range(self.limits.groups)]
        for each in self._running.values():
            left[each.group] += each.most - each.computed
        return bool(self._waiting) and None in self._rows and left[group] == min(left)

    def _admit(self, group: int) -> None:
        """Rows for those that wait, in their order, while there is room."""
        while self.may_admit(group) and self._has_room(self._waiting[0]):
            row = self._rows.index(None)
            sequence = self._waiting.popleft()
            self._rows[row] = sequence.number
            sequence.row, sequence.group, sequence.known = row, group, len(sequence.tokens)
            sequence.admission, self._admissions = self._admissions, self._admissions + 1
            self._running[sequence.number] = sequence
            self._share(sequence)

    def _has_room(self, sequence: Sequence) -> bool:
        """Whether all its tokens fit beside those of the others, and each of these that may grow can by a block."""
        found = taken = 0
        for index in range(self._shareable(sequence)):
            key = sequence.key(index, self.limits.block_size)
            if not self.pool.has(key):
                break
            found += 1
            taken += not self.pool.is_used(key)
        owed = 0
        for each in self._running.values():
            known = self._blocks_of(len(each.tokens))
            owed += known - len(each.blocks) + (self._blocks_of(each.most) > known)
        needed = self._blocks_of(len(sequence.tokens)) - found + taken
        return needed + owed <= self.pool.free

    def _shareable(self, sequence: Sequence) -> int:
        """How many of its blocks may be another's: the last token is run in any case, for what comes of it."""
        return (len(sequence.tokens) - 1) // self.limits.block_size if self.limits.keeps_prefixes else 0

    def _share(self, sequence: Sequence) -> bool:
        """Takes over blocks that others have computed. False: the next one is being computed by another just now."""
        size = self.limits.block_size
        while sequence.computed % size == 0 and (index := sequence.computed // size) < self._shareable(sequence):
            key = sequence.key(index, size)
            if key in self._pending:
                return False
            block = self.pool.share(key)
            if block is None:
                break
            if index < len(sequence.blocks):
                self.pool.release(sequence.blocks[index : index + 1])
                sequence.blocks[index] = block
            else:
                sequence.blocks.append(block)
            sequence.computed += size
            self.counts.prefix_hits += size
        return True

    def _packed_pieces(self, prompts: list[Sequence], budget: int) -> list[Turn]:
        """As many tokens of each, in their order, as are left of the budget: none is filled up."""
        turns, one = list[Turn](), sum(each.left for each in prompts) < self.limits.one_prompt_below
        for sequence in prompts:
            if sequence.row < 0 or not self._share(sequence):
                continue  # it has lost its place to one before it; or another computes just now what it begins with
            count = self._piece(sequence, sequence.left, budget)
            turn = self._turn(sequence, count) if count else None
            if turn is not None:
                turns.append(turn)
                budget -= count
                if one:
                    break
        return turns

    def _prompt_pieces(self, prompts: list[Sequence], budget: int) -> list[Turn]:
        """The first says how many tokens; others join with as many at most, as long as all fit into the budget."""
        turns: list[Turn] = []
        width = 0
        for sequence in prompts:
            if sequence.row < 0:
                continue  # it has lost its place to one before it
            if not self._share(sequence) or self._is_awaited(sequence):
                continue  # in the next step it has what another computes in this one
            source = self._source(sequence)
            start = sequence.computed if source is None else source[1]
            count = self._piece(sequence, len(sequence.tokens) - start, width or budget)
            width = width or count
            if (len(turns) + 1) * width > budget:
                break
            if (self.limits.alike and count < width) or (turns and not self._joins(turns, sequence, start, count)):
                continue  # until it is the first of them
            turn = self._turn(sequence, count, source)
            if turn is not None:
                turns.append(turn)
        return turns

    def _piece(self, sequence: Sequence, left: int, most: int) -> int:
        """How many tokens of a prompt run next: all that are left, or a number that ranks share out evenly."""
        most = min(most, self.limits.piece or most)
        count = min(left, sequence.piece or left, most)
        if count == left or most < self._multiple:
            return count
        return min(left, max(self._multiple, count - count % self._multiple))

    def _joins(self, turns: list[Turn], sequence: Sequence, start: int, count: int) -> bool:
        """Whether it may run with the others of a step, where these must lie beside each other and be as far."""
        if self.limits.shared_out is None:
            return True
        rows = [turn.table[0] for turn in turns]
        row = sequence.blocks[0] if sequence.blocks else self.pool.next(fresh=self._texts is not None)
        is_even = count % self._multiple == 0 or start + count == len(sequence.tokens)
        return is_even and start == turns[0].start and row in (min(rows) - 1, max(rows) + 1)

    def _source(self, sequence: Sequence) -> tuple[int, int] | None:
        """Which prefix a sequence that has no row of the cache yet takes over."""
        found = None if self._texts is None or sequence.blocks else self._texts.longest(sequence.tokens)
        if found is not None:
            self.pool.refresh(found[0])
        return found

    def _is_awaited(self, sequence: Sequence) -> bool:
        """Whether one before it is at a prompt that begins more like its own than what any row has."""
        shared = self.limits.shared_out
        if self._texts is None or shared is None or sequence.blocks:
            return False
        found = self._texts.longest(sequence.tokens)
        more = (0 if found is None else found[1]) + shared.least
        before = itertools.takewhile(lambda each: each is not sequence, self._running.values())
        most = len(sequence.tokens) - 1
        return any(each.left > 1 and alike(each.tokens, sequence.tokens, most) >= more for each in before)

    def _single_tokens(self, sequences: list[Sequence]) -> list[Turn]:
        return [turn for each in sequences if each.row >= 0 and (turn := self._turn(each, 1)) is not None]

    def _work(self, turns: list[Turn], group: int, *, decode: bool | None = None) -> Work | None:
        """decode: None for whether every turn is left with one token."""
        left = tuple(turn for turn in turns if self._is_on(turn))
        if len(left) < len(turns):
            self._pending.difference_update(*(turn.keys for turn in turns if not self._is_on(turn)))
        if not left:
            return None
        if decode is None:
            decode = all(len(turn.tokens) == 1 for turn in left)
        prompt = sum(max(0, min(len(turn.tokens), self._running[turn.number].known - turn.start)) for turn in left)
        self.counts.prefill_tokens += prompt
        self.counts.decode_tokens += sum(len(turn.tokens) for turn in left) - prompt
        return Work(left, decode, group, packed=self.limits.packs and not decode)

    def _is_on(self, turn: Turn) -> bool:
        """Whether it still has the place that it had: one before it may have needed its blocks."""
        sequence = self._running.get(turn.number)
        return sequence is not None and sequence.admission == turn.admission

    def _turn(self, sequence: Sequence, count: int, source: tuple[int, int] | None = None) -> Turn | None:
        if source is not None:
            sequence.computed = source[1]
            self.counts.prefix_hits += source[1]
        end = sequence.computed + count
        while len(sequence.blocks) < self._blocks_of(end):
            block = self.pool.take(fresh=self._texts is not None)
            if block is not None:
                sequence.blocks.append(block)
                if self._texts is not None:
                    self._texts.begin(block, source)
                continue
            # of those that have a place, the last that came
            victim = max(self._running.values(), key=lambda each: each.arrival)
            self._preempt(victim)
            if victim is sequence:
                return None
        start, keys = sequence.computed, self._completed(sequence, sequence.computed, end)
        self._pending.update(keys)
        return Turn(
            sequence.number,
            sequence.row,
            start,
            tuple(sequence.tokens[start:end]),
            samples=end == len(sequence.tokens),
            table=tuple(sequence.blocks[: self._blocks_of(end)]),
            admission=sequence.admission,
            keys=keys,
            source=source,
        )

    def _completed(self, sequence: Sequence, start: int, end: int) -> tuple[bytes, ...]:
        """Keys of the blocks that tokens `start` to `end` complete, where they may be shared."""
        size = self.limits.block_size
        if not self.limits.keeps_prefixes or start // size == end // size:
            return ()
        return tuple(sequence.key(index, size) for index in range(start // size, end // size))

    def _preempt(self, sequence: Sequence) -> None:
        self.counts.preemptions += 1
        self._leave(sequence)
        # among those that wait, where it came
        at = next((at for at, each in enumerate(self._waiting) if each.arrival > sequence.arrival), len(self._waiting))
        self._waiting.insert(at, sequence)

    def _leave(self, sequence: Sequence, *, keep: bool = True) -> list[int]:
        del self._running[sequence.number]
        self._rows[sequence.row] = None
        done = self.pool.release(sequence.blocks[sequence.behind :], keep=keep)
        if self._texts is not None and not keep:
            for block in done:
                self._texts.forget(block)
        sequence.row, sequence.blocks, sequence.behind, sequence.computed = -1, [], 0, 0
        return done

    def _give_back(self, sequence: Sequence) -> None:
        """The blocks that lie whole behind what its next token sees."""
        if self.limits.sees is None:
            return
        end = (sequence.computed - self.limits.sees + 1) // self.limits.block_size
        if end <= sequence.behind:
            return
        done = sequence.blocks[sequence.behind : end]
        self.pool.release(done)
        sequence.blocks[sequence.behind : end] = [self.limits.blocks] * len(done)
        sequence.behind = end
        self.counts.blocks_behind += len(done)

    def _blocks_of(self, tokens: int) -> int:
        return -(-tokens // self.limits.block_size)
