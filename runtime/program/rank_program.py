"""What one rank runs: its graph, the slices of the weights it needs, and its inputs.

The compiler makes it, the engine runs it.

    RankProgram   graph, coordinates, weights, inputs
    WeightShard   one tensor of the rank: its shape, and the pieces it is put together from
    Made          how a weight that no source holds is made from one that it does hold
    Piece         a block of a source tensor and the block of the local tensor it fills
    StateShard    what the rank remembers of each sequence between runs, such as a layer's keys
    RunInput      a keyword of the run: dims are integers, or names shared with the other inputs ("batch")
    Bound         the values that an input may have

Weights are described, never held: the device, the dtype's storage and the source of the data are chosen at load.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from partitioner.sharding.layout import IndexSet
from partitioner.sharding.mesh import Mesh

if TYPE_CHECKING:
    from runtime.weights.load_weights import WeightSource

__all__ = ["Block", "Bound", "Made", "Piece", "RankProgram", "RunInput", "StateShard", "WeightShard", "at", "extents"]

Block = tuple[tuple[int, int], ...]
"""A half-open range per dim."""


@dataclass(frozen=True)
class Piece:
    """`local[destination] = tensor[source]`; with strides, a rearrangement of elements that lie in `tensor[source]`.

    A checkpoint may store a weight in another order: transposed, interleaved, one tensor per expert. Element
    `[i, j, ...]` of the destination block is then number `offset + i * strides[0] + j * strides[1] + ...` of the
    tensor, counted in row-major order. Without strides, both blocks have the same extents but for those of 1.
    """

    tensor: str
    source: Block
    destination: Block
    offset: int = 0
    strides: tuple[int, ...] | None = None


def extents(block: Block) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in block)


def at(block: Block) -> tuple[slice, ...]:
    """`tensor[at(block)]`; () is the whole of a scalar."""
    return tuple(slice(*ends) for ends in block)


@dataclass(frozen=True)
class Made:
    """`make(the whole tensor of)` is the whole weight: no part of it may depend on which ranks there are.

    `make` is a function of a module, so that two programs that name it agree on what they share.
    """

    of: WeightShard
    make: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class WeightShard:
    """One weight of a rank; `indices[d]` are the indices of dim d that the rank holds, None for all of them.

    source: "checkpoint", "computed" (a buffer absent from checkpoints), "constant" or "made" (see `Made`). pieces:
    where its elements lie, in the tensors of the files where the program comes from such, in the model's own weight
    otherwise.
    """

    name: str
    dtype: torch.dtype
    global_shape: tuple[int, ...]
    local_shape: tuple[int, ...]
    indices: tuple[IndexSet | None, ...]
    source: str
    aliases: tuple[str, ...]
    pieces: tuple[Piece, ...]
    made: Made | None = None
    digest: str | None = None
    """SHA-256 of its bytes, row-major, where they must be these."""

    @property
    def is_whole(self) -> bool:
        return self.local_shape == self.global_shape

    @property
    def own_pieces(self) -> tuple[Piece, ...]:
        """Where its elements lie in the model's own weight: one piece per run of indices that lie together."""
        runs = []
        for size, owned in zip(self.global_shape, self.indices, strict=True):
            intervals = ((0, size),) if owned is None else owned.intervals
            ends = itertools.accumulate((stop - start for start, stop in intervals), initial=0)
            runs.append(list(zip(intervals, itertools.pairwise(ends), strict=True)))
        return tuple(
            Piece(self.name, tuple(source for source, _ in block), tuple(destination for _, destination in block))
            for block in itertools.product(*runs)
        )

    @property
    def bytes(self) -> int:
        return torch.Size(self.local_shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class StateShard:
    """`shape`: of this rank, per token or once per sequence; `sees`: how many positions back a later token may look,
    None for all.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    sees: int | None
    per_token: bool = True

    @property
    def bytes(self) -> int:
        """Per token, or of the whole sequence."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


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
    """An input of the run; default: "required" | "arange" | "ones" | "zeros"; bound: None where any value will do."""

    name: str
    dtype: torch.dtype
    shape: tuple[int | str, ...]
    default: str
    bound: Bound | None = None


@dataclass(frozen=True)
class RankProgram:
    """See the module's docstring."""

    build_graph: Callable[[], fx.Graph] = field(repr=False, compare=False)
    mesh: Mesh
    coordinates: Mapping[str, int]
    weights: tuple[WeightShard, ...]
    inputs: tuple[RunInput, ...]
    values: Mapping[str, Tensor] = field(default_factory=dict, repr=False, compare=False)
    """Data known to the compiler, whole: what no checkpoint has, and the rest where the model had it."""
    eos_token_id: tuple[int, ...] = ()
    """The tokens after which the model's text ends, by its own configuration."""
    states: tuple[StateShard, ...] = ()
    vocab_size: int = 0
    """Size of the result's last dim, whole."""
    vocabulary: tuple[IndexSet, ...] | None = None
    """Which indices of the result's last dim each rank along "tp" holds; None: all of them."""
    source: WeightSource | None = field(default=None, repr=False, compare=False)
    """Where the weights are read from; None: `values` holds them."""
    read_from: str | None = field(default=None, compare=False)
    """The bundle that it was read from; None: it was compiled in this process."""
    limits: Mapping[str, tuple[int, int | None]] = field(default_factory=dict)
    """By name of a dim: the smallest and the largest size that the graph is right for, where not all are."""

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
