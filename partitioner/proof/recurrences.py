"""Whether several tokens at once do to states what single steps do: each layer with a state, tried in float64.

    step     x[B, 1, H] -> y[B, 1, ..] ..     the model's code for one token, behind a state
    piece    x[B, S, H] -> y[B, S, ..] ..     its code for S tokens, behind a state

A region is what a graph computes in the module that reads and writes a state. Regions that look alike are tried once,
with random weights and inputs: for all ways to cut a few tokens into pieces, and for pieces around the sizes at which
chunked code changes, the outputs and the last states must be those of the single steps. Of the graph without its
regions, analysis proves that each token, and each sequence, is computed by itself, but for causal attention.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.functional import pad

from partitioner.analysis.layouts.infer_layout import Layouts
from partitioner.analysis.tokens.slot_independence import why_slots_matter
from partitioner.analysis.tokens.token_mixing import BATCH_RULES, SEQUENCE_RULES, first_mixing
from partitioner.program.node_arguments import evaluate, node_values
from partitioner.program.program import Program
from partitioner.proof.float64 import lifted
from partitioner.proof.regions import Region, regions_of
from partitioner.sharding.layout import REPLICATED, Layout
from runtime.ops.state import state_read, state_write

__all__ = ["why_pieces_differ"]

_ROWS, _FEW = 2, 5
_LONGER = (7, 16, 17, 32, 33, 63, 64, 65, 128, 129, 257)
"""Around the sizes of chunks, and between them."""
_BEHIND = 3
"""Tokens of a second piece, behind a longer one."""
_CLOSE = 1e-8
_WIDE = 8.0
_LARGE, _LARGEST = 2**24, 2**28
"""Numbers that a region's weights hold: from there on it is tried on fewer lengths, or not at all."""
_PER_STATE = 32
"""A number of a state counts as so many of the former: each token reads and writes it several times."""


def why_pieces_differ(piece: Program, step: Program) -> str | None:
    """Why `piece` cannot take the place of single steps; None: it is proven that it can. Neither is changed."""
    found, others = regions_of(piece), regions_of(step)
    if isinstance(found, str) or isinstance(others, str):
        return found if isinstance(found, str) else str(others)
    if set(found) != set(others):
        return "its code for several tokens remembers other things than its code for one"
    mixed = _why_rest_mixes(piece, list(found.values()))
    if mixed is not None:
        return mixed
    tried: set[str] = set()
    for key, region in found.items():
        if len(region.outputs) != len(others[key].outputs):
            return f"{region.path}: its code for several tokens hands on other values than its code for one"
        kind = f"{region.text}\n{others[key].text}"
        if kind not in tried:
            tried.add(kind)
            problem = _tried(piece, region, step, others[key])
            if problem is not None:
                return f"{region.path}: {problem}"
    return None


# -- the graph without its regions -------------------------------------------------------------------------------------


def recurrence(x: Tensor) -> Tensor:
    """Stands for a region, while analysis looks at the rest."""
    raise NotImplementedError


def _why_rest_mixes(program: Program, regions: list[Region]) -> str | None:
    copy = program.copy()
    nodes = {node.name: node for node in copy.graph.nodes}
    for region in regions:
        x, inside = nodes[region.input.name], {nodes[node.name] for node in region.nodes}
        for y in (nodes[each.name] for each in region.outputs):
            with copy.graph.inserting_after(y):
                made = copy.graph.call_function(recurrence, (x,))
            made.meta = dict(y.meta)
            for user in list(y.users):
                if user not in inside and user is not made:
                    user.replace_input_with(y, made)
        for node in sorted(inside, key=list(copy.graph.nodes).index, reverse=True):
            copy.graph.erase_node(node)
    for dim, rules in (("sequence", SEQUENCE_RULES), ("batch", BATCH_RULES)):
        mixed = first_mixing(copy, dim, {**rules, recurrence: _by_itself})  # type: ignore[arg-type]
        if mixed is not None:
            return mixed
    return why_slots_matter(copy)


def _by_itself(node: fx.Node, layouts: Layouts) -> str | None:
    (x,) = node.all_input_nodes
    given: Layout = layouts[x]
    if any(dim not in (0, 1) for dim in given.split_dims):
        return "is given something other than one row per {what}"
    rank = len(node.meta["val"].shape)
    layouts[node] = Layout((*given.dims[:2], *REPLICATED(rank).dims[2:]))
    return None


# -- a region on numbers -----------------------------------------------------------------------------------------------


@dataclass
class _Running:
    """A region of a program, with its weights, and what it remembers."""

    program: Program
    region: Region
    weights: dict[str, Tensor]
    states: dict[str, Tensor] = field(default_factory=dict)
    sizes: dict[tuple[fx.Node, int, int], Any] = field(default_factory=dict)
    """Integers of the graph, for so many rows of so many tokens."""
    calls: list[tuple[fx.Node, Any, Any]] = field(init=False)
    """What is run in order, with arguments as they are tried: a region runs hundreds of times."""

    def __post_init__(self) -> None:
        self.calls = [
            (node, *fx.node.map_aggregate((node.args, node.kwargs), _tried_as))
            for node in self.region.nodes
            if node_values(node)
        ]

    def start(self, rows: int) -> None:
        self.states = {
            name: torch.zeros((rows, *self.program.states[name].shape), dtype=lifted(self.program.states[name].dtype))
            for name in self.region.states
        }

    def __call__(self, x: Tensor) -> list[Tensor]:
        rows, size = x.shape[:2]
        symbols = {self.program.symbols["batch"]: rows}
        if "sequence" in self.program.symbols:
            symbols[self.program.symbols["sequence"]] = size
        values: dict[fx.Node, Any] = {self.region.input: x}
        after = dict(self.states)

        def value(node: fx.Node) -> Any:
            if node in values:
                return values[node]
            if node.op == "get_attr":
                return self.weights[str(node.target)]
            assert not node_values(node), node
            if (node, rows, size) not in self.sizes:
                self.sizes[node, rows, size] = evaluate(node.meta["val"], symbols)
            return self.sizes[node, rows, size]

        for node, args, kwargs in self.calls:
            if node.target is state_read:
                values[node] = self.states[kwargs["state"]]
            elif node.target is state_write:
                values[node] = after[kwargs["state"]] = value(args[0])
            else:
                args, kwargs = fx.node.map_arg((args, kwargs), value)
                run: Any = _FASTER.get(node.target, node.target)
                values[node] = run(*args, **kwargs)
        self.states = after
        return [values[each] for each in self.region.outputs]


def _conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1,),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    groups: int = 1,
) -> Tensor:
    """A filter for each channel, weight [C, 1, K], of x [B, C, S] as products of windows: in float64 torch takes twenty
    times as long for a few tokens of as many channels as a state-space layer has. Other convolutions are torch's.
    """
    by_channel = groups == x.shape[1] == weight.shape[0] and weight.shape[1] == 1
    if not by_channel or (*stride, *dilation) != (1, 1):
        return torch.conv1d(x, weight, bias, list(stride), list(padding), list(dilation), groups)
    windows = pad(x, (*padding, *padding)).unfold(2, weight.shape[2], 1)
    found = (windows * weight[:, 0, None]).sum(3)
    return found if bias is None else found + bias[:, None]


_FASTER: dict[Any, Any] = {torch.ops.aten.conv1d.default: _conv1d}
"""What is run in place of an op: the same in exact arithmetic."""


@torch.no_grad()
def _tried(piece: Program, region: Region, step: Program, other: Region) -> str | None:
    """The first way to cut a text into pieces that the two regions do not agree on; None: there is none."""
    moderate, wide = (_weights(piece, region, wide=w) | _weights(step, other, wide=w) for w in (False, True))
    return _tried_on(moderate, piece, region, step, other) or _tried_on(wide, piece, region, step, other, longer=())


def _tried_on(
    weights: dict[str, Any],
    piece: Program,
    region: Region,
    step: Program,
    other: Region,
    *,
    longer: tuple[int, ...] = _LONGER,
) -> str | None:
    if any(not isinstance(value, Tensor) for value in weights.values()):
        return "a constant that it reads has no data"
    count = sum(value.numel() for value in weights.values())
    if count > _LARGEST:
        return f"it is too large to be tried out, with {count} numbers"
    low, high = piece.limits.get("sequence", (1, None))
    remembered = sum(math.prod(piece.states[name].shape) for name in region.states)
    most = 65 if count + _PER_STATE * remembered > _LARGE else max(_LONGER)
    sizes = [size for size in longer if size <= min(most, high or most) and size >= low]
    ways = [*_compositions(_FEW), *((size, _BEHIND) for size in sizes)]
    ways = [way for way in ways if all(low <= size and (high is None or size <= high) for size in way)]
    if not ways:
        return f"it takes {low} tokens at least"
    width = region.input.meta["val"].shape[2:]
    x = torch.randn((_ROWS, max(map(sum, ways)), *width), generator=_generator(), dtype=torch.float64)
    by_steps, by_pieces = (_Running(p, r, weights) for p, r in ((step, other), (piece, region)))
    wanted, states = _one_by_one(by_steps, x, {sum(way) for way in ways})
    for way in ways:
        by_pieces.start(_ROWS)
        ends = itertools.accumulate(way)
        found = _joined([by_pieces(x[:, end - size : end]) for end, size in zip(ends, way, strict=True)])
        pairs = [("its result", one, other[:, : sum(way)]) for one, other in zip(found, wanted, strict=True)]
        pairs += [(f"the state {name!r}", value, states[sum(way)][name]) for name, value in by_pieces.states.items()]
        for what, one, same in pairs:
            if (error := _error(one, same)) > _CLOSE:
                return (
                    f"{what} is another for {' and '.join(map(str, way))} tokens at once than for single ones, by "
                    f"{error:.1g} of the largest"
                )
    alone = _Running(piece, region, weights)
    alone.start(1)
    size = sum(ways[-1])
    first = ways[-1][0]
    outputs = zip(alone(x[:1, :first]), wanted, strict=True)
    if any(_error(one, other[:1, :first]) > _CLOSE for one, other in outputs):
        return f"a sequence of {size} tokens depends on the others of its batch"
    return None


def _joined(pieces: list[list[Tensor]]) -> list[Tensor]:
    """Each output along the tokens."""
    return [torch.cat(each, dim=1) for each in zip(*pieces, strict=True)]


def _one_by_one(running: _Running, x: Tensor, ends: set[int]) -> tuple[list[Tensor], dict[int, dict[str, Tensor]]]:
    """What single steps yield, and their states after so many."""
    running.start(len(x))
    found, states = [], {}
    for position in range(x.shape[1]):
        found.append(running(x[:, position : position + 1]))
        if position + 1 in ends:
            states[position + 1] = dict(running.states)
    return _joined(found), states


def _weights(program: Program, region: Region, *, wide: bool) -> dict[str, Any]:
    """Random ones for what a checkpoint holds; all else as it is. None: there is no data.

    wide: biases, rates and scales from one end of what exp and softplus make of numbers to the other, where code that
    limits them does so.
    """
    found = dict[str, Any]()
    for name in region.weights:
        weight, data = program.weights[name], program.weight_data.get(name)
        if weight.source == "checkpoint":
            # by name: the regions of both programs are given the same
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            if wide and len(weight.shape) == 1:
                spread = torch.linspace(-_WIDE, _WIDE, weight.shape[0], dtype=torch.float64)
                found[name] = spread[torch.randperm(weight.shape[0], generator=generator)]
                continue
            scale = max(weight.shape[-1] if len(weight.shape) > 1 else 1, 1) ** -0.5
            found[name] = torch.randn(weight.shape, generator=generator, dtype=torch.float64) * scale
        else:
            found[name] = None if data is None or data.is_meta else data.to("cpu", lifted(data.dtype))
    return found


def _tried_as(leaf: Any) -> Any:
    """An argument of an op, in float64 and on the CPU, wherever the model lies."""
    return torch.device("cpu") if isinstance(leaf, torch.device) else lifted(leaf)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _compositions(total: int) -> Iterator[tuple[int, ...]]:
    """All ways to cut so many tokens into pieces."""
    if not total:
        yield ()
    for first in range(1, total + 1):
        for rest in _compositions(total - first):
            yield (first, *rest)


def _error(one: Tensor, other: Tensor) -> float:
    if one.shape != other.shape:
        return float("inf")
    error = (one - other).abs().max() / other.abs().max().clamp_min(1e-300)
    return float("inf") if error.isnan() else error.item()
