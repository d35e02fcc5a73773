"""The layout of what routed experts yield where ranks share them out: the general rules, beside the experts' own axes.

    limit_experts      index, gates [T, K]          ->  [T, K], [T, K]    of the tokens that a rank has there
    localise_experts   index, gates [T, K]          ->  [T, routed], [T, routed]      of its choices, a rank's own
    expert_send        hidden, index, gates [own T] ->  [routed, H], [routed, K], [routed, K], [own T]
    expert_dispatch    index [T, routed] or [routed, K]  ->  [routed, H], [routed], [routed]
    grouped_linear     rows [routed, in], weight [e, out, in] with e split over the same axes
    expert_combine     gates [T, routed]  ->  a partial sum over the experts' axes;  gates [routed, K]  ->  [routed, H]
    expert_return      rows [routed, H]   ->  [own T, H]

`routed` is `Rows(axes, "routed")`; or own tokens of a sequence, where every rank has all experts. Where ranks of other
axes have tokens of their own, what is routed differs between these as well: its axes are both together. The other dims,
and the axes that divide an expert's own matrices, follow index notation: the op is inferred without what is routed,
which is put back afterwards. That the experts of the weights are those of the choices is for `proof/experts.py` to see.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from partitioner.analysis.layouts.infer_layout import Inference, Layouts, infer_compute
from partitioner.program.node_arguments import arguments
from partitioner.program.program import Program
from partitioner.sharding.layout import Layout, Rows, Split, in_order
from runtime.ops.communicating import as_axes
from runtime.ops.expert_exchange import expert_return, expert_send, localise_experts
from runtime.ops.experts import expert_combine, expert_dispatch, grouped_linear, limit_experts

__all__ = ["OWN", "ROUTED", "infer_experts", "is_routed"]

ROUTED, TOKENS = "routed", "tokens"
OWN = ("sequence", "batch")
"""Kinds of rows that a rank has before tokens are routed, of one sequence or of its own ones."""


def is_routed(node: fx.Node, layouts: Layouts) -> bool:
    """Whether ranks share out the experts that this op is about, or the tokens that come to them."""
    if node.target in (limit_experts, localise_experts, expert_send, expert_return):
        return True
    if node.target not in (expert_dispatch, grouped_linear, expert_combine):
        return False
    return any(
        isinstance(dim, Rows) and dim.kind in (ROUTED, *OWN)
        for source in node.all_input_nodes
        if isinstance(layouts.get(source), Layout)
        for dim in layouts[source].dims
    )


def infer_experts(program: Program, node: fx.Node, layouts: Layouts) -> Inference:
    """For a node that `is_routed`."""
    return _RULES[node.target](program, node, layouts)


def _localise(program: Program, node: fx.Node, layouts: Layouts) -> Inference:
    a, axes = arguments(node), tuple(arguments(node)["axes"])
    tokens = layouts[a["index"]].dims[0]
    if tokens is not None and set(tokens.axes) & set(axes):
        tokens = None
    requires = tuple((a[name], Layout((tokens, None))) for name in ("index", "gates"))
    mine = Layout((tokens, Rows(axes, ROUTED)))
    return Inference((mine, mine), requires)


def _limit(program: Program, node: fx.Node, layouts: Layouts) -> Inference:
    """Those of a rank's own tokens are limited among themselves."""
    a = arguments(node)
    limited = Layout((layouts[a["index"]].dims[0], None))
    return Inference((limited, limited), tuple((a[name], limited) for name in ("index", "gates")))


def _send(program: Program, node: fx.Node, layouts: Layouts) -> Inference:
    a = arguments(node)
    axes = as_axes(a["axis"])
    tokens = layouts[a["hidden"]].dims[0]
    if not isinstance(tokens, Rows) or not set(axes) <= set(tokens.axes):
        tokens = Rows(axes, TOKENS)
    requires = tuple((a[name], Layout((tokens, None))) for name in ("hidden", "index", "gates"))
    rows = Layout((_routed(tokens, axes), None))
    return Inference((rows, rows, rows, Layout((tokens,))), requires)


def _return(program: Program, node: fx.Node, layouts: Layouts) -> Inference:
    a = arguments(node)
    rows, back = layouts[a["rows"]], layouts[a["back"]]
    wanted = Layout((_routed(back.dims[0], as_axes(a["axis"])), None), rows.partial)
    return Inference((Layout((back.dims[0], None), rows.partial),), ((a["rows"], wanted), (a["back"], back)))


def _dispatch(program: Program, node: fx.Node, layouts: Layouts) -> Inference:
    a = arguments(node)
    index = layouts[a["index"]]
    tokens, choices = index.dims
    routed = tokens if choices is None else _routed(tokens, choices.axes)
    if choices is not None and tokens is not None and set(tokens.axes) & set(choices.axes):
        return Inference((), (), f"the choices are {index}: routed to ranks that have tokens of their own")
    found = _without(program, node, layouts, {a["hidden"]: (0,), a["index"]: (0, 1)})
    requires = _put_back(found, {a["hidden"]: {0: tokens}, a["index"]: {0: tokens, 1: choices}})
    outputs = tuple(layout.with_dim(0, routed) for layout in found.outputs)
    return Inference(outputs, requires, found.problem)


def _grouped(program: Program, node: fx.Node, layouts: Layouts) -> Inference:
    a = arguments(node)
    routed = layouts[a["rows"]].dims[0]
    weights = [a[name] for name in ("weight", "bias") if isinstance(a.get(name), fx.Node)]
    experts = layouts[a["weight"]].dims[0]
    if isinstance(routed, Rows) and routed.kind in OWN:
        fits = experts is None or not set(experts.axes) & set(routed.axes)
    else:
        # whose experts exactly is for `proof/experts.py` to see: of other axes, ranks have other tokens
        fits = isinstance(routed, Rows) and isinstance(experts, Split) and set(experts.axes) <= set(routed.axes)
    if not fits:
        return Inference((), (), f"rows of {routed} meet the experts {experts or 'of all ranks'}")
    every = [a["rows"], a["counts"], *weights]
    found = _without(program, node, layouts, dict.fromkeys(every, (0,)))
    back = {a["rows"]: {0: routed}, a["counts"]: {0: routed}, **{n: {0: experts} for n in weights}}
    outputs = tuple(layout.with_dim(0, routed) for layout in found.outputs)
    return Inference(outputs, _put_back(found, back), found.problem)


def _combine(program: Program, node: fx.Node, layouts: Layouts) -> Inference:
    a = arguments(node)
    tokens, choices = layouts[a["gates"]].dims
    routed = layouts[a["rows"]].dims[0]
    wanted = tokens if choices is None else _routed(tokens, choices.axes)
    if tokens is not None and routed != wanted:
        return Inference((), (), f"rows of {routed} are weighed by gates of {wanted}")
    found = _without(program, node, layouts, {a["rows"]: (0,), a["order"]: (0,), a["gates"]: (0, 1)})
    requires = _put_back(found, {a["rows"]: {0: routed}, a["order"]: {0: routed}, a["gates"]: {0: tokens, 1: choices}})
    (output,) = found.outputs
    summed = frozenset() if choices is None else frozenset(choices.axes)
    return Inference((Layout(output.with_dim(0, tokens).dims, output.partial | summed),), requires, found.problem)


def _routed(tokens: Any, axes: tuple[str, ...]) -> Rows:
    """What comes to a rank's experts over `axes`, of ranks that have these tokens."""
    return Rows(in_order((*axes, *(() if tokens is None else tokens.axes))), ROUTED)


def _without(program: Program, node: fx.Node, layouts: Layouts, routed: dict[fx.Node, tuple[int, ...]]) -> Inference:
    """Inferred as if nobody shared out the experts: these dims are whole."""
    plain: Layouts = {source: layouts[source] for source in node.all_input_nodes if source in layouts}
    for source, dims in routed.items():
        for dim in dims:
            plain[source] = plain[source].with_dim(dim, None)
    return infer_compute(program, node, plain)


def _put_back(found: Inference, dims: dict[fx.Node, dict[int, Any]]) -> tuple[tuple[fx.Node, Layout], ...]:
    requires = []
    for source, layout in found.requires:
        for dim, rows in dims.get(source, {}).items():
            layout = layout.with_dim(dim, rows)
        requires.append((source, layout))
    return tuple(requires)


_RULES: dict[Any, Callable[[Program, fx.Node, Layouts], Inference]] = {
    limit_experts: _limit,
    localise_experts: _localise,
    expert_send: _send,
    expert_return: _return,
    expert_dispatch: _dispatch,
    grouped_linear: _grouped,
    expert_combine: _combine,
}
