"""Linears of a captured decode step with the norm before them and the gate behind them, as one op: `products.py`.

    linear(x, w), stored_linear(x, w..)                                   ->  product(x, w)
    gated(linear(x, g), linear(x, u), act), or of one linear's halves     ->  product(x, u, gate=g, act=act)
    total, n = added_norm(a, b, ..); linear(n, w)                         ->  total, y = product(a, w, added=b, norm=..)
    the same of b = all_reduce(y)                                         ->  total, y = summing_product(..)(a, w, ..)
    the same of b = product(h, v)                                         ->  total, y = chained_product(a, w, ..)
    attend(rotated(q, c, s, h), rotated(k, c, s, h), v, ..)               ->  attend(q, k, v, .., rotation=(c, s, h))
    attend(q, k, v, p) at positions p of the step's inputs                ->  attend(q, k, v, p, ahead=True)

A kernel of `product` reads weights before the kernel before it has ended: so they must be weights of the program, which
nothing writes while it runs, and not what the graph makes of them. An attention does so with its positions, and with
what is cached of earlier tokens. Chains that do not fit stay as they are.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from runtime.execution.fusion.operations import added_norm, gated, rotated
from runtime.execution.fusion.products import chained_product, product, summing_product
from runtime.ops.kernels.decode.few_rows import KERNEL_DTYPES
from runtime.ops.kernels.stored.stored_linear import stored_linear

__all__ = ["is_mostly_products", "with_products"]

_VIEWS = frozenset({
    operator.getitem, torch.transpose, torch.unsqueeze, torch.narrow, torch.permute, torch.squeeze,
    torch.Tensor.view, "view", "reshape", "split", "size", "expand", "chunk",
})  # fmt: skip
_LOCAL = _VIEWS | {added_norm, gated, rotated, product, chained_product}
"""What communicates with nobody."""
_FEW = 3
"""Other ops for each product, up to which a compiler has little to gain."""


def with_products(graph: fx.Graph, num_weights: int) -> fx.Graph:
    """A copy of a bound graph, of which the first `num_weights` placeholders are weights; nodes keep their order."""
    copy = fx.Graph()
    copy.output(copy.graph_copy(graph, {}))
    given = [node for node in copy.nodes if node.op == "placeholder"]
    weights, inputs = set(given[:num_weights]), set(given[num_weights:])
    for node in list(copy.nodes):
        if _calls(node, gated):
            _gate(node, weights)
        elif node.op == "call_function":
            _rotation(node)
            _ahead(node, inputs)
    for node in list(copy.nodes):
        if _is_linear(node, weights):
            weight, bias = _weight_of(node)
            node.target, node.args, node.kwargs = product, (node.args[0], weight, bias), {}
    place = {node: index for index, node in enumerate(copy.nodes)}
    taken: set[fx.Node] = set()
    for node in list(copy.nodes):
        if _calls(node, product):
            _norm(node, place, taken)
    copy.eliminate_dead_code(
        is_impure_node=lambda node: node not in taken and (node.op != "call_function" or node.target not in _MADE_ONE)
    )
    copy.lint()
    return copy


_MADE_ONE: frozenset[Any] = frozenset({operator.getitem, added_norm, torch.mul, torch.rms_norm, rotated})
"""What may go once nobody reads it."""


def is_mostly_products(graph: fx.Graph, weights: Sequence[Tensor]) -> bool:
    """Whether a graph of `with_products` has few ops besides that a kernel each would be launched for."""
    taken = (*KERNEL_DTYPES, torch.float8_e4m3fn)  # the last one: codes
    if any(weight.is_floating_point() and weight.dtype not in taken for weight in weights):
        return False
    calls = [node.target for node in graph.nodes if node.op in ("call_function", "call_method")]
    products = sum(_is_product(target) for target in calls)
    return sum(not _is_product(target) and target not in _VIEWS for target in calls) <= _FEW * products


def _is_product(target: Any) -> bool:
    return target is product or hasattr(target, "is_product")


def _gate(node: Any, weights: set[Any]) -> None:
    activated, other, act = node.args
    if _calls(activated, operator.getitem) and _calls(other, operator.getitem):
        split, first, second = activated.args[0], activated.args[1], other.args[1]
        if split is not other.args[0] or {first, second} != {0, 1} or not _in_halves(split):
            return
        linear = split.args[0]
        if all(len(each.users) == 1 for each in (activated, other, linear)) and _has_no_bias(linear, weights):
            node.target, node.args = product, (linear.args[0], _weight_of(linear)[0])
            node.kwargs = {"act": act, "gate_first": first == 0}
            for each in (activated, other, split, linear):
                node.graph.erase_node(each)
        return
    both = activated is not other and all(_has_no_bias(each, weights) for each in (activated, other))
    both = both and activated.target is other.target and activated.args[0] is other.args[0]
    if both and len(activated.users) == len(other.users) == 1:
        node.target, node.args = product, (other.args[0], _weight_of(other)[0])
        node.kwargs = {"gate": _weight_of(activated)[0], "act": act}
        for each in (activated, other):
            node.graph.erase_node(each)


def _rotation(node: Any) -> None:
    rotates = getattr(node.target, "rotates", None)
    if rotates is None or not all(_calls(each, rotated) and len(each.users) == 1 for each in node.args[:2]):
        return
    (q, *by), (k, *also_by) = (each.args for each in node.args[:2])
    if by != also_by or node.args[0] is node.args[1]:
        return
    node.target = _attending(node.target, rotates)
    node.args, node.kwargs = (q, k, *node.args[2:]), {**node.kwargs, "rotation": tuple(by)}


def _ahead(node: Any, inputs: set[Any]) -> None:
    if hasattr(node.target, "rotates") and len(node.args) > 3 and node.args[3] in inputs:
        node.kwargs = {**node.kwargs, "ahead": True}


def _attending(attend: Callable[..., Tensor], rotates: Callable[..., bool]) -> Callable[..., Tensor]:
    """`attend` of what is still to be rotated: by itself, where it does that."""

    def attend_rotated(q: Tensor, k: Tensor, *given: Any, rotation: tuple[Tensor, Tensor, int], **named: Any) -> Tensor:
        if rotates(q, *rotation):
            return attend(q, k, *given, **named, rotation=rotation)
        return attend(rotated(q, *rotation), rotated(k, *rotation), *given, **named)

    attend_rotated.rotates = rotates  # type: ignore[attr-defined]
    return attend_rotated


def _in_halves(split: Any) -> bool:
    if not (isinstance(split, fx.Node) and split.op == "call_method" and split.target == "split"):
        return False
    sizes = split.args[1] if len(split.args) == 3 and split.args[2] == -1 else ()
    return isinstance(sizes, (list, tuple)) and len(sizes) == 2 and sizes[0] == sizes[1] and len(split.users) == 2


def _norm(node: Any, place: dict[fx.Node, int], taken: set[fx.Node]) -> None:
    """taken: sums over the ranks, and products, that other products take themselves."""
    x = node.args[0]
    if _calls(x, torch.rms_norm) and len(x.args) == 4 and not x.kwargs and len(x.users) == 1 and x.args[3] is not None:
        node.args = (x.args[0], *node.args[1:])
        node.kwargs = {**node.kwargs, "norm": (x.args[1], x.args[2], x.args[3])}
        return
    if _calls(x, torch.mul) and len(x.users) == 1 and not x.kwargs:
        for scale, normed in (x.args, reversed(x.args)):
            alone = _calls(normed, torch.rms_norm) and len(normed.args) == 4 and len(normed.users) == 1
            if alone and normed.args[2] is None and normed.args[3] is not None and isinstance(scale, fx.Node):
                node.args = (normed.args[0], *node.args[1:])
                node.kwargs = {**node.kwargs, "norm": (normed.args[1], scale, normed.args[3]), "scales": True}
                return
    if not (_calls(x, operator.getitem) and x.args[1] == 1 and len(x.users) == 1):
        return
    both = x.args[0]
    if not _calls(both, added_norm) or both.args[4] is None:
        return
    totals = [user for user in both.users if user is not x]
    users = [user for total in totals for user in total.users]
    if not all(_calls(total, operator.getitem) and total.args[1] == 0 for total in totals):
        return
    if any(place[user] < place[node] for user in users):
        return
    a, b, size, weight, eps = both.args
    with node.graph.inserting_before(node):
        fused = node.graph.call_function(product, (a, *node.args[1:]))
        fused.kwargs = {**node.kwargs, "added": b, "norm": (size, weight, eps), "scales": both.kwargs["scales"]}
        total = node.graph.call_function(operator.getitem, (fused, 0))
    place[fused] = place[total] = place[node]
    _sum(fused, place, taken)
    _chain(fused, taken)
    for old in totals:
        total.meta = dict(old.meta)
        old.replace_all_uses_with(total)
    node.target, node.args, node.kwargs = operator.getitem, (fused, 1), {}


def _sum(node: Any, place: dict[fx.Node, int], taken: set[fx.Node]) -> None:
    """Takes the sum over the ranks that is added, where nothing between them may communicate."""
    x, reduce = node.args[0], node.kwargs["added"]
    if "channel" in x.meta and "channel" not in reduce.meta:
        x, reduce = reduce, x
    if "channel" not in reduce.meta or len(reduce.users) != 2 or node.kwargs["norm"][2] is None:
        return
    between = (other for other in node.graph.nodes if place[reduce] < place[other] < place[node])
    if any(other.op != "placeholder" and other.target not in _LOCAL for other in between):
        return
    (summand,) = reduce.args
    taken.add(reduce)
    node.target = summing_product(reduce.target, reduce.meta["channel"])
    node.args, node.kwargs = (x, *node.args[1:]), {**node.kwargs, "added": summand}


def _chain(node: Any, taken: set[fx.Node]) -> None:
    """Takes the product that is added."""
    if node.target is not product or node.kwargs["norm"][2] is None:
        return
    for x, other in ((node.args[0], node.kwargs["added"]), (node.kwargs["added"], node.args[0])):
        if not _calls(other, product) or other.kwargs or other.args[2] is not None or len(other.users) != 2:
            continue
        taken.add(other)
        named = {name: value for name, value in node.kwargs.items() if name != "added"}
        node.target, node.args, node.kwargs = chained_product, (x, *node.args[1:]), {**named, "first": other.args[:2]}
        return


def _calls(node: Any, target: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target is target


def _is_linear(node: Any, weights: set[Any]) -> bool:
    """Whether it is a linear of a weight, given by its place, and its bias too if it has any; held as stored or not."""
    if _calls(node, functional.linear):
        fits = not node.kwargs and 2 <= len(node.args) <= 3
    else:
        fits = _calls(node, stored_linear) and set(node.kwargs) == {"code", "computed_in"} and 6 <= len(node.args) <= 7
    return fits and all(each is None or each in weights for each in node.args[1:])


def _weight_of(linear: Any) -> tuple[Any, Any]:
    """The weight, as `product` takes it, and the bias."""
    _, *given = linear.args
    if linear.target is functional.linear:
        return given[0], given[1] if len(given) == 2 else None
    return (*given[:5], linear.kwargs["code"], linear.kwargs["computed_in"]), given[5] if len(given) == 6 else None


def _has_no_bias(linear: Any, weights: set[Any]) -> bool:
    return _is_linear(linear, weights) and _weight_of(linear)[1] is None
