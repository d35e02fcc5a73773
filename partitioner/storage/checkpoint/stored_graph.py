"""Weights that are held as they are stored, in a rank's graph: codes and scales instead of the weight.

    linear(x, weight, bias)            ->  stored_linear(x, codes, scales, zeros, rows, columns, bias)
    grouped_linear(x, weight, counts)  ->  stored_grouped_linear(x, codes, ..., counts)
    any other op of weight             ->  the op of stored_weight(codes, ...)

The last step of emission: what passes and proofs see is the weight, so that they need know nothing of formats. Which
weights can be held so is for `partitioner.storage.checkpoint.stored_form` to say; the others are expanded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx
from torch.nn import functional

from partitioner.errors import PlanError
from partitioner.program.program import HeldForm, Program
from runtime.ops.experts import grouped_linear
from runtime.ops.kernels.stored.stored_linear import stored_grouped_linear, stored_linear, stored_weight

__all__ = ["stored_forms", "use_stored"]

_ROLES = ("codes", "scales", "zeros", "rows", "columns")


def stored_forms(program: Program) -> dict[str, HeldForm]:
    """How each weight that is held as stored is held; empty where the plan does not ask for it."""
    if not program.keeps_stored:
        return {}
    origins = program.origins
    if origins is None or not origins.has_quantized:
        raise PlanError(
            "weights='stored' is for weights that files hold quantised; these are not: leave it out, or partition the "
            "folder of a quantised checkpoint"
        )
    found: dict[str, HeldForm] = {}
    for weight in program.weights.values():
        if weight.source == "checkpoint" and weight.make is None:
            form = origins.held_form(weight.name, weight.aliases)
            if form is not None:
                found[weight.name] = form
    return found


def use_stored(graph: fx.Graph, forms: Mapping[str, HeldForm]) -> None:
    """Replaces the uses of these weights in `graph`, which has been lowered."""
    for node in [node for node in graph.nodes if node.op == "get_attr" and str(node.target) in forms]:
        name, form = str(node.target), forms[str(node.target)]
        with graph.inserting_before(node):
            roles = [role if role != "zeros" or form.has_zeros else None for role in _ROLES]
            parts = [None if role is None else graph.get_attr(f"{name}.{role}") for role in roles]
        options: dict[str, Any] = {"code": form.code, "computed_in": form.computed_in}
        for user in list(node.users):
            _replace(graph, user, node, form, parts, options)
        if node.users:
            with graph.inserting_after(parts[-1]):
                more = {"dtype": node.meta["val"].dtype, "turned": form.turned}
                whole = graph.call_function(stored_weight, tuple(parts), options | more)
            whole.meta = dict(node.meta)
            node.replace_all_uses_with(whole)
        graph.erase_node(node)


def _replace(
    graph: fx.Graph, user: fx.Node, weight: fx.Node, form: HeldForm, parts: list[Any], options: dict[str, Any]
) -> None:
    """Makes `user` a product with what is stored, where it is a product with the weight alone."""
    given = list(user.args)
    if given.count(weight) != 1 or weight in user.kwargs.values() or given.index(weight) != 1:
        return
    if user.target is functional.linear and not form.turned and form.num_dims == 2:
        bias = given[2] if len(given) > 2 else user.kwargs.get("bias")
        user.target, user.args, user.kwargs = stored_linear, (given[0], *parts, bias), options
    elif user.target is grouped_linear and form.num_dims == 3:
        bias = given[3] if len(given) > 3 else user.kwargs.get("bias")
        if bool(user.kwargs.get("transposed", False)) == form.turned:
            counts = given[2] if len(given) > 2 else user.kwargs["counts"]
            user.target, user.args, user.kwargs = stored_grouped_linear, (given[0], *parts, counts, bias), options
