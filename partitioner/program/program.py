"""Program: the captured model as one graph for all ranks, with its inputs, weights and table of integers.

    graph     torch.fx.Graph: placeholders (the inputs, in order), get_attr (weights by name), call_function, output
    node      node.meta["val"]    Value (shape, dtype), a tuple of Values (several outputs), a sympy.Expr (an integer)
              node.meta["layout"] Layout, or a tuple of Layouts; set by the passes and re-inferred by the verifier
              node.meta["path"]   the module it came from ("model.layers.0.self_attn")
              node.meta["source"] the line of its code, where the trace tells
              node.meta["why"]    the reason for what a pass did to it
              node.meta["stages"] the pipeline stages that compute it, where there are several
    table     what differs between ranks: integers (or tuples of them) that stand in the graph as `Local(name)`

Passes describe weights and never slice them; one graph serves every coordinate, and `emit` substitutes the integers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import sympy
import torch
from torch import fx

from partitioner.program.copy_nodes import copy_graph
from partitioner.program.stages import StageTable
from partitioner.sharding.layout import REPLICATED, Layout, Rows
from partitioner.sharding.mesh import Mesh
from partitioner.sharding.split_class import SplitClass
from runtime.program.rank_program import Bound
from runtime.program.shards import Piece, WeightShard, WeightSource

__all__ = ["Entry", "HeldForm", "Input", "LayersTraced", "Origins", "PerRankInt", "Program", "State", "Value", "Weight"]

Integers = int | tuple[int, ...] | None


@dataclass(frozen=True)
class Value:
    """Shape (ints, or sympy expressions in the batch and sequence symbols) and dtype of a tensor."""

    shape: tuple[int | sympy.Expr, ...]
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Input:
    """An explicit input: its name (a keyword of the run), its value, and what stands in where the user gives none.

    default: "required" | "arange" (0..S-1 per row) | "ones" | "zeros"
    bound: the values that it may have; see `partitioner.compile.tracing.input_bounds`
    without: the token besides which the default is not what the model does without this input; None: there is none
    """

    name: str
    value: Value
    default: str
    bound: Bound | None = None
    without: int | None = None


@dataclass(frozen=True)
class Weight:
    """A parameter or buffer: described, never sliced.

    source: "checkpoint" (saved with the model), "computed" (a non-persistent buffer: absent from checkpoints),
    "constant" (made by the trace) or "made" (from another weight, when a rank is loaded: `make(of)`).
    aliases: other names of the same tensor (tied weights).
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    source: str
    aliases: tuple[str, ...] = ()
    of: Weight | None = None
    make: Callable[[torch.Tensor], torch.Tensor] | None = None
    """Of the whole tensor `of`, the whole of this one; a function of a module."""

    @property
    def numel(self) -> int:
        return int(torch.Size(self.shape).numel())

    @property
    def bytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class State:
    """What a rank remembers of each sequence between runs: `shape` per token (or once), split as `layout` says.

    sees: how many positions back (the token's own included) a later token may look; None: all of them. per_token:
    one for each token; otherwise one for all of them, which each token changes. block: how many tokens lie together;
    None: all of a row's. token_axes: those whose ranks share out the tokens.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: Layout
    sees: int | None = None
    per_token: bool = True
    block: int | None = None
    token_axes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Entry:
    """One row of the table: the value on one whole model, and per coordinate of `axes` (row-major)."""

    whole: Integers
    axes: tuple[str, ...]
    values: tuple[Integers, ...]


@dataclass(frozen=True)
class PerRankInt:
    """Stands in a node's arguments for an integer that differs between ranks; `name` is a row of the table."""

    name: str

    def __repr__(self) -> str:
        return f"local({self.name!r})"


@dataclass(frozen=True)
class LayersTraced:
    """How many layers the model has, and how many of them were traced; why not fewer, "" where nothing is in the
    way.
    """

    layers: int
    traced: int
    why: str = ""


class Origins(Protocol):
    """Where weights lie in files, under names and in an order that need not be the model's."""

    @property
    def source(self) -> WeightSource: ...

    def find(self, name: str, aliases: Sequence[str]) -> object:
        """Raises `WeightError` where the files do not hold the weight."""

    def of(self, shard: WeightShard) -> tuple[Piece, ...]:
        """The pieces of a rank's part of a weight."""

    @property
    def has_quantized(self) -> bool:
        """Whether files hold weights as codes and scales."""

    def held_form(self, name: str, aliases: Sequence[str]) -> HeldForm | None:
        """How a weight is held as it is stored; None where it cannot be."""


class HeldForm(Protocol):
    """A weight that ranks hold as codes and scales. code, computed_in, turned: as in `runtime.program.shards.CodesOf`.
    num_dims: 2, or 3 with one matrix for each expert.
    """

    @property
    def code(self) -> str: ...
    @property
    def computed_in(self) -> torch.dtype: ...
    @property
    def has_zeros(self) -> bool: ...
    @property
    def turned(self) -> bool: ...
    @property
    def num_dims(self) -> int: ...

    def scale_blocks(self) -> tuple[torch.Tensor, torch.Tensor]:
        """[N], [K]: the number of the block of scales that each output and each input is in; of experts, of the first
        one's.
        """

    def shards(self, shard: WeightShard) -> tuple[dict[str, WeightShard | None], dict[str, torch.Tensor]]:
        """What a rank holds of a weight of which `shard` is its part, by role; and the data of what no file holds."""


@dataclass
class Program:
    """See the module's docstring."""

    graph: fx.Graph
    inputs: tuple[Input, ...]
    weights: dict[str, Weight]
    weight_data: Mapping[str, torch.Tensor]
    """Data of the weights by canonical name; meta tensors where the model has none."""
    symbols: dict[str, sympy.Symbol]
    """The symbols in shapes by meaning: "batch", "sequence"."""
    mesh: Mesh
    name: str = ""
    """Class name of the model, for reports only."""
    table: dict[str, Entry] = field(default_factory=dict)
    weight_layouts: dict[str, Layout] = field(default_factory=dict)
    """Layout of each weight that is not whole on every rank."""
    split_classes: dict[str, SplitClass] = field(default_factory=dict)
    """Of split weights: what ranks would hold of them if there were more ranks, or fewer."""
    has_head: bool = True
    """Whether the result is logits over a vocabulary, and not the last hidden state."""
    eos_token_id: tuple[int, ...] = ()
    """The tokens after which the model's text ends, by its own generation config."""
    generation: Mapping[str, Any] = field(default_factory=dict)
    """What else that config says, plain data by the names of transformers' GenerationConfig."""
    states: dict[str, State] = field(default_factory=dict)
    """What ranks remember between runs, by name; empty where the whole text is run at once."""
    output: Layout | None = None
    """How the ranks hold the result; None: all of it on every rank, or of its own batch."""
    batch_axes: tuple[str, ...] = ()
    """Those whose ranks have sequences of their own: inputs, states and the result are about these."""
    stages: StageTable | None = None
    """Which stages hold which weights; None where there is one stage. Nodes say theirs in node.meta["stages"]."""
    tokens_as_rows: bool = False
    """Whether its graph, which is for one token, runs several: `runtime/execution/prompts/tokens_as_rows.py`."""
    unplaced: bool = False
    """Whether a pass has dealt out weights and left the collectives to the one after it, which places all axes."""
    kept_whole: dict[str, str] = field(default_factory=dict)
    """Weights that could have been split and stay whole, with the reason."""
    limits: Mapping[str, tuple[int, int | None]] = field(default_factory=dict)
    """By name of a symbol: the smallest and the largest size that the graph is right for, where not all are.

    "positions": how long a text may become, where parts of it are run.
    """
    origins: Origins | None = None
    """Where the weights lie in the files of a checkpoint; None where the model was given with its weights."""
    layers: LayersTraced | None = None
    """What of the model was traced; None where the program was not traced from one."""
    keeps_stored: bool = False
    """Whether ranks hold quantised weights as their files do."""
    notes: list[str] = field(default_factory=list)
    """What the user should know: variants fixed at capture, inputs refused."""
    inferred: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)
    """What layout rules have said (`analysis/layouts/memoise.py`); one for all copies, within a compile."""

    def copy(self, mesh: Mesh | None = None) -> Program:
        """The same program with a graph of its own; on another mesh if one is given, before anything is laid out."""
        return replace(
            self,
            graph=copy_graph(self.graph)[0],
            weights=dict(self.weights),
            symbols=dict(self.symbols),
            mesh=mesh or self.mesh,
            table=dict(self.table),
            weight_layouts=dict(self.weight_layouts),
            split_classes=dict(self.split_classes),
            states=dict(self.states),
            kept_whole=dict(self.kept_whole),
            notes=list(self.notes),
        )

    def add_input(self, name: str, value: Value, default: str) -> fx.Node:
        """The placeholder of the input `name`; made, as the last one, where the program does not take it yet."""
        placeholders: list[fx.Node] = [node for node in self.graph.nodes if node.op == "placeholder"]
        for node in placeholders:
            if node.target == name:
                return node
        with self.graph.inserting_after(placeholders[-1]):
            made = self.graph.placeholder(name)
        made.meta = {"val": value, "layout": self.given(value)}
        self.inputs = (*self.inputs, Input(name, value, default))
        return made

    @property
    def own_batch(self) -> Rows | None:
        """The sequences that a rank has of its own; None: every rank has the same."""
        return Rows(self.batch_axes, "batch") if self.batch_axes else None

    def layout_of(self, weight: str) -> Layout:
        """How ranks hold a weight: replicated where no pass has split it."""
        return self.weight_layouts.get(weight) or REPLICATED(len(self.weights[weight].shape))

    def given(self, value: Value) -> Layout:
        """How ranks hold an input, or a result that is not split, of this shape."""
        batch = self.symbols.get("batch")
        own = self.own_batch
        return Layout(tuple(own if own is not None and size == batch else None for size in value.shape))

    def local(self, hint: str, entry: Entry) -> PerRankInt | Integers:
        """A stand-in for `entry`; the plain integers where all coordinates and the whole agree."""
        if all(value == entry.whole for value in entry.values):
            return entry.whole
        for name, known in self.table.items():
            if known == entry and name.rstrip("0123456789_") == hint:
                return PerRankInt(name)
        name = f"{hint}_{sum(known.rstrip('0123456789_') == hint for known in self.table)}"
        self.table[name] = entry
        return PerRankInt(name)

    def whole(self, value: Any) -> Any:
        """`value` with every stand-in replaced by its integers on the whole model."""
        return _substitute(value, lambda name: self.table[name].whole)

    def at(self, value: Any, coordinates: Mapping[str, int]) -> Any:
        """`value` with every stand-in replaced by its integers at `coordinates`."""

        def pick(name: str) -> Integers:
            entry = self.table[name]
            return entry.values[self.mesh.index(entry.axes, coordinates)]

        return _substitute(value, pick)


def _substitute(value: Any, pick: Any) -> Any:
    if isinstance(value, PerRankInt):
        return pick(value.name)
    return fx.node.map_aggregate(value, lambda leaf: pick(leaf.name) if isinstance(leaf, PerRankInt) else leaf)
