"""The expert-parallel pass: the routed experts of every layer are divided among the ranks of ep.

    replicate   every rank has all tokens:   localise_experts -> its experts -> combine    a partial sum, all-reduced
    gather      ranks have their own tokens: collect_rows -> as above -> scatter_rows      the same graph, by layouts
    exchange    ranks have their own tokens: expert_send -> its experts -> combine -> expert_return   two all-to-alls

The pass writes these ops around the dispatch, grouped linears and combine that were captured, and splits the weights
of experts. It inserts no collectives: tensor-parallel, which runs next, lays out everything else and puts collectives
where layouts differ. GShard (arXiv:2006.16668, section 3.2) divides experts this way; that a token is sent at most once
to each rank is from arXiv:2412.19437, section 3.2.2.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx

from partitioner.analysis.cost.expert_exchange import OwnTokens, destinations
from partitioner.analysis.layouts.expert_regions import Region, find_regions
from partitioner.analysis.layouts.partial_sums import joins_a_product
from partitioner.errors import PlanError
from partitioner.program.balance import Owners, deal
from partitioner.program.node_arguments import arguments
from partitioner.program.program import Entry, Program, Value
from partitioner.sharding.index_set import IndexSet
from partitioner.sharding.layout import REPLICATED, Split
from runtime.ops.communicating import axis_argument
from runtime.ops.expert_exchange import expert_return, expert_send, localise_experts
from runtime.ops.experts import limit_experts

__all__ = ["ExpertParallel"]

EXCHANGES = ("auto", "replicate", "gather", "exchange")


@dataclass(frozen=True)
class ExpertParallel:
    """See the module's docstring.

    - exchange: how tokens reach experts, a row of the table above; "auto": the one with the fewest bytes.
    - owners: for each rank of ep, the experts that it holds in every layer; several ranks may hold the same expert.
      Empty: an even share each.
    - capacity: the most tokens that an expert takes of prompts and whole texts, as a multiple of the mean; at least 1,
      or 0 for no limit. Tokens beyond it skip the expert, and are counted and reported (`runtime.ops.experts`). With a
      limit, a token's result depends on the tokens beside it.
    - keep_whole: names of weights to leave replicated, each with the reason for the report.
    - entry: the entry for which "auto" chooses.
    """

    name: ClassVar[str] = "expert-parallel"
    exchange: str = "auto"
    owners: Owners = ()
    capacity: float = 0
    keep_whole: tuple[tuple[str, str], ...] = ()
    entry: str = "text"

    def __post_init__(self) -> None:
        if self.exchange not in EXCHANGES:
            raise PlanError(f"expert-parallel: exchange must be one of {', '.join(EXCHANGES)}; got {self.exchange!r}")
        given: Any = self.capacity
        is_number = isinstance(given, (int, float)) and not isinstance(given, bool)
        if not is_number or not (given == 0 or 1 <= given < math.inf):
            raise PlanError(
                "expert-parallel: capacity must be a number, at least 1 times the mean of choices per expert, or 0 for "
                f"no limit; got {given!r}"
            )

    def for_entry(self, entry: str, program: Program) -> ExpertParallel:
        """With the exchange that this entry gets, of a program whose mesh is the plan's."""
        if entry == "decode" and self.capacity:
            # of a few tokens any expert may get several times the mean
            return replace(self, capacity=0).for_entry(entry, program)
        if self.exchange != "auto":
            return self
        axes = _axes(program)
        if entry != "text" and "dp" in axes:
            # of sequences of their own: fixed shapes for single tokens
            return replace(self, exchange="gather" if entry == "decode" else _of_own_prompts(program, axes))
        ranks, own = program.mesh.size("ep"), program.mesh.size("sp") if "sp" in axes else 1
        parts, whole = program.mesh.size("etp"), frozenset(name for name, _ in self.keep_whole)
        # partial sums of other branches are over tp; those of routed experts join them if they are over the same ranks
        summed = {*axes, *(program.mesh.in_attention_view("etp") if parts > 1 else ())}
        each = set()
        for region in find_regions(program, axes):
            if region.why is None and region.combine is not None:
                shared = summed == {"tp"} and joins_a_product(region.combine, whole=whole)
                found = choose(ranks, region.num_experts, region.choices, entry, own=own, parts=parts, shared=shared)
                each.add(found)
        return replace(self, exchange=each.pop() if len(each) == 1 else "replicate")

    def run(self, program: Program) -> Program:
        ranks = program.mesh.size("ep")
        program.unplaced = True
        axes = _axes(program)
        if ranks == 1 and self.capacity:
            raise PlanError(f"capacity={self.capacity:g} limits experts that are dealt out over ep, and ep is 1")
        regions = find_regions(program, axes)
        if not regions:
            parts = program.mesh.size("etp")
            said = f"ep={ranks} divides" if ranks > 1 else f"etp={parts} divides the matrices of"
            raise PlanError(f"{said} routed experts, and {program.name} has none that were captured as such")
        if ranks == 1:  # only their own matrices are divided, by the placement of all axes
            for region in regions:
                for name in region.weights:
                    program.weight_layouts[name] = REPLICATED(len(program.weights[name].shape))
            return program
        exchange = self.for_entry(self.entry, program).exchange
        whole = dict(self.keep_whole)
        for region in regions:
            kept = [name for name in region.weights if name in whole]
            if kept and not region.why:
                region.why = whole[kept[0]]
        good = [region for region in regions if region.why is None]
        if not good:
            raise PlanError(f"ep={ranks}: the experts of {program.name} cannot be dealt out: {regions[0].why}")
        for region in good:
            self._deal(program, region, self._owners(region, ranks), axes, exchange)
        _tell(program, regions, self._owners(good[0], ranks), exchange)
        if self.capacity:
            program.notes.append(
                f"capacity {self.capacity:g}: an expert takes at most that many times the mean of choices, of the "
                "tokens that a rank has; what is over is left out, counted by engine.routing() and told in a warning"
            )
        return program

    def _owners(self, region: Region, ranks: int) -> Owners:
        owners = self.owners or deal(region.num_experts, ranks)
        held = {expert for mine in owners for expert in mine}
        if (
            len(owners) != ranks
            or held != set(range(region.num_experts))
            or any(list(m) != sorted(set(m)) for m in owners)
        ):
            raise PlanError(
                f"expert-parallel: owners must be {ranks} ascending lists that have each of the {region.num_experts} "
                f"experts of {region.path} at least once; got {len(owners)} lists with {len(held)} experts"
            )
        return tuple(tuple(mine) for mine in owners)

    def _deal(self, program: Program, region: Region, owners: Owners, axes: tuple[str, ...], exchange: str) -> None:
        split = Split(axes, tuple(IndexSet.of(mine) for mine in owners))
        for name, dim in region.weights.items():
            program.weight_layouts[name] = program.layout_of(name).with_dim(dim, split)
        _Deal(program, region, owners, axes, self.capacity).write(exchange)


class _Deal:
    """Writes one region's ops."""

    def __init__(
        self, program: Program, region: Region, owners: Owners, axes: tuple[str, ...], capacity: float
    ) -> None:
        assert region.combine is not None
        self.capacity = capacity
        self.program, self.dispatch, self.combine, self.axes = program, region.dispatch, region.combine, axes
        self.num_experts = region.num_experts
        self.options: dict[str, Any] = {
            "experts": [expert for mine in owners for expert in mine],
            "counts": [len(mine) for mine in owners],
        }

    def write(self, exchange: str) -> None:
        a, gates = arguments(self.dispatch), arguments(self.combine)["gates"]
        hidden, index = a["hidden"], a["index"]
        axis = axis_argument(self.axes)
        back = None
        with self.program.graph.inserting_before(self.dispatch):
            if self.capacity:
                values = (index.meta["val"], gates.meta["val"])
                limits = {"num_experts": self.num_experts, "capacity": float(self.capacity)}
                limited = self._call(limit_experts, (index, gates), limits, values)
                index, gates = (self._call(operator.getitem, (limited, i), {}, v) for i, v in enumerate(values))
            if exchange == "exchange":
                tokens = Value(hidden.meta["val"].shape[:1], torch.int64)
                values = (*(each.meta["val"] for each in (hidden, index, gates)), tokens)
                sent = self._call(expert_send, (hidden, index, gates, axis), self.options, values)
                hidden, index, gates, back = (
                    self._call(operator.getitem, (sent, i), {}, v) for i, v in enumerate(values)
                )
            else:
                ranks = tuple(range(len(self.options["counts"])))
                rank = self.program.local("expert_rank", Entry(0, self.axes, ranks))
                options = {"axes": list(self.axes), **self.options}
                values = (index.meta["val"], gates.meta["val"])
                mine = self._call(localise_experts, (index, gates, rank), options, values)
                index, gates = (self._call(operator.getitem, (mine, i), {}, v) for i, v in enumerate(values))
        counts = tuple(self.options["counts"])
        local = self.program.local("num_experts", Entry(self.num_experts, self.axes, counts))
        args: Any = (hidden, index, local)
        # counts are on the host then already: choices that are made elsewhere need no rows
        self.dispatch.args, self.dispatch.kwargs = args, {"trim": True} if exchange == "exchange" else {}
        b = arguments(self.combine)
        self.combine.args, self.combine.kwargs = (b["rows"], b["order"], gates), {}
        if back is not None:
            users = list(self.combine.users)
            with self.program.graph.inserting_after(self.combine):
                returned = self._call(expert_return, (self.combine, back, axis), {}, self.combine.meta["val"])
            for user in users:
                user.replace_input_with(self.combine, returned)

    def _call(self, target: Any, args: tuple[Any, ...], options: dict[str, Any], value: Any) -> fx.Node:
        made = self.program.graph.call_function(target, args, options)
        made.meta = {"val": value, "path": self.dispatch.meta.get("path", "")}
        return made


def _axes(program: Program) -> tuple[str, ...]:
    return program.mesh.in_attention_view("ep")


def choose(
    ranks: int, num_experts: int, choices: int, entry: str, *, own: int = 1, parts: int = 1, shared: bool = False
) -> str:
    """The exchange with the fewest bytes; fixed shapes for single tokens.

    own: how many of the ranks share out the tokens; the others have the same ones. parts: ranks that share out each
    expert's matrices, which sum in any case. shared: whether the sum of replicate is one that the layer needs anyway.
    Per token and row of one unit, over all n ranks: replicate sums 2 (n - 1), or collects and deals out so many, and
    nothing where it shares a sum; exchange sends a row there and one back for each other rank that has one of its
    experts, and collects (n / own - 1), each of `parts` ranks the same.
    """
    if entry == "decode" or shared:
        return "replicate"
    sent = 2 * destinations(ranks, num_experts, choices) + ranks // own - 1
    return "exchange" if parts * sent < 2 * (ranks - 1) else "replicate"


def _of_own_prompts(program: Program, axes: tuple[str, ...]) -> str:
    """The exchange for prompts where each rank of dp has its own."""
    # who gathers fills prompts up: not where ranks keep tokens of their own, or where a state would count those
    if program.mesh.size("sp") > 1 or any(not state.per_token for state in program.states.values()):
        return "exchange"
    each = set()
    for region in find_regions(program, axes):
        if region.why is None:
            hidden = arguments(region.dispatch)["hidden"].meta["val"]
            row_bytes = int(hidden.shape[1]) * hidden.dtype.itemsize
            own = program.mesh.size("dp")
            layer = OwnTokens(program.mesh.size(*axes), own, region.num_experts, region.choices, row_bytes)
            each.add(layer.cheapest())
    return each.pop() if len(each) == 1 else "exchange"


def _tell(program: Program, regions: list[Region], owners: Owners, exchange: str) -> None:
    good = [region for region in regions if region.why is None]
    each = [len(mine) for mine in owners]
    sizes = f"{len(each)} x {each[0]}" if len(each) > 8 and len(set(each)) == 1 else "/".join(map(str, each))
    held = sum(map(len, owners))
    copies = f", {held - good[0].num_experts} of them copies" if held > good[0].num_experts else ""
    program.notes.append(
        f"experts of {len(good)} layers: {good[0].num_experts} over ep as {sizes}{copies}; exchange: {exchange}"
    )
    if program.mesh.size("dp") > 1:
        program.notes.append(
            f"the {program.mesh.size('dp')} ranks of dp are given one batch: each computes all but the experts, which "
            "alone are dealt to them"
        )
    for region in regions:
        if region.why is not None:
            program.notes.append(f"the experts of {region.path} are whole on every rank: {region.why}")
