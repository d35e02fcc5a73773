"""A model as a planner sees it: kinds of layers with their costs as expressions, from one trace and one analysis.

    first      what stands before the layers (the table of tokens), once
    layers     in order, each of a kind; identical ones share one `Part`
    last       what stands behind them (the head), once

Of each part: its nodes as expressions (`analysis.cost.expressions`), of prompts and of single tokens; its weights and
what it keeps of each sequence, in what a rank holds; and which results live how long. The analysis is one for two
ranks: how far each dim could be split is known from it (`SplitClass`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
from torch import fx

from partitioner.analysis.cost.expressions import EXPERTS, MET, PAST, ROUTED, Expressions, NodeExpression
from partitioner.analysis.cost.live_results import Live, chain, fused_chain, live_results
from partitioner.analysis.cost.products import LATENT
from partitioner.compile.partition import compile_program
from partitioner.compile.tracing.trace import trace
from partitioner.errors import PlanError
from partitioner.program.node_arguments import arguments, node_values, operation
from partitioner.program.plan import Plan
from partitioner.program.program import Program, State, Weight
from partitioner.sharding.layout import Split
from partitioner.sharding.split_class import SplitClass
from runtime.ops.communicating import COMMUNICATING
from runtime.ops.experts import expert_dispatch, grouped_linear
from runtime.ops.kernels.float8_rows import SCALE_BYTES, num_scales
from runtime.program.host_default import host_default

__all__ = ["Experts", "Part", "Summary", "summarize", "summarize_program"]


@dataclass(frozen=True)
class Kept:
    """What a part keeps of a sequence: bytes per token, or once; sees: of how many tokens at most."""

    bytes: Any
    per_token: bool = True
    sees: int | None = None
    float8: Any = 0
    """As `bytes`, of a cache of dtype fp8."""


@dataclass
class Part:
    """See the module's docstring. nodes: by entry, "prefill" and "decode"."""

    name: str
    nodes: dict[str, list[NodeExpression]]
    weights: list[tuple[str, Any]]
    kept: list[Kept] = field(default_factory=list)
    live: list[Live] = field(default_factory=list)
    """Of the entry "prefill"; a single token's results are small."""
    live_fused: list[Live] = field(default_factory=list)
    """The same where ops that go over memory one after the other are one kernel."""
    tied: Any = 0
    """Bytes of weights that a part before this one reads, too: on a stage of its own it has them again."""

    @property
    def weight_bytes(self) -> Any:
        return sum((size for _, size in self.weights), sympy.Integer(0))


@dataclass(frozen=True)
class Experts:
    """Of a layer with routed experts: how many there are, and how many each token chooses. row_bytes: of a token."""

    count: int
    chosen: int
    row_bytes: int


@dataclass
class Summary:
    """parts: by number; order: the parts of layers, in order; first and last: numbers of the parts around them."""

    name: str
    dtype: str
    parts: list[Part]
    order: list[int]
    first: int
    last: int
    classes: dict[Any, tuple[SplitClass, str]]
    """By symbol: the class, and what it is called."""
    batch: Any
    sequence: Any
    experts: Experts | None
    hidden_bytes: int
    """Of one token, between layers."""
    num_bytes: int
    """Of all weights, whole."""
    notes: list[str] = field(default_factory=list)
    expanded: Summary | None = None
    """Of the same model with keys and values in its cache; None: they are there already, and nothing narrower."""

    @property
    def arguments(self) -> tuple[Any, ...]:
        """The symbols of all expressions, in one order."""
        return (self.batch, self.sequence, PAST, EXPERTS, MET, ROUTED, *self.classes)

    @property
    def num_layers(self) -> int:
        return len(self.order)

    @property
    def num_ops(self) -> int:
        """Of a run through all layers, launched one by one: each op that is more than a view."""
        return self.ops_of(self.order)

    def ops_of(self, layers: Sequence[int]) -> int:
        """The same of some layers, by the numbers of their parts."""
        each = [sum(node.kind != "move" or node.written != 0 for node in part.nodes["prefill"]) for part in self.parts]
        return sum(each[part] for part in layers)

    @property
    def atoms(self) -> dict[str, int]:
        """By class, how many ranks it can be split over."""
        return {str(symbol): kind.atoms for symbol, (kind, _) in self.classes.items()}

    def values(self, *, tp: int, ep: int = 1, etp: int | None = None) -> dict[Any, float]:
        """What the fullest rank holds of each class, and of the experts."""
        etp = tp if etp is None else etp
        found: dict[Any, float] = {
            symbol: kind.held(etp if role == "expert_ffn" else tp) for symbol, (kind, role) in self.classes.items()
        }
        found[EXPERTS] = -(-self.experts.count // ep) if self.experts is not None else 1
        return found


@host_default
def summarize(model: Any) -> Summary:
    """Of a model of transformers, best without data; takes as long as its trace, and a little."""
    return summarize_program(trace(model))


@host_default
def summarize_program(traced: Program, *, cache: str = "auto") -> Summary:
    """Of what `trace` yields. Raises `PlanError` where it cannot generate. cache: as in `Plan`."""
    parts = compile_program(traced, Plan(tp=2, cache=cache))
    program = parts.program_of("prefill")
    if "slots" in program.symbols or "sequence" not in program.symbols:
        raise PlanError(
            f"{traced.name} keeps more than keys and values between tokens (it is run with the model's own cache): its "
            "plans are not priced yet; partitioner report says how it is split"
        )
    found = _Summarizing(traced, program).summary()
    if any(node.target in LATENT for node in program.graph.nodes):
        found.expanded = summarize_program(traced, cache="expanded")
    return found


class _Summarizing:
    def __init__(self, traced: Program, program: Program) -> None:
        self.traced, self.program = traced, program
        self.entries = {"prefill": Expressions(program, 5), "decode": Expressions(program, 1)}
        self.costs = {name: each.all() for name, each in self.entries.items()}
        self.sizes = self.entries["prefill"].sizes
        self.classes = self.sizes.classes
        self.found: list[str] = list(traced.notes)

    def summary(self) -> Summary:
        blocks = self.classes.blocks.blocks
        inside = {node for block in blocks for node in block.nodes}
        nodes = [node for node in self.program.graph.nodes if node.op == "call_function" and node_values(node)]
        place = {node: i for i, node in enumerate(nodes)}
        start = min((place[n] for block in blocks for n in block.nodes if n in place), default=len(nodes))
        outside = [node for node in nodes if node not in inside]
        parts = [
            self._part("first", [node for node in outside if place[node] < start]),
            self._part("last", [node for node in outside if place[node] > start]),
        ]
        order, known = [], dict[int, int]()
        for block in blocks:
            model = block.model or block
            if id(model) not in known:
                known[id(model)] = len(parts)
                name = next((str(n.meta["path"]) for n in model.nodes if n.meta.get("path")), "layer")
                parts.append(self._part(".".join(name.split(".")[:3]), [n for n in model.nodes if n in place]))
            order.append(known[id(model)])
        seen: set[str] = set()
        for part in parts[:2]:  # a tied table counts where it is read first; stages that need both have both
            part.tied = sum((size for name, size in part.weights if name in seen), sympy.Integer(0))
            part.weights = [(name, size) for name, size in part.weights if name not in seen]
            seen |= {name for name, _ in part.weights}
        guessed = sorted(set(self.classes.guessed))
        if guessed:
            self.found.append(f"counted as even shares: {', '.join(guessed[:4])}{' ...' if len(guessed) > 4 else ''}")
        unsure = [f"{cost.name}: {cost.unsure}" for cost in self.costs["prefill"].values() if cost.unsure]
        self.found += unsure[:4] + ([f"and {len(unsure) - 4} more ops not priced exactly"] if len(unsure) > 4 else [])
        weights = _kept_weights(self.program)
        dtypes = [str(weight.dtype).removeprefix("torch.") for weight in weights]
        return Summary(
            self.traced.name, max(set(dtypes), key=dtypes.count), parts, order, 0, 1,
            {symbol: known for known, symbol in self.classes.symbols.items()}, self.program.symbols["batch"],
            self.program.symbols["sequence"], self._experts(), self._hidden(),
            sum(weight.bytes for weight in weights), self.found,
        )  # fmt: skip

    def _part(self, name: str, nodes: list[fx.Node]) -> Part:
        costs = {entry: [found[node] for node in nodes if node in found] for entry, found in self.costs.items()}
        weights: dict[str, Any] = {}
        kept: list[Kept] = []
        for node in nodes:
            for source in node.all_input_nodes:
                if source.op == "get_attr":
                    weights.setdefault(str(source.target), self._held(source, node))
            state = node.kwargs.get("state")
            if isinstance(state, str):
                kept += [self._kept(node, each) for key, each in self.program.states.items() if _is_of(key, state)]
        entry, known = self.entries["prefill"], self.costs["prefill"]
        live, live_fused = (live_results(each, entry, known) for each in (chain(nodes), fused_chain(nodes)))
        return Part(name, costs, list(weights.items()), kept, live, live_fused)

    def _held(self, weight: fx.Node, user: fx.Node) -> Any:
        known = self.program.weights[str(weight.target)]
        if known.source in ("computed", "constant") and known.bytes < 1 << 20:
            return sympy.Integer(known.bytes)
        size = self.entries["prefill"].bytes(weight)
        if operation(user) is grouped_linear and len(known.shape) == 3:
            return size * EXPERTS / known.shape[0]
        return size

    def _kept(self, node: fx.Node, state: State) -> Kept:
        size: Any = state.dtype.itemsize
        source = arguments(node).get("k")
        for each, dim in zip(state.shape, state.layout.dims, strict=True):
            at = source if isinstance(source, fx.Node) else node
            size = size * (self.classes.local(at, each, dim) if isinstance(dim, Split) else each)
        width = state.shape[-1]
        float8 = size / state.dtype.itemsize * (width + SCALE_BYTES * num_scales(width)) / width
        return Kept(size, state.per_token, state.sees, float8)

    def _experts(self) -> Experts | None:
        for node in self.program.graph.nodes:
            if node.op == "call_function" and operation(node) is expert_dispatch:
                a = arguments(node)
                hidden, index = node_values(a["hidden"])[0], node_values(a["index"])[0]
                return Experts(int(a["num_experts"]), int(index.shape[1]), int(hidden.shape[1]) * hidden.dtype.itemsize)
        return None

    def _hidden(self) -> int:
        for node in self.program.graph.nodes:
            if node.target in COMMUNICATING and node_values(node):
                value = node_values(node)[0]
                return int(value.shape[-1]) * value.dtype.itemsize
        (result,) = self.program.graph.output_node().all_input_nodes[:1]
        return int(node_values(result)[0].shape[-1]) * node_values(result)[0].dtype.itemsize


def _is_of(key: str, state: str) -> bool:
    return key == state or (key.startswith(state + ".") and "." not in key[len(state) + 1 :])


def _kept_weights(program: Program) -> list[Weight]:
    read = {str(node.target) for node in program.graph.nodes if node.op == "get_attr" and node.users}
    return [weight for name, weight in program.weights.items() if name in read]
