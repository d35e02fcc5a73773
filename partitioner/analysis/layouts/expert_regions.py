"""Where a program has routed experts, and which dims of which weights run over them.

A region goes from a dispatch to its combine. Ranks can share out its experts if what lies between works row by row, and
every weight with an expert in each row is read by grouped linears only. Where that does not hold, the region says why.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from partitioner.analysis.layouts.infer_experts import ROUTED
from partitioner.analysis.layouts.infer_layout import Layouts
from partitioner.analysis.layouts.memoise import Inferrer
from partitioner.analysis.rules.data_movement import is_move
from partitioner.program.node_arguments import arguments, describe, node_values
from partitioner.program.program import Program, Value
from partitioner.sharding.index_set import IndexSet
from partitioner.sharding.layout import REPLICATED, Layout, Rows, Split
from runtime.ops.experts import expert_combine, expert_dispatch, grouped_linear

__all__ = ["Region", "find_regions"]


@dataclass
class Region:
    """One layer's experts. weights: the dim of each weight along which its experts lie. why: why they stay whole."""

    dispatch: fx.Node
    combine: fx.Node | None = None
    num_experts: int = 0
    weights: dict[str, int] = field(default_factory=dict)
    why: str | None = None

    @property
    def choices(self) -> int:
        """Experts per token."""
        return int(arguments(self.dispatch)["index"].meta["val"].shape[1])

    @property
    def path(self) -> str:
        return str(self.dispatch.meta.get("path") or self.dispatch.name)


def find_regions(program: Program, axes: tuple[str, ...]) -> list[Region]:
    """Every region, in graph order, asked whether its experts could be dealt out over `axes`."""
    inferrer = Inferrer(program)
    return [
        _region(program, node, axes, inferrer)
        for node in program.graph.nodes
        if node.op == "call_function" and node.target is expert_dispatch
    ]


def _region(program: Program, dispatch: fx.Node, axes: tuple[str, ...], inferrer: Inferrer) -> Region:
    num_experts = arguments(dispatch)["num_experts"]
    region = Region(dispatch, num_experts=num_experts if isinstance(num_experts, int) else 0)
    if not region.num_experts:
        region.why = "the number of its experts is not fixed"
        return region
    rows = Rows(axes, ROUTED)
    layouts: Layouts = {}
    for source in dispatch.all_input_nodes:
        layouts[source] = REPLICATED(len(source.meta["val"].shape))
    layouts[arguments(dispatch)["index"]] = Layout((None, rows))
    inside, place = {dispatch}, {node: i for i, node in enumerate(program.graph.nodes)}
    layouts[dispatch] = inferrer.infer(dispatch, layouts).outputs
    for node in _from(dispatch, program):
        if not any(source in inside for source in node.all_input_nodes) or not node_values(node):
            if any(source in inside for source in node.all_input_nodes):
                region.why = f"{describe(node)} reads a size of its rows"
                return region
            continue
        if node.target is expert_combine:
            region.combine = node
            gates = arguments(node)["gates"]
            if place[gates] > place[dispatch]:
                region.why = "its gates are made after the tokens have been sorted"
            break
        for source in node.all_input_nodes:
            if source not in inside:
                layouts.setdefault(source, _beside(program, source))
        if node.target is grouped_linear and (why := _weights(program, node, layouts, region, inferrer, axes)):
            region.why = why
            return region
        found = inferrer.infer(node, layouts)
        changed = [s.name for s, want in found.requires if s in inside and layouts[s].row_dims != want.row_dims]
        if found.problem or changed:
            region.why = f"{describe(node)}: {found.problem or 'it does not work row by row'}"
            return region
        layouts[node] = found.outputs[0] if isinstance(node.meta["val"], Value) else found.outputs
        inside.add(node)
    if region.combine is None:
        region.why = "what the experts make of the tokens is not combined"
    elif not region.weights:
        region.why = "it has no weights with one part for each expert"
    return region


def _from(dispatch: fx.Node, program: Program) -> list[fx.Node]:
    nodes = list(program.graph.nodes)
    return nodes[nodes.index(dispatch) + 1 :]


def _beside(program: Program, source: fx.Node) -> Layout | tuple[Layout, ...]:
    values = node_values(source)
    found = tuple(REPLICATED(len(value.shape)) for value in values)
    return found[0] if len(found) == 1 else found


def _weights(
    program: Program, node: fx.Node, layouts: Layouts, region: Region, inferrer: Inferrer, axes: tuple[str, ...]
) -> str | None:
    """Finds the weights of a grouped linear and their dims; what is in the way."""
    a = arguments(node)
    for name in ("weight", "bias"):
        operand = a.get(name)
        if not isinstance(operand, fx.Node):
            continue
        chain = [operand]
        while chain[-1].op != "get_attr":
            tensors = [n for n in chain[-1].all_input_nodes if node_values(n)]
            if len(tensors) != 1 or not is_move(chain[-1]):
                return f"the {name} of {describe(node)} is not one weight, but {describe(chain[-1])} of several"
            chain.append(tensors[0])
        for each in chain:
            others = [u for u in each.users if u not in chain and u.target is not grouped_linear]
            if others:
                return f"{chain[-1].target} is read by {describe(others[0])} as well"
        found = _dim_of_experts(program, chain[::-1], region.num_experts, inferrer, axes)
        if found is None:
            return f"the experts of {chain[-1].target} do not lie along one of its dims"
        dim, laid = found
        region.weights[str(chain[-1].target)] = dim
        layouts.update(laid)
    return None


def _dim_of_experts(
    program: Program, chain: list[fx.Node], num_experts: int, inferrer: Inferrer, axes: tuple[str, ...]
) -> tuple[int, Layouts] | None:
    """The dim of the first node, a weight, whose split is that of the last one's first dim."""
    ranks = program.mesh.size(*axes)
    owned = tuple(IndexSet.range(i * num_experts // ranks, (i + 1) * num_experts // ranks) for i in range(ranks))
    shape = program.weights[str(chain[0].target)].shape
    for dim in (i for i, size in enumerate(shape) if size == num_experts):
        layouts: Layouts = {chain[0]: REPLICATED(len(shape)).with_dim(dim, Split(axes, owned))}
        for node in chain[1:]:
            found = inferrer.infer(node, layouts)
            if found.problem:
                break
            layouts[node] = found.outputs[0]
        else:
            last = layouts[chain[-1]]
            if last == REPLICATED(len(last.dims)).with_dim(0, Split(axes, owned)):
                return dim, layouts
    return None
