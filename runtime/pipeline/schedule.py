"""Schedules: what each stage does in which order, as lists of actions that run nothing by themselves.

    whole text, prompts    a chain; piece i + 1 is received while piece i runs, or right behind it, a send ends when it
                           is next in the way
    decode                 a ring; in slot t stage k runs group t - k, then all shift by one stage in one permute
    captured decode        a relay; in turn t every stage runs group t, when what it needs has come
    shared head            in decode behind the shift, of the group that the last stage has run; of a chain, at its end

    stage 0     0 1 2 3 .          A B A B       the receive of a piece is begun before the piece in front of it runs,
    stage 1     . 0 1 2 3          . A B A       so that a stage never waits for a transfer that could have started

The order of a ring that suggests itself (learn, run, send; receive, run, choose, tell) waits for ever where nothing is
buffered: stage 0 to send its second group, the last stage to tell the tokens of the first. One permute per slot does
not. Neither does a relay, whose stages take in the next turn before they hand on this one, but for the first stage,
which hands on first. Stages of a relay meet in pairs only: with a group more than stages, a transfer takes place while
both its ends compute. Pipelines of pieces: GPipe, arXiv:1811.06965, section 2.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = [
    "Action",
    "Head",
    "Receive",
    "Run",
    "Send",
    "Shift",
    "Timelines",
    "bubble",
    "chain",
    "groups_of",
    "in_turn",
    "naive_ring",
    "pieces_of",
    "relay",
    "ring",
]

PIECES_PER_STAGE = 8
"""Into how many pieces a batch is divided at most: with m pieces, p stages are idle for (p - 1) / (m + p - 1)."""


@dataclass(frozen=True)
class Run:
    """Compute a piece (of a chain) or a step of a group (of a ring)."""

    piece: int


@dataclass(frozen=True)
class Receive:
    """Begin to take a piece from the stage before."""

    piece: int


@dataclass(frozen=True)
class Send:
    """Begin to hand a piece to the next stage."""

    piece: int


@dataclass(frozen=True)
class Shift:
    """All stages hand on at once: `piece` goes to the next stage, the last stage's tokens to the first.

    takes: the group that comes from the stage before. None: nothing but what fills the message.
    """

    piece: int | None
    takes: int | None


@dataclass(frozen=True)
class Head:
    """All stages at once: what the last one has made of a piece, or of a group, through a head that they share out."""

    piece: int


Action = Run | Receive | Send | Shift | Head
Timelines = tuple[tuple[Action, ...], ...]
"""Per stage, its actions in order."""


def pieces_of(rows: int, stages: int) -> list[slice]:
    """A batch in equal pieces, as far as that goes."""
    count = min(rows, PIECES_PER_STAGE * stages)
    return [slice(rows * i // count, rows * (i + 1) // count) for i in range(count)]


def groups_of(rows: int, stages: int, *, groups: int | None = None) -> list[slice]:
    """The rows of each of as many groups as there are stages, or more; none in the last ones where rows are fewer.

    groups: how many get rows; None: as many as there are stages.
    """
    wanted = stages if groups is None else groups
    used = min(rows, wanted)
    found = [slice(rows * i // used, rows * (i + 1) // used) for i in range(used)]
    return found + [slice(rows, rows)] * (max(stages, wanted) - used)


def chain(stages: int, pieces: int, *, heads: Sequence[int] = (), early: bool = True) -> Timelines:
    """Pieces one after the other through all stages. heads: those that then go through a head which all share out.

    early: whether a receive is begun before the piece in front of it runs. A GPU's waits in a kernel, which takes room
    from those of the piece: there it is begun behind them, when what it is for has mostly been computed.
    """
    found = []
    for stage in range(stages):
        actions: list[Action] = [Receive(0)] if stage and pieces else []
        for piece in range(pieces):
            receive = [Receive(piece + 1)] if stage and piece + 1 < pieces else []
            actions += [*receive, Run(piece)] if early else [Run(piece), *receive]
            if stage + 1 < stages:
                actions.append(Send(piece))
        found.append((*actions, *map(Head, heads)))
    return tuple(found)


def ring(stages: int, groups: int, slots: int, *, shares_head: bool = False) -> Timelines:
    """`slots` slots of a decode with as many groups as stages or more; the first slots fill the stages one by one."""
    return tuple(
        tuple(
            action for slot in range(slots) for action in in_slot(stage, stages, groups, slot, shares_head=shares_head)
        )
        for stage in range(stages)
    )


def in_slot(stage: int, stages: int, groups: int, slot: int, *, shares_head: bool) -> Sequence[Action]:
    """What one stage does in one slot."""
    own, takes = group_at(stage, groups, slot), group_at(stage - 1, groups, slot)
    if stage == 0:
        takes = group_at(stages - 1, groups, slot)
    done = group_at(stages - 1, groups, slot) if shares_head else None
    return [
        *([Run(own)] if own is not None else []),
        Shift(own, takes),
        *([Head(done)] if done is not None else []),
    ]


def group_at(stage: int, groups: int, slot: int) -> int | None:
    """The group that a stage runs in a slot; None before the first has come to it."""
    return (slot - stage) % groups if slot >= stage else None


def relay(stages: int, groups: int, turns: int, *, shares_head: bool = False) -> Timelines:
    """`turns` turns of a decode with as many groups as stages or more: turn t is about group t % groups."""
    return tuple(
        (
            *(Receive(0) for _ in range(min(stage, turns, 1))),
            *(
                action
                for turn in range(turns)
                for action in in_turn(stage, stages, groups, turn, more=turn + 1 < turns, shares_head=shares_head)
            ),
        )
        for stage in range(stages)
    )


def in_turn(stage: int, stages: int, groups: int, turn: int, *, more: bool, shares_head: bool) -> Sequence[Action]:
    """What one stage does in one turn. more: whether another comes; behind the last one nothing is under way.

    What the last stage sends is what the group's next turn begins with, and has its number. Where all stages share out
    the head, it sends nothing: all meet when it has run a turn, which the others are ahead of.
    """
    if shares_head:
        done = turn - (stages - 1 - stage)
        heads = range(done, done + 1 if more else turn + 1)
        return [
            Run(turn),
            *([Receive(turn + 1)] if stage and more else []),
            *([Send(turn)] if stage + 1 < stages else []),
            *(Head(each) for each in heads if each >= 0),
        ]
    if stage:
        sends = turn + groups if stage + 1 == stages else turn
        return [Run(turn), *([Receive(turn + 1)] if more else []), Send(sends)]
    # the last stage comes to a turn when the first one is so many turns ahead
    ready = range(turn - stages + 1, turn - stages + 2 if more else turn + 1)
    return [Run(turn), Send(turn), *(Receive(done + groups) for done in ready if done >= 0)]


def naive_ring(stages: int, groups: int, rounds: int) -> Timelines:
    """The order that waits for ever without buffers; here to be told as wrong, and to be drawn beside the others.

    Pieces from `groups` on are tokens that go from the last stage to the first.
    """
    found = []
    for stage in range(stages):
        actions: list[Action] = []
        for step in range(rounds):
            for group in range(groups):
                if stage == 0:
                    actions += [Receive(groups + group)] if step else []
                else:
                    actions.append(Receive(group))
                actions.append(Run(group))
                last = stage + 1 == stages
                actions.append(Send(groups + group if last else group))
        found.append(tuple(actions))
    return tuple(found)


def bubble(stages: int, pieces: int) -> float:
    """The share of time that equal stages are idle for."""
    return (stages - 1) / (pieces + stages - 1)
