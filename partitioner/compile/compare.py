"""Compare: does the partitioned model compute what the model computes, and if not, where does it first go wrong?

    first_divergence(parts, input_ids=ids)    the first node in graph order whose value differs, or None

The traced graph and every rank's graph run on the same inputs, and each node that both have is compared: what a rank
holds of it (its layout says which indices, and over which axes it is still a sum) against the same part of the whole
value. Both run in float64, whatever the model's dtype: rounding differs with the order of sums and is amplified where
large values cancel, so that in bfloat16 no limit tells it from an error. Only a few hundred values are held at a
time: each round samples nodes evenly and narrows to the first interval that ends in a difference. Where a rank fails,
the nodes before the failing one are compared first.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from partitioner.compile.emit import Emitter
from partitioner.compile.parts import Parts
from partitioner.errors import LayoutError
from partitioner.program.program import Program, Value
from partitioner.proof.float64 import in_float64
from partitioner.sharding.layout import REPLICATED, Layout, Split
from partitioner.sharding.mesh import Mesh
from runtime.engine.simulator import Simulator
from runtime.execution.executable import failing_node

__all__ = ["Divergence", "difference", "first_divergence", "tolerance"]

PROBES_PER_ROUND = 256

aten = torch.ops.aten
_SET = {
    aten.empty.memory_format: aten.zeros.default,
    aten.empty_like.default: aten.zeros_like.default,
    aten.new_empty.default: aten.new_zeros.default,
}
"""What stands in for memory that is not set yet, which is never the same twice."""


@dataclass(frozen=True)
class Divergence:
    """Where a rank's value first differs from the whole model's."""

    node: str
    path: str
    op: str
    layout: str
    rank: int
    error: float
    """The largest absolute difference over the largest magnitude of the whole value; inf where shapes differ."""
    detail: str = ""

    def __str__(self) -> str:
        where = f" in {self.path}" if self.path else ""
        how = self.detail or f"relative error {self.error:.2e}"
        rank = f" on rank {self.rank}" if self.rank >= 0 else ""
        return f"node {self.node!r}{where}, {self.op}, layout {self.layout}: {how}{rank}"


def tolerance(dtype: torch.dtype) -> float:
    """The relative error that rounding alone may reach: sums over ranks are taken in another order."""
    return {torch.float64: 1e-10, torch.float32: 1e-5}.get(dtype, 2e-2)


def difference(result: Tensor, reference: Tensor) -> float:
    """The largest absolute difference over the largest magnitude in `reference`; inf where shapes or NaNs differ."""
    if result.shape != reference.shape:
        return float("inf")
    if result.numel() == 0 or torch.equal(result, reference):
        return 0.0
    exact = torch.complex128 if reference.is_complex() else torch.float64
    a, b = result.to(exact), reference.to(exact)
    # masks hold infinities on purpose: equal ones do not differ
    same = (a == b) | (a.isnan() & b.isnan())
    gap = torch.where(same, 0.0, (a - b).abs()).max().item()
    finite = b[b.isfinite()]
    scale = finite.abs().max().item() if finite.numel() else 0.0
    if gap != gap:
        return float("inf")
    return gap / scale if scale else float("inf")


def first_divergence(
    parts: Parts[Any], *, limit: float | None = None, probes: int = PROBES_PER_ROUND, **inputs: Tensor | None
) -> Divergence | None:
    """See the module's docstring. The weights in float64 must fit in memory.

    `limit`: run in the model's own dtypes instead, and accept this relative error; for what only those show (an
    overflow, a cast that is missing).
    """
    if parts.traced is None:
        raise LayoutError(
            "these Parts do not hold the traced program, so there is nothing to compare node by node with"
        )
    found = _failure(parts.program, inputs)
    traced, program = parts.traced, parts.program
    if limit is None:
        traced, program = in_float64(traced), in_float64(program)
    if program.stages is not None:  # stages compute what the whole does: one of each rank is enough, without them
        # but what all stages share out: each rank runs all stages then
        shares = program.stages.shares_head
        mesh = program.mesh if shares else Mesh.of(**{**program.mesh.degrees, "pp": 1})
        program = dataclasses.replace(program, mesh=mesh, stages=None)
    names = _common(traced.graph, program.graph)
    if found is not None:
        order = [node.name for node in program.graph.nodes]
        before = set(order[: order.index(found.node)])
        names = [name for name in names if name in before]
    start, stop = 0, len(names)
    while start < stop:
        step = -(-(stop - start) // probes)
        # the last of each interval, so that the final sample is the result itself
        sample = [*range(start + step - 1, stop - 1, step), stop - 1]
        divergence, at = _first_of([names[i] for i in sample], traced, program, inputs, limit)
        if divergence is None:
            return found
        found = divergence
        if step == 1:
            return found
        start, stop = (sample[at - 1] + 1 if at else start), sample[at]
    return found


def _first_of(
    names: list[str], traced: Program, program: Program, inputs: Mapping[str, Tensor | None], limit: float | None
) -> tuple[Divergence | None, int]:
    alone = copy.copy(traced)
    alone.mesh = Mesh.of()
    wholes = _probe(alone, names, inputs)[0]
    ranks = _probe(program, names, inputs)
    nodes = {node.name: node for node in program.graph.nodes}
    for at, (name, whole) in enumerate(zip(names, wholes, strict=True)):
        divergence = _compare(nodes[name], whole, [values[at] for values in ranks], program.mesh, limit)
        if divergence is not None:
            return divergence, at
    return None, len(names)


def _probe(program: Program, names: list[str], inputs: Mapping[str, Tensor | None]) -> list[tuple[Tensor, ...]]:
    """The values of the nodes `names` on every rank."""
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    wanted: dict[str, fx.Node] = {}
    for node in program.graph.nodes:
        if len(wanted) == len(names) and node.op != "placeholder":
            break
        new = copied[node] = graph.node_copy(node, copied.__getitem__)
        if node.target in _SET:
            new.target = _SET[node.target]
            new.kwargs = {name: value for name, value in new.kwargs.items() if name != "memory_format"}
        if node.name in names:
            wanted[node.name] = new
    graph.output(tuple(wanted[name] for name in names))
    # unused nodes stay: every rank must reach every collective
    probed = copy.copy(program)
    probed.graph = graph
    emitter = Emitter(probed)
    return Simulator([emitter.rank(coordinates) for coordinates in probed.mesh])(**inputs)


def _failure(program: Program, inputs: Mapping[str, Tensor | None]) -> Divergence | None:
    """The node at which the ranks raise; None where they run through."""
    emitter = Emitter(program)
    simulator = Simulator([emitter.rank(coordinates) for coordinates in program.mesh])
    try:
        simulator(**inputs)
    except Exception as error:
        name = failing_node(error)
        node = next((node for node in program.graph.nodes if node.name == name), None)
        if node is None:
            raise
        return _divergence(node, -1, float("inf"), f"{type(error).__name__}: {error}")
    return None


def _divergence(node: fx.Node, rank: int, error: float, detail: str) -> Divergence:
    op = node.target if isinstance(node.target, str) else node.target.__name__
    return Divergence(node.name, str(node.meta.get("path", "")), op, str(node.meta.get("layout")), rank, error, detail)


def _common(traced: fx.Graph, partitioned: fx.Graph) -> list[str]:
    """Names of the tensors that both graphs compute, in the order of the partitioned one."""
    whole = {node.name for node in traced.nodes if _is_tensor(node)}
    return [node.name for node in partitioned.nodes if node.name in whole and _is_tensor(node)]


def _is_tensor(node: fx.Node) -> bool:
    return node.op == "call_function" and isinstance(node.meta.get("val"), Value)


def _compare(node: fx.Node, whole: Tensor, locals_: list[Tensor], mesh: Mesh, limit: float | None) -> Divergence | None:
    layout: Layout = node.meta.get("layout") or REPLICATED(whole.dim())
    for rank, coordinates in enumerate(mesh):
        part = whole
        for dim, size in enumerate(_held(layout, whole, mesh, coordinates)):
            if size is not None:
                part = part.index_select(dim, size)
        local = _summed(locals_, layout, mesh, rank)
        detail = ""
        if local.shape != part.shape:
            detail = f"shape {list(local.shape)} where the layout says {list(part.shape)}"
        accepted = _accepted(whole.dtype) if limit is None else limit
        error = difference(local, part)
        if error > accepted:
            return _divergence(node, rank, error, detail)
    return None


def _accepted(dtype: torch.dtype) -> float:
    return tolerance(dtype.to_real()) if dtype.is_floating_point or dtype.is_complex else 0.0


def _held(layout: Layout, whole: Tensor, mesh: Mesh, coordinates: Mapping[str, int]) -> Iterator[Tensor | None]:
    """Per dim, which indices of the whole value the rank holds; None: all."""
    for dim, split in enumerate(layout.dims):
        if not isinstance(split, Split):
            yield None
            continue
        owned = split.at(mesh, coordinates).indices()
        # a dim of batch * heads is split by heads, its constant inner factor
        size = 1 + max(i for part in split.owned for i in part.indices())
        outer = whole.shape[dim] // size
        yield torch.tensor([o * size + i for o in range(outer) for i in owned], dtype=torch.int64)


def _summed(locals_: list[Tensor], layout: Layout, mesh: Mesh, rank: int) -> Tensor:
    if not layout.partial:
        return locals_[rank]
    first, *others = (locals_[other] for other in mesh.group(tuple(layout.partial), rank))
    if any(other.shape != first.shape for other in others):
        return first
    total = first.clone()
    for other in others:
        total += other
    return total
