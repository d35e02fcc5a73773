"""The report: what was split over which axis, what stayed whole and why, the collectives, and the bytes per rank."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import fx

from partitioner.analysis.report.stage_report import StageReport, stage_report
from partitioner.analysis.rules import notation
from partitioner.analysis.rules.data_movement import is_move
from partitioner.program.node_arguments import describe, layer_of, node_values, operation
from partitioner.program.program import LayersTraced, Program, Value, Weight
from partitioner.program.stages import table_of
from partitioner.sharding.layout import Layout
from runtime.kv_cache.device_memory import readable
from runtime.ops.communicating import COMMUNICATING, axes_text, read_call

__all__ = [
    "Collective",
    "Report",
    "WeightRow",
    "make_report",
    "matrices_of",
    "matrix_users",
    "pattern_of",
    "reason_for",
    "split_text",
]


@dataclass(frozen=True)
class WeightRow:
    """Weights in the same place of several layers, split (or not) alike. bytes: of one of them, whole."""

    names: tuple[str, ...]
    shape: tuple[int, ...]
    bytes: int
    split: str
    """"" for a whole weight; otherwise the axis, the dim and the sizes."""
    reason: str
    """Why it is whole, or why some of it is on several ranks."""
    is_matrix: bool

    @property
    def pattern(self) -> str:
        return pattern_of(self.names[0]) if len(self.names) > 1 else self.names[0]


@dataclass(frozen=True)
class Collective:
    """bytes_per_token: of its value, whole."""

    op: str
    axis: str
    path: str
    shape: str
    bytes_per_token: int


@dataclass(frozen=True)
class Report:
    """bytes_per_rank: of weights. replicated_per_rank: those of them that other ranks hold too. matrix_share: the
    largest rank's share of the elements of linears, tables and experts.
    """

    model: str
    plan: str
    rows: tuple[WeightRow, ...]
    collectives: tuple[Collective, ...]
    bytes_whole: int
    bytes_per_rank: tuple[int, ...]
    replicated_per_rank: tuple[int, ...]
    dtypes: tuple[str, ...]
    """Of the weights, from most bytes to least."""
    matrix_share: float
    notes: tuple[str, ...] = field(default=())
    stages: StageReport | None = None
    """None where there is one stage."""
    replicas: int = 1
    """How many times these ranks stand side by side."""
    stored_per_rank: tuple[int, ...] = ()
    """What ranks hold of weights where they hold codes and scales; `bytes_per_rank` is then what these stand for."""
    layers: LayersTraced | None = None
    """How many layers were traced; None where the model's layers were not looked for."""

    @property
    def whole(self) -> tuple[WeightRow, ...]:
        """Matrices that every rank holds whole."""
        return tuple(row for row in self.rows if row.is_matrix and not row.split)

    def _matrices(self) -> list[str]:
        split, whole = [row for row in self.rows if row.split and row.is_matrix], self.whole
        reasons = {row.reason for row in whole}
        if not split and len(reasons) == 1:
            return [f"no matrix is split: {reasons.pop()}"]
        lines = ["split:"]
        for row in split:
            count = f"{len(row.names)} x " if len(row.names) > 1 else ""
            why = f"   ({row.reason})" if row.reason else ""
            lines.append(f"  {count}{row.pattern} {list(row.shape)}: {row.split}{why}")
        lines.append("whole on every rank:" if whole else "whole on every rank: nothing that is a matrix")
        for row in whole:
            count = f"{len(row.names)} x " if len(row.names) > 1 else ""
            lines.append(f"  {count}{row.pattern} {list(row.shape)}, {readable(row.bytes)}: {row.reason}")
        return lines

    def per_layer(self, op: str) -> dict[str, int]:
        """How many collectives of a kind each layer has, by the layer's path ("" for those outside layers)."""
        found: Counter[str] = Counter()
        for collective in self.collectives:
            if collective.op == op:
                found[layer_of(collective.path)] += 1
        return dict(found)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{self.model}, {self.plan}", "", *self._matrices()]
        lines.append("collectives:")
        for op in sorted({c.op for c in self.collectives}):
            layers = self.per_layer(op)
            inside = Counter(n for layer, n in layers.items() if layer)
            parts = [f"{n} in each of {count} layers" for n, count in sorted(inside.items())]
            parts += [f"{layers['']} outside layers"] if "" in layers else []
            sizes = dict.fromkeys(readable(c.bytes_per_token) for c in self.collectives if c.op == op)
            lines.append(f"  {op}: {', '.join(parts)}; {' or '.join(sizes)} per token each")
        if not self.collectives:
            lines.append("  none")
        lines += self.stages.lines() if self.stages is not None else []
        ranks = ", ".join(map(readable, self.bytes_per_rank[:8])) + (", ..." if len(self.bytes_per_rank) > 8 else "")
        kinds = " and ".join(self.dtypes)
        lines.append(f"weights, {kinds}: {readable(self.bytes_whole)} whole; per rank {ranks}")
        if self.stored_per_rank:
            ranks = ", ".join(map(readable, self.stored_per_rank[:8])) + (
                ", ..." if len(self.stored_per_rank) > 8 else ""
            )
            lines.append(f"held as stored: per rank {ranks}; the sizes above are those of the weights expanded")
        if len(self.bytes_per_rank) > 1:
            held, shared = max(zip(self.bytes_per_rank, self.replicated_per_rank, strict=True))
            lines.append(f"replicated: {readable(shared)} of {readable(held)} per rank are held by other ranks too")
        if self.replicas > 1:
            lines.append(
                f"replicas: {self.replicas}, each with ranks and weights as above; they share out requests, of which "
                "none is faster for it"
            )
        lines.append(f"matrices: the fullest rank holds {self.matrix_share:.1%}")
        lines += [] if self.layers is None or not self.layers.layers else [_traced(self.layers)]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)


def _traced(found: LayersTraced) -> str:
    """How many layers were traced and what the others are, or why none was left out."""
    why = f" ({found.why})" if found.why else ""
    if found.traced == found.layers:
        return f"traced: every layer, {found.layers} of them{why}"
    return f"traced: {found.traced} of {found.layers} layers; each of the others is a copy of one like it{why}"


def pattern_of(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def make_report(program: Program, *, plan: str, replicas: int = 1, stored_per_rank: tuple[int, ...] = ()) -> Report:
    """Describes a program after its passes. `stored_per_rank`: as in `Report`."""
    users = matrix_users(program)
    ranks = [program.mesh.coordinates(rank) for rank in range(program.mesh.world_size)]
    # many layers and many ranks: weights that are divided alike are reckoned once
    on = _stages_holding(program)
    alike: dict[tuple[object, ...], list[Weight]] = defaultdict(list)
    for weight in program.weights.values():
        alike[program.layout_of(weight.name), weight.shape, weight.dtype, weight.name in users, on(weight)].append(
            weight
        )
    counted = [(len(weights), weights[0]) for weights in alike.values()]
    held = [[n * _held(program, w, at) if at["pp"] in on(w) else 0 for n, w in counted] for at in ranks]
    shared = tuple(
        sum(n * _replicated(program, w, at, len(on(w))) for n, w in counted if at["pp"] in on(w)) for at in ranks
    )
    is_matrix = [weight.name in users for _, weight in counted]
    matrices = sum(weight.bytes for weight in program.weights.values() if weight.name in users)
    fullest = max(sum(b for b, yes in zip(rank, is_matrix, strict=True) if yes) for rank in held)
    share = fullest / matrices if matrices else 1.0
    return Report(
        model=program.name,
        plan=plan,
        rows=_weight_rows(program, users),
        collectives=_collectives(program),
        # one that stages hold under two names is the model's once
        bytes_whole=sum({frozenset((w.name, *w.aliases)): w.bytes for w in program.weights.values()}.values()),
        bytes_per_rank=tuple(map(sum, held)),
        replicated_per_rank=shared if len(ranks) > 1 else (0,),
        dtypes=_dtypes(program),
        matrix_share=share,
        notes=(*map(_explained, program.notes), *_too_many_ranks(len(ranks), share)),
        stages=stage_report(program, tuple(map(sum, held))),
        replicas=replicas,
        stored_per_rank=stored_per_rank,
        layers=program.layers,
    )


def _weight_rows(program: Program, users: dict[str, fx.Node]) -> tuple[WeightRow, ...]:
    """One for weights in the same place of several layers that are held alike, for the same reason."""
    groups: dict[tuple[str, ...], list[WeightRow]] = defaultdict(list)
    for weight in program.weights.values():
        split, reason = split_text(program.layout_of(weight.name)), reason_for(program, weight, users)
        row = WeightRow((weight.name,), weight.shape, weight.bytes, split, reason, weight.name in users)
        groups[pattern_of(weight.name), str(weight.shape), split, pattern_of(reason)].append(row)
    return tuple(replace(rows[0], names=tuple(row.names[0] for row in rows)) for rows in groups.values())


def _collectives(program: Program) -> tuple[Collective, ...]:
    return tuple(
        Collective(
            operation(node).__name__,
            axes_text(read_call(node).axes),
            node.meta.get("path", ""),
            str(node_values(node)[0]),
            _per_token(node_values(node)[0]),
        )
        for node in program.graph.nodes
        if node.op == "call_function" and node.target in COMMUNICATING
    )


def _stages_holding(program: Program) -> Callable[[Weight], frozenset[int]]:
    """Which stages hold a weight."""
    count = program.mesh.size("pp")
    table = None if program.stages is None else table_of(program.graph, count).of_weight
    everywhere = frozenset(range(count))
    return lambda weight: everywhere if table is None else table.get(weight.name, frozenset())


def _per_token(value: Value) -> int:
    """Bytes, without the dims that are the batch's or the sequence's."""
    sizes = [size for size in value.shape if isinstance(size, int)]
    return math.prod(sizes) * value.dtype.itemsize


def _dtypes(program: Program) -> tuple[str, ...]:
    found: Counter[str] = Counter()
    for weight in program.weights.values():
        found[str(weight.dtype).removeprefix("torch.")] += weight.bytes
    return tuple(name for name, _ in found.most_common())


def _explained(note: str) -> str:
    """A bound on the sequence that the trace found, with what it limits."""
    if not re.fullmatch(r"sequence from \d+( to \d+)?", note):
        return note
    return (
        f"{note}, as the model's code does something else for other lengths: this limits runs of whole texts "
        "(simulate, an engine's call), and how many tokens generate runs at a time; "
        "partition(..., fixed_length=N) compiles the model for runs of exactly N tokens"
    )


_FAR = 4
"""How many times its even share the fullest rank may hold before the report says that there are too many ranks."""


def _too_many_ranks(ranks: int, share: float) -> list[str]:
    if share * ranks <= _FAR:
        return []
    return [
        f"{ranks} ranks are far more than this model divides into: the fullest holds {share:.1%} of the matrices, "
        f"where {1 / ranks:.1%} would be even; the reasons above say how many ranks could share each"
    ]


def _replicated(program: Program, weight: Weight, coordinates: dict[str, int], stages: int) -> int:
    """How many bytes of its part of a weight, which so many stages hold, a rank has in common with others."""
    splits = program.layout_of(weight.name).splits
    held = _held(program, weight, coordinates)
    if not splits or stages > 1:
        alone = stages == 1 and program.mesh.world_size == program.mesh.size("pp")
        return 0 if alone else held
    for dim, split in splits:
        if sum(split.sizes) == weight.shape[dim]:
            return 0  # nobody else has these indices
        mine = split.at(program.mesh, coordinates)
        own = mine
        for at, other in enumerate(split.owned):
            if at != program.mesh.index(split.axes, coordinates):
                own = own - other
        held = held // max(mine.size, 1) * (mine.size - own.size)
    return held


def _held(program: Program, weight: Weight, coordinates: dict[str, int]) -> int:
    size = weight.bytes
    for dim, split in program.layout_of(weight.name).splits:
        size = size // weight.shape[dim] * split.at(program.mesh, coordinates).size
    return size


_MOST_SIZES = 16


def split_text(layout: Layout) -> str:
    return ", ".join(
        f"{'x'.join(split.axes)} over dim {dim} as {_sizes_text(split.sizes)}" for dim, split in layout.splits
    )


def _sizes_text(sizes: tuple[int, ...]) -> str:
    """Of each part; of many, how many there are of a size."""
    if len(sizes) <= _MOST_SIZES:
        return "/".join(map(str, sizes))
    runs = [(size, sum(1 for _ in run)) for size, run in itertools.groupby(sizes)]
    shown = ", ".join(f"{count} x {size}" for size, count in runs[:_MOST_SIZES])
    return shown + (", ..." if len(runs) > _MOST_SIZES else "")


def matrix_users(program: Program) -> dict[str, fx.Node]:
    """Weights that a contraction reads (linears, look-up tables, experts, convolutions), with the op that does."""
    found: dict[str, fx.Node] = {}
    for node in program.graph.nodes:
        for name in matrices_of(node):
            found.setdefault(name, node)
    return found


def matrices_of(node: fx.Node) -> list[str]:
    """The weights that a node contracts with something; none of most nodes."""
    if node.op != "call_function" or is_move(node) or not node_values(node):
        return []
    if node.target in COMMUNICATING or not notation(node).sums:
        return []
    found = []
    for operand in notation(node).operands:
        source = operand.node
        while is_move(source) and source.all_input_nodes:
            source = source.all_input_nodes[0]
        if source.op == "get_attr" and notation(node).sums & set(operand.letters) and len(notation(node).operands) > 1:
            found.append(str(source.target))
    return found


def reason_for(program: Program, weight: Weight, users: dict[str, fx.Node]) -> str:
    """Why every rank holds all of a weight, or several ranks some of it; "" where it is split without that."""
    layout = program.layout_of(weight.name)
    if not layout.is_replicated:
        shared = any(sum(split.sizes) > weight.shape[dim] for dim, split in layout.splits)
        if not shared:
            return ""
        why = program.kept_whole.get(weight.name)
        return "some of it is needed, and held, by several ranks" + (f": {why}" if why else "")
    if weight.name in program.kept_whole:
        return program.kept_whole[weight.name]
    if program.mesh.world_size == program.mesh.size("pp"):
        return "one rank" if program.mesh.world_size == 1 else "one rank in each stage"
    if program.mesh.world_size == program.mesh.size("pp", "sp"):
        return "ranks of sp share out tokens, and each of them needs all weights"
    user = users.get(weight.name)
    if user is None:
        return "not a matrix"
    where = re.sub(r"(?<=\.)\d+\b", "*", describe(user))  # the same in every layer, so that layers stand in one line
    return f"{where} could neither start nor end a split: {_why_no_split(user, weight)}"


def _why_no_split(user: fx.Node, weight: Weight) -> str:
    others = [n for n in user.all_input_nodes if node_values(n) and str(n.target) != weight.name]
    if all(_only_weights(n) for n in others):
        return "it meets other weights and constants there, no activation"
    layouts = [n.meta.get("layout") for n in others]
    if any(isinstance(layout, Layout) and layout.split_dims for layout in layouts):
        return "what it meets there is split already, in a dim that is not summed with it"
    return "nothing that follows can use its result in parts"


def _only_weights(node: fx.Node) -> bool:
    """Whether a value is made of weights alone."""
    seen, stack = {node}, [node]
    while stack:
        node = stack.pop()
        if node.op == "placeholder":
            return False
        new = [n for n in node.all_input_nodes if n not in seen and node_values(n)]
        seen.update(new)
        stack += new
    return True
