"""Where a program is cut into stages: the slowest stage as fast as can be, and little crossing.

    place          between two readers of weights, where what crosses is whole, complete tensors
    cost           of a stage: for each node the longer of its bytes and its products, for what it hands on its bytes
    prefill        products count: a text of many tokens, its logits for the last one only where it generates
    decode         bytes count: one token
    head           its rows on the last stage, or shared out over all: a step of decode is then that of the slowest
                   stage's layers, an equal share of the head, and two meetings more

Dynamic programming over the places, as in PipeDream (arXiv:1806.03377, section 3.1), for stages of one kind or of given
speeds. Of cuts that are as good within half a percent, the one over whose boundaries the fewest bytes go.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

from partitioner.analysis.cost.local_sizes import RankSizes, bytes_of
from partitioner.analysis.cost.node_cost import NodeCost, node_costs
from partitioner.analysis.stages.order_nodes import NodeClasses, can_cross, classify, levels_of, settle
from partitioner.analysis.stages.shared_head import find_head
from partitioner.errors import PlanError
from partitioner.program.node_arguments import node_values
from partitioner.program.program import Program
from partitioner.program.stages import StageTable
from runtime.ops.attention import attention

__all__ = ["Balance", "choose_cuts"]

Balance = str
"""prefill | decode"""

FLOPS_PER_BYTE = 200
"""Products in the time of one byte read: between a data centre GPU's bfloat16 (300) and a processor's (20 to 50)."""
LINK = 10
"""A byte sent to the next stage takes as long as so many read."""
MEETING = 30_000_000
"""A meeting of all stages takes as long as so many bytes read: 10 microseconds of a data centre GPU's memory."""
BEGINNING = 15_000_000
"""A product reads so many bytes less than memory could be read in its time, or a third less where it reads few: until
it is up to speed. 5 microseconds of a data centre GPU's memory: a layer of many matrices takes longer than its bytes, a
vocabulary's one matrix does not."""
PREFILL_TOKENS = 16384
"""Of a prompt that stages are cut for. Long ones are what stages make quicker: there a layer's attention counts, which
is not where its other products are, and what is read once, as a vocabulary's rows are for the last token, does not."""
_AS_GOOD = 1.005
_WORTH = 0.01
"""What a decode cycle must gain for its head to be shared out: costs are no more exact than that."""


@dataclass(frozen=True)
class _Places:
    """readers: in order; costs: per reader, of the nodes of its level; crossing: bytes over the place behind each
    reader but the last, None where it is no place to cut.
    """

    readers: tuple[fx.Node, ...]
    costs: tuple[float, ...]
    crossing: tuple[int | None, ...]
    weights: tuple[frozenset[str], ...]
    pairs_per_token: int


def choose_cuts(
    program: Program,
    count: int,
    *,
    balance: Balance,
    speeds: Sequence[float],
    starts: Sequence[str],
    shares_head: bool | None,
) -> StageTable:
    """The table of `count` stages of a program that is laid out.

    speeds: how fast each stage's ranks are, relative to each other. starts: the modules or weights at which the second
    stage and those after it begin, in place of what costs say. shares_head: whether all stages share out the rows of
    the vocabulary head; None: in decode, where the slowest stage gains by it.
    """
    places = _places(program, classify(program), balance)
    alone = _table(program, places, count, balance, speeds, starts)
    if shares_head is False or (shares_head is None and balance != "decode"):
        return alone
    try:
        shared = _with_shared_head(program, places, count, balance, speeds, starts)
        if shares_head:
            return replace(shared, costs_alone=alone.costs)
    except PlanError as reason:
        if shares_head:
            raise PlanError(f"the head cannot be shared out over pp={count} stages: {reason}") from reason
        return replace(alone, why_alone=str(reason))
    meetings = 2 * MEETING + LINK * shared.crossing_bytes[-1]
    gain = _slowest(alone) / (_slowest(shared) + meetings) - 1
    if gain >= _WORTH:
        return replace(shared, costs_alone=alone.costs)
    than = "shorter" if gain > 0 else "longer"
    return replace(
        alone, why_alone=f"shared out, a step would be {abs(gain):.1%} {than}, with two more meetings of all"
    )


def _slowest(table: StageTable) -> float:
    """What the slowest stage takes, with what it hands on."""
    handed = [*table.crossing_bytes, 0][: table.count]
    pairs = zip(table.costs, handed, table.speeds, strict=True)
    return max((cost + LINK * size) / speed for cost, size, speed in pairs)


def _with_shared_head(
    program: Program,
    places: _Places,
    count: int,
    balance: Balance,
    speeds: Sequence[float],
    starts: Sequence[str],
) -> StageTable:
    """The layers cut without the head, whose rows are shared out. crossing_bytes: also what goes to all for it."""
    head = find_head(program)
    if places.readers[-1] is not head.product or len(places.readers) < 2:
        raise PlanError(f"weights are read behind the head of {program.name}")
    if (sent := places.crossing[-1]) is None:
        raise PlanError(f"what the head of {program.name} reads is in parts, or no tensor")
    *costs, own = places.costs
    before = replace(
        places,
        readers=places.readers[:-1],
        costs=tuple(costs),
        crossing=places.crossing[:-1],
        weights=places.weights[:-1],
    )
    found = _table(program, before, count, balance, speeds, starts)
    fast = sum(found.speeds)
    return replace(
        found,
        of_weight={**found.of_weight, **{name: frozenset({count}) for name in head.names}},
        costs=tuple(cost + own * speed / fast for cost, speed in zip(found.costs, found.speeds, strict=True)),
        crossing_bytes=(*found.crossing_bytes, sent),
        shares_head=True,
    )


def _table(
    program: Program,
    places: _Places,
    count: int,
    balance: Balance,
    speeds: Sequence[float],
    starts: Sequence[str],
) -> StageTable:
    possible = sum(crossing is not None for crossing in places.crossing)
    if possible < count - 1:
        raise PlanError(
            f"pp={count}: {program.name or 'this program'} can be cut at {possible} places, into at most "
            f"{possible + 1} stages"
        )
    cuts = _by_hand(program, places, starts, count) if starts else _by_cost(places, count, speeds)
    if cuts is None:
        raise PlanError(f"pp={count}: no {count - 1} of the {possible} places to cut {program.name} are apart")
    ends = [*cuts, len(places.readers) - 1]
    held: dict[str, set[int]] = {}
    for number, names in enumerate(places.weights):
        stage = next(k for k, end in enumerate(ends) if number <= end)
        for name in names:
            held.setdefault(name, set()).add(stage)
    begins = [0, *(end + 1 for end in ends[:-1])]
    costs = tuple(sum(places.costs[begin : end + 1]) for begin, end in zip(begins, ends, strict=True))
    return StageTable(
        {name: frozenset(stages) for name, stages in held.items()},
        count,
        costs=costs,
        crossing_bytes=tuple(places.crossing[cut] or 0 for cut in cuts),
        places=possible,
        balance="stage_starts" if starts else balance,
        pairs_per_token=places.pairs_per_token,
        speeds=tuple(speeds) or (1.0,) * count,
    )


# -- places and costs --------------------------------------------------------------------------------------------------


def _places(program: Program, classes: NodeClasses, balance: Balance) -> _Places:
    readers = tuple(node for node in classes.ordered if node in classes.weights_of)
    levels = settle(program, classes, levels_of(classes), len(readers) - 1)
    costs = [0.0] * len(readers)
    at = program.mesh.coordinates(0)
    sizes = _sizes(program, PREFILL_TOKENS if balance == "prefill" else 1)
    by_name = {node.name: level for node, level in levels.items()}
    once = _after_last_token(program, classes) if balance == "prefill" else frozenset[str]()
    attends = {node.name for node in classes.ordered if node.target is attention}
    attending = other = 0
    for number, found in ((0, sizes), (1, _sizes(program, 1))):
        if number and not once:
            continue
        for cost in node_costs(program, at, found):
            if not number:
                attending += cost.flops if cost.name in attends else 0
                other += 0 if cost.name in attends or cost.name in once else cost.flops
            if cost.name in by_name and (cost.name in once) == bool(number):
                costs[by_name[cost.name]] += _read_as(cost)
    rank = RankSizes(program, at, sizes)
    places = max(len(readers) - 1, 0)
    bytes_, refused = [0] * (places + 1), [0] * (places + 1)
    for node in classes.ordered:
        last = max((len(readers) - 1 if u.op == "output" else levels.get(u, 0) for u in node.users), default=0)
        start = levels[node]
        if last <= start:
            continue
        # a difference at both ends, summed up below
        can = can_cross(program, node)
        size = bytes_of(rank.shapes(node)[0], node_values(node)[0]) if can else 0
        for change, values in ((size, bytes_), (int(not can), refused)):
            values[start] += change
            values[last] -= change
    crossing: list[int | None] = []
    total = blocked = 0
    for place in range(places):
        total, blocked = total + bytes_[place], blocked + refused[place]
        crossing.append(None if blocked else total)
    # of a causal text of n tokens: n (n + 1) / 2 pairs, n tokens
    pairs = other * (sizes.get("sequence", 1) + 1) // (2 * attending) if attending else 0
    return _Places(readers, tuple(costs), tuple(crossing), tuple(classes.weights_of[node] for node in readers), pairs)


def _read_as(cost: NodeCost) -> float:
    """In bytes: the longer of what is read and written, and of the products; and what a product takes to begin."""
    moved = float(cost.bytes_read + cost.bytes_written)
    begins = min(BEGINNING, moved / 2) if cost.flops else 0.0
    return max(moved + begins, cost.flops / FLOPS_PER_BYTE)


def _sizes(program: Program, tokens: int) -> dict[str, int]:
    found = {}
    for name in program.symbols:
        low, high = program.limits.get(name, (1, None))
        wanted = 1 if name == "batch" else tokens
        found[name] = max(low, wanted if high is None else min(wanted, high))
    return found


def _after_last_token(program: Program, classes: NodeClasses) -> frozenset[str]:
    """What a prompt needs of its last token only: the product that yields logits, and what follows it."""
    (node, *others) = program.graph.output_node().all_input_nodes
    found: list[fx.Node] = []
    if others or not program.has_head:
        return frozenset()
    while node.op == "call_function":
        found.append(node)
        before = classes.before(node)
        if node in classes.weights_of and torch.Tag.pointwise not in getattr(node.target, "tags", ()):
            return frozenset(each.name for each in found)
        if len(before) != 1:
            break
        (node,) = before
    return frozenset()


# -- cuts --------------------------------------------------------------------------------------------------------------


def _by_cost(places: _Places, count: int, speeds: Sequence[float]) -> list[int] | None:
    given = list(speeds) or [1.0] * count
    if len(given) != count or not all(isinstance(x, (int, float)) and x > 0 for x in given):
        raise PlanError(f"stage_weights must be {count} numbers above 0, one for each of pp={count}; got {given}")
    readers = len(places.readers)
    price = torch.tensor([float("inf") if c is None else float(c) for c in places.crossing], dtype=torch.float64)
    before = torch.cat([torch.zeros(1), torch.tensor(places.costs)]).double().cumsum(0)
    if count == 1:
        return []
    # [i, j]: of a stage from reader i to before reader j, its cost and that of what it hands on
    handed = torch.cat([torch.full((1,), float("inf")), price * LINK, torch.zeros(1)])
    costs = before[None] - before[:, None] + handed[None]
    costs.masked_fill_(torch.ones_like(costs, dtype=torch.bool).tril(), float("inf"))
    at_speed = {speed: costs / speed for speed in given}
    slowest = at_speed[given[0]][0]
    for speed in given[1:]:
        slowest = torch.maximum(slowest[:, None], at_speed[speed]).amin(dim=0)
    best = slowest[readers].item()
    if best == float("inf"):
        return None
    limit = best * _AS_GOOD
    sent = torch.cat([torch.zeros(1), price, torch.zeros(1)])
    too_slow = {speed: each > limit for speed, each in at_speed.items()}
    fewest = sent.masked_fill(too_slow[given[0]][0], float("inf"))
    chosen = [torch.zeros(readers + 1, dtype=torch.int64)]
    for speed in given[1:]:
        totals = (fewest[:, None] + sent[None]).masked_fill_(too_slow[speed], float("inf"))
        fewest, begins = totals.min(dim=0)
        chosen.append(begins)
    cuts, j = list[int](), readers
    for k in range(count - 1, 0, -1):
        j = int(chosen[k][j])
        cuts.insert(0, j - 1)
    return cuts


def _by_hand(program: Program, places: _Places, starts: Sequence[str], count: int) -> list[int]:
    if len(starts) != count - 1:
        raise PlanError(
            f"stage_starts must name where stages 1 to {count - 1} begin, {count - 1} in all for pp={count}; got "
            f"{list(starts)}"
        )
    cuts: list[int] = []
    for start in starts:
        found = [number for number, names in enumerate(places.weights) if _is_at(start, places.readers[number], names)]
        if not found:
            known = sorted({str(node.meta.get("path") or "") for node in places.readers})
            near = difflib.get_close_matches(start, known, n=1) or known[-1:]
            raise PlanError(f"stage_starts names {start!r}, where {program.name} reads no weight; near it: {near[0]!r}")
        cut = found[0] - 1
        if cut < 0 or (cuts and cut <= cuts[-1]):
            raise PlanError(f"stage_starts must stand in the model's order, none at its beginning; got {list(starts)}")
        if places.crossing[cut] is None:
            can = [n + 1 for n, crossing in enumerate(places.crossing) if crossing is not None]
            nearest = places.readers[min(can, key=lambda number: abs(number - found[0]))]
            raise PlanError(
                f"a stage cannot begin at {start!r}: what crosses there is in parts, or no tensor; the nearest place "
                f"is {nearest.meta.get('path') or nearest.name!r}"
            )
        cuts.append(cut)
    return cuts


def _is_at(start: str, node: fx.Node, weights: frozenset[str]) -> bool:
    return any(name == start or name.startswith(start + ".") for name in (str(node.meta.get("path") or ""), *weights))
