"""The vocabulary head, and its rows shared out over the stages.

    last stage     h[B, 1, H], sent to all
    every stage    logits[B, 1, V/n] = h @ w[V/n, H]      n = stages, times tp where tp splits the rows as well

A token reads the weights of a layer on one stage, those of the head on the last one, which all others wait for where
the vocabulary is large. Rows shared out cost each stage the same. It is vocabulary parallelism as in Megatron-LM
(arXiv:1909.08053, section 3), over the stages (arXiv:2411.05288, for training).

A table that the embedding reads too becomes two weights: the embedding's stages hold it as before, and each stage its
rows for the head.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from partitioner.analysis.stages.order_nodes import classify, is_tensor
from partitioner.errors import PlanError
from partitioner.program.node_arguments import arguments, describe, operation
from partitioner.program.program import Program, Value
from partitioner.sharding.index_set import IndexSet
from partitioner.sharding.layout import REPLICATED, Layout, Split, in_order
from runtime.ops.collectives import all_gather
from runtime.ops.communicating import axis_argument
from runtime.ops.local import reorder

aten = torch.ops.aten

__all__ = ["Head", "find_head", "share_head"]

_CASTS = {aten.to, aten._to_copy}


@dataclass(frozen=True)
class Head:
    """product: the linear that yields logits. behind: what follows it, in order, the last of them the result.

    weight, bias: as the head's own weights are called, and what they are called now. rows: of the vocabulary. axes:
    that split it already.
    """

    product: fx.Node
    behind: tuple[fx.Node, ...]
    weight: tuple[str, fx.Node]
    bias: tuple[str, fx.Node] | None
    rows: int
    axes: tuple[str, ...]

    @property
    def names(self) -> frozenset[str]:
        """Of its own weights."""
        return frozenset(name for name, _ in (self.weight, *((self.bias,) if self.bias else ())))


# -- finding it --------------------------------------------------------------------------------------------------------


def find_head(program: Program) -> Head:
    """Raises `PlanError`, saying why, where the rows of a program's head cannot be shared out."""
    sources = program.graph.output_node().all_input_nodes
    if len(sources) != 1 or not program.has_head:
        raise PlanError(f"{program.name} has no vocabulary head")
    classes = classify(program)
    (node,) = sources
    behind: list[fx.Node] = []
    while node not in classes.weights_of:
        if node not in classes.ordered or not _works_on_any_part(node):
            raise PlanError(f"{describe(node)} stands between the head and the result, and may need all of the logits")
        behind.insert(0, node)
        (node,) = (each for each in node.all_input_nodes if is_tensor(each))
        if len(node.users) != 1:
            raise PlanError(f"{describe(node)} is read by more than what yields the logits")
    if operation(node) is not aten.linear:
        raise PlanError(f"the logits come from {describe(node)}, which is no linear")
    given = arguments(node)
    weight = _own(program, given["weight"])
    bias = None if given["bias"] is None else _own(program, given["bias"])
    input_layout = _layout(program, given["input"], 3)
    if input_layout.partial or any(dim not in (None, program.own_batch) for dim in input_layout.dims):
        raise PlanError(f"{describe(node)} reads {given['input']}, of which not every rank has all")
    held, across = _layout(program, given["weight"], 2).dims
    if across is not None or not (held is None or isinstance(held, Split)):
        raise PlanError(f"{weight[0]} is split along what the head sums up")
    rows = program.weights[str(given["weight"].target)].shape[0]
    axes = () if held is None else held.axes
    if rows < program.mesh.size("pp", *axes):
        raise PlanError(f"a vocabulary of {rows} has no row for each of {program.mesh.size('pp', *axes)} ranks")
    return Head(node, tuple(behind), weight, bias, rows, axes)


def _works_on_any_part(node: fx.Node) -> bool:
    """Whether a rank may run it on its own columns: every number of the result comes from one, and constants."""
    if node.target in (all_gather, reorder):
        return True
    if len([each for each in node.all_input_nodes if is_tensor(each)]) != 1 or not is_tensor(node):
        return False
    return torch.Tag.pointwise in getattr(node.target, "tags", ()) or operation(node) in _CASTS


def _own(program: Program, node: Any) -> tuple[str, fx.Node]:
    """What a weight of the head is called, apart from others that read the same one."""
    if node.op != "get_attr" or program.weights[str(node.target)].source != "checkpoint":
        raise PlanError(f"the head reads {describe(node)}, which is no weight of a checkpoint")
    weight = program.weights[str(node.target)]
    if weight.name in program.kept_whole:
        raise PlanError(f"{weight.name} stays whole: {program.kept_whole[weight.name]}")
    readers = {
        user
        for each in program.graph.nodes
        if each.op == "get_attr" and each.target == node.target
        for user in each.users
    }
    if len(readers) == 1:
        return weight.name, node
    free = (name for name in weight.aliases if name not in program.weights)
    return next(free, f"{weight.name}_of_head"), node


def _layout(program: Program, node: fx.Node, dims: int) -> Layout:
    if node.op == "get_attr":
        return program.weight_layouts.get(str(node.target), REPLICATED(dims))
    return node.meta.get("layout") or REPLICATED(dims)


# -- sharing it out ----------------------------------------------------------------------------------------------------


def share_head(program: Program, speeds: Sequence[float]) -> None:
    """Deals the rows of the head to the ranks of all stages, as many as their speeds say."""
    head = find_head(program)
    axes = in_order(("pp", *head.axes))
    split = Split(axes, _dealt(program, head.rows, axes, speeds))
    for (name, node), dims in zip((head.weight, head.bias), (2, 1), strict=True) if head.bias else ((head.weight, 2),):
        _rename(program, node, name, head.product)
        program.weight_layouts[name] = REPLICATED(dims).with_dim(0, split)
    why = f"the rows of {head.weight[0]} are shared out over {'x'.join(axes)}"
    node, parts = head.product, True
    _lay(program, node, split, why)
    for each in head.behind:
        if each.target is reorder:  # rows are dealt in their order, so that what is gathered is in order
            (gathered,) = each.all_input_nodes
            each.replace_all_uses_with(gathered)
            program.graph.erase_node(each)
            continue
        node = each
        if each.target is all_gather:
            each.args = (each.args[0], axis_argument(axes))
            each.kwargs = {"dim": each.kwargs["dim"], "sizes": list(split.sizes)}
            parts = False
        elif parts:
            _lay(program, each, split, why)
    if not parts:
        return
    if program.states:  # the sampler reads the parts where they are
        program.output = node.meta["layout"]
        return
    output = program.graph.output_node()
    dim = len(node.meta["val"].shape) - 1
    with program.graph.inserting_before(output):
        whole = program.graph.call_function(
            all_gather, (node, axis_argument(axes)), {"dim": dim, "sizes": list(split.sizes)}
        )
    whole.meta = {**node.meta, "layout": REPLICATED(dim + 1), "why": why}
    output.replace_input_with(node, whole)


def _dealt(program: Program, rows: int, axes: tuple[str, ...], speeds: Sequence[float]) -> tuple[IndexSet, ...]:
    """Ranges in the order of the ranks, none of them empty."""
    mesh = program.mesh
    size = mesh.size(*axes)
    within = size // mesh.size("pp")
    # axes stand in the mesh's order, of which pp is the first that can be here
    weights = [given for given in speeds or (1.0,) * mesh.size("pp") for _ in range(within)]
    total = sum(weights)
    ends = [round(rows * end / total) for end in itertools.accumulate(weights)]
    ends = [min(max(end, i + 1), rows - (size - 1 - i)) for i, end in enumerate(ends)]
    return tuple(IndexSet.range(start, end) for start, end in itertools.pairwise([0, *ends]))


def _rename(program: Program, node: fx.Node, name: str, user: fx.Node) -> None:
    weight = program.weights[str(node.target)]
    if name == weight.name:
        return
    others = (weight.name, *(alias for alias in weight.aliases if alias != name))
    program.weights[name] = replace(weight, name=name, aliases=others)
    program.weights[weight.name] = replace(weight, aliases=tuple(dict.fromkeys((*weight.aliases, name))))
    with program.graph.inserting_before(user):
        own = program.graph.get_attr(name)
    own.meta = dict(node.meta)
    user.replace_input_with(node, own)


def _lay(program: Program, node: fx.Node, split: Split, why: str) -> None:
    value = node.meta["val"]
    assert isinstance(value, Value)
    node.meta = {**node.meta, "layout": program.given(value).with_dim(len(value.shape) - 1, split), "why": why}
