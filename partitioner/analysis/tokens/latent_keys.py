"""Whether the keys and values of an attention are products of one narrow value, which may be cached in their place.

    k[b, h, s, d]   weight[h * each + first + i, :] . latent[b, s, :]     for some dims d, in order i = 0, 1, ...
                    carried[b, s, e]                                      for the others, alike for every head
    v[b, h, s, e]   weight[h * each + first + e, :] . latent[b, s, :]

Found by going back from keys and values through data-movement ops, which then run forward on element numbers: each
element is so known by the row of the linear that made it, or as an element of another value. Batch and sequence are
above 1, so that a dim merged with them is told apart. Multi-head latent attention: arXiv:2405.04434, section 2.1.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from partitioner.analysis.rules.data_movement import IDENTITIES, is_move, run_move
from partitioner.program.node_arguments import (
    arguments,
    describe,
    evaluate,
    map_nodes,
    node_values,
    operation,
    shape_at,
)
from partitioner.program.program import Program, Value
from runtime.ops.local import shard

aten = torch.ops.aten

__all__ = ["Carried", "LatentKeys", "Projection", "find_latent_keys"]

_BATCH, _SEQUENCE = 2, 3
_FILLED = {aten.empty, aten.new_empty, aten.new_zeros, aten.zeros, aten.new_full, aten.full}
"""What is written over before it is read, if anything is to be found."""
_SAME_SHAPE = {aten.reshape, aten.view, aten.unsqueeze, aten.squeeze, aten._unsafe_view, *IDENTITIES}


@dataclass(frozen=True)
class Projection:
    """Feature i of head h is row h * each + first + i of `weight` [heads * each, R], for `count` features."""

    weight: fx.Node
    each: int
    first: int
    count: int


@dataclass(frozen=True)
class Carried:
    """Features from `first` of `source` [B, S, ..], but for dims of size 1, and the dims of a key that they are."""

    source: fx.Node
    first: int
    at: tuple[int, ...]


@dataclass(frozen=True)
class LatentKeys:
    """See the module's docstring. latent: [B, S, width], but for dims of size 1. projected: dims of a key, in order."""

    latent: fx.Node
    width: int
    keys: Projection
    values: Projection
    projected: tuple[int, ...]
    carried: tuple[Carried, ...]

    @property
    def cached(self) -> int:
        """Numbers per token."""
        return self.width + sum(len(part.at) for part in self.carried)


class _NotLatent(Exception):
    """Why keys and values are no products of a narrow value."""


def find_latent_keys(program: Program, k: fx.Node, v: fx.Node) -> LatentKeys | str:
    """For keys and values [B, H, S, D]; or why there is none, in a clause about them."""
    try:
        return _found(program, k, v)
    except _NotLatent as reason:
        return str(reason)


def _found(program: Program, k: fx.Node, v: fx.Node) -> LatentKeys:
    keys, values = _elements(program, k, "keys"), _elements(program, v, "values")
    made, projected = _projection(keys, "keys")
    values_made, all_of_them = _projection(values, "values")
    if len(all_of_them) != values.feature.shape[1]:
        raise _NotLatent(f"some of the values are no product: {_others(values)}")
    latent, other = _bare(made[0]), _bare(values_made[0])
    if latent is not other:
        raise _NotLatent(f"keys are made of {latent.name!r} and values of {other.name!r}")
    width = node_values(latent)[0].shape[-1]
    if _token_shape(program, latent) is None or len(_long(latent)) != 3 or not isinstance(width, int):
        raise _NotLatent(f"what they are made of, {latent.name!r}, is not one row per token")
    heads = keys.feature.shape[0]
    for what, rows in (("keys", made[1].count), ("values", values_made[1].count)):
        if width >= heads * rows:
            raise _NotLatent(f"the {what} are made of {width} numbers, and are no more themselves ({heads} x {rows})")
    return LatentKeys(latent, width, made[1], values_made[1], projected, _carried(program, keys, projected))


# -- which element of what ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Elements:
    """Of keys or values, per head and dim: which of `roots` it comes from, and which of its features it is."""

    roots: tuple[fx.Node, ...]
    root: Tensor
    feature: Tensor


def _elements(program: Program, node: fx.Node, what: str) -> _Elements:
    value = node.meta["val"]
    names = {name: program.symbols.get(name) for name in ("batch", "sequence")}
    symbols = {names["batch"]: _BATCH, names["sequence"]: _SEQUENCE}
    if None in symbols or not isinstance(value, Value):
        raise _NotLatent("the model was captured for one size only")
    order = _cone(node)
    numbers: dict[fx.Node, Any] = {}
    starts: list[int] = []
    roots: list[fx.Node] = []
    base = 0
    for each in order:
        if not _passes(each):
            shape = shape_at(each.meta["val"], symbols)
            if operation(each) in _FILLED if each.op == "call_function" else False:
                numbers[each] = torch.full(shape, -1)
                continue
            count = int(torch.Size(shape).numel())
            numbers[each] = torch.arange(base, base + count).view(shape)
            starts.append(base)
            roots.append(each)
            base += count
        else:
            numbers[each] = _run(program, each, numbers, symbols)
    found: Tensor = numbers[node]
    if found.dim() != 4 or found.shape[0] != _BATCH or found.shape[2] != _SEQUENCE or bool((found < 0).any()):
        raise _NotLatent(f"the {what} are not one row per head and token")
    which = torch.bucketize(found.contiguous(), torch.tensor(starts), right=True) - 1
    feature = torch.empty_like(found)
    for i in sorted(set(which.flatten().tolist())):
        mask = which == i
        feature[mask] = _features(program, roots[i], symbols, found - starts[i], mask, what)[mask]
    if not (_alike(which) and _alike(feature)):
        raise _NotLatent(f"the {what} of one token are made otherwise than those of another")
    return _Elements(tuple(roots), which[0, :, 0], feature[0, :, 0])


def _alike(x: Tensor) -> bool:
    """Whether every sequence and token has the same."""
    return bool((x == x[:1, :, :1]).all())


def _features(
    program: Program, root: fx.Node, symbols: dict[Any, int], place: Tensor, mask: Tensor, what: str
) -> Tensor:
    """Which feature of its token each element is; every one must belong to the token that it stands at."""
    shape = root.meta["val"].shape
    sizes = shape_at(root.meta["val"], symbols)
    strides = torch.empty(sizes, device="meta").stride()
    feature, seen = torch.zeros_like(place), []
    batch, sequence = program.symbols["batch"], program.symbols["sequence"]
    rows, tokens = torch.arange(_BATCH).view(-1, 1, 1, 1), torch.arange(_SEQUENCE).view(-1, 1)
    own = {batch: rows, sequence: tokens, batch * sequence: rows * _SEQUENCE + tokens}
    for size, count, stride in zip(shape, sizes, strides, strict=True):
        index = place // max(stride, 1) % max(count, 1)
        if isinstance(size, int):
            feature = feature * count + index
            continue
        if size not in own:
            raise _NotLatent(f"some of the {what} do not belong to a token: {describe(root)}")
        if bool((index != own[size])[mask].any()):
            raise _NotLatent(f"the {what} of a token are made of those of others, in {describe(root)}")
        seen.append(size)
    if seen not in ([batch, sequence], [sequence, batch], [batch * sequence]):
        raise _NotLatent(f"some of the {what} do not belong to a token: {describe(root)}")
    return feature


def _passes(node: fx.Node) -> bool:
    """Whether a node only moves data, as numbers that stay what they are."""
    if node.op != "call_function":
        return False
    if node.target is shard:  # on the whole model it takes nothing away
        return True
    if not is_move(node):
        return False
    if node.target is operator.getitem:
        return _passes(node.all_input_nodes[0])
    if operation(node) in IDENTITIES:
        return node_values(node)[0].dtype == node_values(node.all_input_nodes[0])[0].dtype
    return operation(node) is not aten.pad and operation(node) is not aten.constant_pad_nd


def _cone(node: fx.Node) -> list[fx.Node]:
    """What a node is made of through data-movement ops, in the order in which it can be run."""
    found: dict[fx.Node, None] = {}

    def visit(at: fx.Node) -> None:
        if at in found:
            return
        if _passes(at):
            for source in at.all_input_nodes:
                if node_values(source):
                    visit(source)
        found[at] = None

    visit(node)
    return list(found)


def _run(program: Program, node: fx.Node, numbers: dict[fx.Node, Any], symbols: dict[Any, int]) -> Any:
    if node.target is shard:
        return numbers[node.all_input_nodes[0]]
    args, kwargs = program.whole((node.args, dict(node.kwargs)))

    def given(n: fx.Node) -> Any:
        return numbers[n] if n in numbers else evaluate(n.meta["val"], symbols)

    return run_move(node, map_nodes(args, given), map_nodes(kwargs, given))


# -- what they say -----------------------------------------------------------------------------------------------------


def _projection(found: _Elements, what: str) -> tuple[tuple[fx.Node, Projection], tuple[int, ...]]:
    """The value that a linear makes them of and its rows, and the dims that are made so."""
    linears = [i for i, root in enumerate(found.roots) if _is_linear(root) and bool((found.root == i).any())]
    if not linears:
        raise _NotLatent(f"the {what} are no product of a weight with a value: they come from {_others(found)}")
    if len(linears) > 1:
        raise _NotLatent(f"the {what} are products of several weights")
    (index,) = linears
    made = found.root == index
    if not bool((made == made[:1]).all()):
        raise _NotLatent(f"the {what} of some heads are products in other dims than those of others")
    root = found.roots[index]
    a = arguments(root)
    if a["bias"] is not None:
        raise _NotLatent(f"the product that makes the {what} has a bias, {a['bias'].name}")
    dims = tuple(made[0].nonzero()[:, 0].tolist())
    rows, heads = found.feature[:, dims], len(found.feature)
    total = a["weight"].meta["val"].shape[0]
    each, first = total // heads, int(rows[0, 0])
    wanted = torch.arange(heads)[:, None] * each + first + torch.arange(len(dims))
    if total % heads or not torch.equal(rows, wanted):
        raise _NotLatent(f"the rows of {a['weight'].target} that make the {what} do not lie head by head")
    return (a["input"], Projection(a["weight"], each, first, len(dims))), dims


def _is_linear(node: fx.Node) -> bool:
    return (
        node.op == "call_function"
        and operation(node) is aten.linear
        and arguments(node)["weight"].op == "get_attr"
        and len(arguments(node)["weight"].meta["val"].shape) == 2
    )


def _others(found: _Elements) -> str:
    """What is no linear, in words."""
    roots = [root for i, root in enumerate(found.roots) if bool((found.root == i).any()) and not _is_linear(root)]
    return ", ".join(dict.fromkeys(describe(root) for root in roots[:2]))


def _carried(program: Program, found: _Elements, projected: tuple[int, ...]) -> tuple[Carried, ...]:
    rest = [dim for dim in range(found.feature.shape[1]) if dim not in projected]
    if any(bool((x[:, rest] != x[:1, rest]).any()) for x in (found.root, found.feature)):
        raise _NotLatent(f"every head has keys of its own that are no product: {_others(found)}")
    by_root: dict[int, dict[int, int]] = {}
    for dim in rest:
        features = by_root.setdefault(int(found.root[0, dim]), {})
        if int(found.feature[0, dim]) in features:
            raise _NotLatent(f"a key has the same number twice, of {found.roots[int(found.root[0, dim])].name!r}")
        features[int(found.feature[0, dim])] = dim
    parts = []
    for root, features in by_root.items():
        numbers = sorted(features)
        source = _bare(found.roots[root])
        if numbers != list(range(numbers[0], numbers[0] + len(numbers))) or _token_shape(program, source) is None:
            raise _NotLatent(f"what is carried of {source.name!r} is not one run of numbers per token")
        parts.append(Carried(source, numbers[0], tuple(features[number] for number in numbers)))
    return tuple(parts)


def _bare(node: fx.Node) -> fx.Node:
    """The value that `node` is, but for dims of size 1."""
    while node.op == "call_function" and operation(node) in _SAME_SHAPE and _passes(node):
        source = node.all_input_nodes[0]
        if not node_values(source) or _long(source) != _long(node):
            break
        node = source
    return node


def _long(node: fx.Node) -> list[Any]:
    return [size for size in node_values(node)[0].shape if size != 1]


def _token_shape(program: Program, node: fx.Node) -> tuple[int, ...] | None:
    """The dims of size 1 of what is otherwise [B, S, features]; None where it is not."""
    shape = node_values(node)[0].shape
    ones = tuple(dim for dim, size in enumerate(shape) if size == 1)
    rest = [size for size in shape if size != 1]
    wanted = [program.symbols.get("batch"), program.symbols.get("sequence")]
    return ones if len(rest) > 2 and rest[:2] == wanted and all(isinstance(size, int) for size in rest[2:]) else None
