"""What one rank runs: its graph, the slices of the weights it needs, and its inputs.

The compiler makes it, the engine runs it.

    RankProgram   graph, coordinates, weights, inputs
    RunInput      a keyword of the run: dims are integers, or names shared with the other inputs ("batch")
    Bound         the values that an input may have
    Stage         which pipeline stage, what it takes from the one before and hands to the next
    OwnRows       along which dim of what crosses a rank has its own rows, and which
    SharedHead    the rank's part of a vocabulary head whose rows all stages share out
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from torch import Tensor, fx

from partitioner.errors import PlanError
from partitioner.sharding.index_set import IndexSet
from partitioner.sharding.mesh import Mesh
from runtime.program.shards import StateShard, WeightShard, WeightSource

__all__ = ["Bound", "Crossing", "Entry", "OwnRows", "RankProgram", "RunInput", "SharedHead", "Stage", "require_entry"]

Entry = Literal["text", "prefill", "decode"]
"""Whole texts at once; the tokens of prompts behind what is in the cache; one token per sequence."""


def require_entry(entry: object) -> None:
    """Raises `PlanError` where a name is that of no entry."""
    if entry not in get_args(Entry):
        raise PlanError(f"the entries of a program are {', '.join(get_args(Entry))}; got {entry!r}")


@dataclass(frozen=True)
class Bound:
    """The smallest and the largest value of an input, because it is looked up in `table`, which has `rows` rows."""

    low: int
    high: int
    rows: int
    table: str

    def __str__(self) -> str:
        return f"from {self.low} to {self.high}: they are looked up in the {self.rows} rows of {self.table!r}"


@dataclass(frozen=True)
class RunInput:
    """An input of the run; default: "required" | "arange" | "ones" | "zeros"; bound: None where any value will do.

    without: the token besides which the default is not what the model does without this input; None: there is none.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int | str, ...]
    default: str
    bound: Bound | None = None
    without: int | None = None


@dataclass(frozen=True)
class OwnRows:
    """The ranks of `axes` share out a dim, in an order of `runtime.ops.rows.token_order`."""

    dim: int
    axes: tuple[str, ...]
    order: str


@dataclass(frozen=True)
class Crossing:
    """A value that goes from a stage to the next: the name of its node, dims as those of a `RunInput`, dtype.

    rows: dims of which each rank has its own rows; of a dim that stands twice, rows of the rows that came before.
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: torch.dtype
    rows: tuple[OwnRows, ...] = ()


@dataclass(frozen=True)
class Stage:
    """Which of `count` pipeline stages a rank runs.

    Its graph takes `receives` after its inputs, under the names "receive_0", "receive_1" and so on, and yields a tuple
    of `sends`; the last one yields the result, or what all stages need for the head that they share out. rows_apart:
    whether rows of a batch may be run one after the other. pairs_per_token: how many pairs of a query and a key cost
    what one token costs elsewhere; 0: not known.
    """

    index: int
    count: int
    receives: tuple[Crossing, ...] = ()
    sends: tuple[Crossing, ...] = ()
    rows_apart: bool = False
    pairs_per_token: int = 0


@dataclass(frozen=True)
class SharedHead:
    """Its graph takes `receives`, which the last stage yields, after the inputs of the run."""

    build_graph: Callable[[], fx.Graph] = field(repr=False, compare=False)
    receives: tuple[Crossing, ...]


@dataclass(frozen=True)
class RankProgram:
    """See the module's docstring."""

    build_graph: Callable[[], fx.Graph] = field(repr=False, compare=False)
    mesh: Mesh
    coordinates: Mapping[str, int]
    weights: tuple[WeightShard, ...]
    inputs: tuple[RunInput, ...]
    weight_data: Mapping[str, Tensor] = field(default_factory=dict, repr=False, compare=False)
    """Data known to the compiler, whole: what no checkpoint has, and the rest where the model had it."""
    eos_token_id: tuple[int, ...] = ()
    """The tokens after which the model's text ends, by its own configuration."""
    generation: Mapping[str, Any] = field(default_factory=dict)
    """What else that configuration says of generation, by the names of transformers' GenerationConfig."""
    states: tuple[StateShard, ...] = ()
    vocab_size: int = 0
    """Size of the result's last dim, whole."""
    vocabulary: tuple[IndexSet, ...] | None = None
    """Which indices of the result's last dim each rank along `vocabulary_axes` holds; None: all of them."""
    vocabulary_axes: tuple[str, ...] = ("tp",)
    source: WeightSource | None = field(default=None, repr=False, compare=False)
    """Where the weights are read from; None: `weight_data` holds them."""
    read_from: str | None = field(default=None, compare=False)
    """The bundle that it was read from; None: it was compiled in this process."""
    stage: Stage | None = None
    """None where there is one stage."""
    shared_head: SharedHead | None = None
    """None where the last stage, or the one there is, yields the result."""
    limits: Mapping[str, tuple[int, int | None]] = field(default_factory=dict)
    """By name of a dim: the smallest and the largest size that the graph is right for, where not all are."""
    batch_axes: tuple[str, ...] = ()
    """Those whose ranks run sequences of their own; where empty, all ranks run the same."""
    tokens_as_rows: bool = False
    """Whether its graph, which is for one token, runs several at once: see `runtime/execution/prompts/`."""

    @property
    def rank(self) -> int:
        return self.mesh.rank(self.coordinates)

    @cached_property
    def graph(self) -> fx.Graph:
        """Weights are get_attr nodes by canonical name; node.meta keeps "path", "why" and "layout".

        Built when first asked for, and shared with other ranks where they run the same: not to be changed in place.
        """
        return self.build_graph()

    @cached_property
    def of_head(self) -> RankProgram | None:
        """The rank's part of a shared head as a program of its own, over the same weights, without states."""
        if self.shared_head is None:
            return None
        return replace(self, build_graph=self.shared_head.build_graph, states=(), shared_head=None)

    @cached_property
    def graph_module(self) -> fx.GraphModule:
        """The graph with its weights as meta tensors of the local shapes, under their own names."""
        parameters = {
            weight.name: torch.nn.Parameter(
                torch.empty(weight.local_shape, dtype=weight.dtype, device="meta"), requires_grad=False
            )
            for weight in self.weights
        }
        # a copy: whoever edits the module must not edit what the other ranks run
        graph = fx.Graph()
        graph.output(graph.graph_copy(self.graph, {}))
        return fx.GraphModule(parameters, graph, class_name=f"Rank{self.rank}")
