"""Attention that is written out as products and a softmax becomes one node, as it is in models that call a kernel.

    softmax(a q k^T + m1 + m2 ..) v        ->  attention(q, k, v, m1 + m2 .., scale=a)
    softmax(where(seen, a q k^T, low)) v   ->  the same with where(seen, 0, low) as a mask
    .. with the causal mask of transformers  ->  attention(.., causal=True)

Scores are [B, H, S, T], or [B H, S, T] in between (bmm, baddbmm). What is added to them may be anything that does not
depend on them; what is done to them otherwise is not recognised, and is left as it is. Only programs whose tokens are
dealt out are rewritten: there attention is the one op that may look from one token at another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from partitioner.program.node_arguments import arguments, operation
from partitioner.program.program import Program, Value
from runtime.ops.attention import attention
from runtime.ops.mask import attention_mask

__all__ = ["recognise_attention"]

aten = torch.ops.aten
_PRODUCTS = (aten.matmul, aten.bmm)
_RESHAPES = (aten.reshape, aten.view, aten._unsafe_view)
_UNCHANGED = (aten.to, aten._to_copy, aten.contiguous, aten.clone, aten.alias)
_ON_SCORES = (aten.add, aten.mul, aten.div, aten.where, aten.masked_fill, aten.maximum, aten.max)
_LOWEST = -1e30
"""Below it a score is as good as hidden."""


@dataclass
class _Scores:
    """scale x q k^T, and what is added: each a node, by what it is multiplied."""

    q: fx.Node
    k: fx.Node
    """[B, H, T, D]."""
    scale: float
    added: list[tuple[fx.Node, float]] = field(default_factory=list)

    def times(self, factor: float) -> _Scores:
        added = [(node, each * factor) for node, each in self.added]
        return replace(self, scale=self.scale * factor, added=added)

    def plus(self, node: fx.Node) -> _Scores:
        return replace(self, added=[*self.added, (node, 1.0)])


class _Unlike(Exception):
    """It is no attention, or not one that is known."""


def recognise_attention(program: Program) -> int:
    """Rewrites the graph in place; how many were recognised, which a note says."""
    found = 0
    for node in list(program.graph.nodes):
        if node.op == "call_function" and operation(node) in _PRODUCTS:
            try:
                _Rewriting(program, node).run()
            except _Unlike:
                continue
            found += 1
    if found:
        program.graph.eliminate_dead_code()
        program.notes.append(f"{found} attentions, written out as products and a softmax, are one op each")
    return found


class _Rewriting:
    """Of one product of weights and values."""

    def __init__(self, program: Program, node: fx.Node) -> None:
        self._program, self._graph, self._node = program, program.graph, node
        weights, values = _operands(node)
        softmax = _stripped(weights)
        if operation(softmax) not in (aten.softmax, aten._softmax):
            raise _Unlike
        a = arguments(softmax)
        if a["dim"] not in (-1, len(_shape(softmax)) - 1):
            raise _Unlike
        self._scores_in, self._values = a["self"], values

    def run(self) -> None:
        with self._graph.inserting_before(self._node):
            scores = self._scores(self._scores_in)
            values = self._by_head(self._values)
            q, k = scores.q, scores.k
            shapes = [_shape(each) for each in (q, k, values)]
            if any(len(shape) != 4 for shape in shapes) or len({tuple(shape[:2]) for shape in shapes}) != 1:
                raise _Unlike
            if shapes[1][2] != shapes[2][2] or shapes[0][3] != shapes[1][3]:
                raise _Unlike
            dtype = _value(q).dtype
            result = _value(self._node)
            options: dict[str, Any] = {"scale": scores.scale}
            added = []
            for node, factor in scores.added:
                seen = _what_is_seen(node) if factor > 0 and "causal" not in options else None
                if seen is None:
                    added.append((node, factor))
                else:
                    options |= seen
            mask = self._mask(replace(scores, added=added))
            if _value(values).dtype != dtype:
                values = self._make(aten.to.dtype, (values, dtype), _shape(values), dtype)
            given = (q, k, values) if mask is None else (q, k, values, mask)
            shape = (*shapes[0][:3], shapes[2][3])
            made = self._make(attention, given, shape, dtype, **options)
            if result.dtype != dtype:
                made = self._make(aten.to.dtype, (made, result.dtype), shape, result.dtype)
        self._replace(made, shape)

    def _replace(self, made: fx.Node, shape: Sequence[Any]) -> None:
        if len(_shape(self._node)) == 4:
            self._node.replace_all_uses_with(made)
            return
        # [B H, S, D]: what reads it makes heads of it again
        users = list(self._node.users)
        if any(operation(user) not in _RESHAPES or tuple(_shape(user)) != tuple(shape) for user in users):
            raise _Unlike
        for user in users:
            user.replace_all_uses_with(made)

    # -- the scores ----------------------------------------------------------------------------------------------------

    def _scores(self, node: fx.Node) -> _Scores:
        """Raises `_Unlike` where `node` is no scores."""
        if node.op != "call_function" or not _value(node).dtype.is_floating_point:
            raise _Unlike
        kind, a = operation(node), arguments(node)
        if kind in _UNCHANGED or (kind in _RESHAPES and _same_scores(_shape(a["self"]), _shape(node))):
            return self._scores(a["self"])
        if kind in _PRODUCTS:
            return self._product(*_operands(node), 1.0)
        if kind is aten.baddbmm:
            scores = self._product(a["batch1"], a["batch2"], float(a["alpha"]))
            return scores if a["beta"] == 0 else replace(scores, added=[(a["self"], float(a["beta"]))])
        if kind in (aten.mul, aten.div) and isinstance(a["other"], int | float) and not a.get("rounding_mode"):
            return self._scores(a["self"]).times(a["other"] if kind is aten.mul else 1 / a["other"])
        if kind is aten.add and a.get("alpha", 1) == 1 and isinstance(a["other"], fx.Node):
            one, other = a["self"], a["other"]
            return self._scores(one).plus(other) if _leads_to_product(one) else self._scores(other).plus(one)
        if kind is aten.where and _leads_to_product(a["self"]) and self._is_lowest(a["other"]):
            seen, dtype = a["condition"], _value(node).dtype
            hidden = self._make(aten.sub.Tensor, (self._cast(seen, dtype), 1), _shape(seen), dtype)
            return self._scores(a["self"]).plus(self._lowered(hidden))
        if kind is aten.masked_fill and self._is_lowest(a["value"]):
            hidden, dtype = a["mask"], _value(node).dtype
            cause = _stripped(hidden)
            if cause.target is attention_mask:
                return self._scores(a["self"]).plus(cause)
            hidden = self._make(aten.neg.default, (self._cast(hidden, dtype),), _shape(hidden), dtype)
            return self._scores(a["self"]).plus(self._lowered(hidden))
        if kind in (aten.maximum, aten.max) and self._is_lowest(a.get("other")):
            return self._scores(a["self"])
        raise _Unlike

    def _is_lowest(self, given: Any) -> bool:
        """Whether a number, or a tensor of one, hides what it stands for."""
        if isinstance(given, fx.Node):
            if given.op == "call_function" and operation(given) is aten.full:
                given = arguments(given)["fill_value"]
            elif given.op == "get_attr" and (data := self._program.weight_data.get(str(given.target))) is not None:
                given = float(data) if data.numel() == 1 else None
        return isinstance(given, int | float) and given < _LOWEST

    def _cast(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        return self._make(aten.to.dtype, (node, dtype), _shape(node), dtype)

    def _lowered(self, hidden: fx.Node) -> fx.Node:
        """-1 where it is hidden becomes a number that hides it."""
        dtype = _value(hidden).dtype
        return self._make(aten.mul.Tensor, (hidden, -torch.finfo(dtype).min / 2), _shape(hidden), dtype)

    def _product(self, q: fx.Node, transposed: fx.Node, scale: float) -> _Scores:
        q, transposed = self._by_head(q), self._by_head(transposed)
        shape = _shape(transposed)
        if len(_shape(q)) != 4 or len(shape) != 4:
            raise _Unlike
        if operation(transposed) is aten.transpose and set(_dims(transposed)) == {2, 3}:
            k = arguments(transposed)["self"]
        else:
            turned = (*shape[:2], shape[3], shape[2])
            k = self._make(aten.transpose.int, (transposed, -1, -2), turned, _value(transposed).dtype)
        return _Scores(q, k, scale)

    def _by_head(self, node: fx.Node) -> fx.Node:
        """[B, H, .., ..] in the place of [B H, .., ..]."""
        if len(_shape(node)) != 3:
            return node
        kind, a = operation(node), arguments(node) if node.op == "call_function" else {}
        if kind in _RESHAPES and _same_scores(_shape(a["self"]), _shape(node)):
            return a["self"]  # type: ignore[no-any-return]
        if kind is aten.transpose and set(_dims(node)) == {1, 2}:
            inner = self._by_head(a["self"])
            shape = _shape(inner)
            if len(shape) == 4:
                turned = (*shape[:2], shape[3], shape[2])
                return self._make(aten.transpose.int, (inner, 2, 3), turned, _value(inner).dtype)
        raise _Unlike

    def _mask(self, scores: _Scores) -> fx.Node | None:
        total: fx.Node | None = None
        for node, factor in scores.added:
            each = self._of_heads(node, scores)
            value = _value(each)
            if factor != 1:
                each = self._make(aten.mul.Tensor, (each, factor), value.shape, value.dtype)
            if total is None:
                total = each
                continue
            shape = _broadcast(_shape(total), value.shape)
            total = self._make(aten.add.Tensor, (total, each), shape, _value(total).dtype)
        return total

    def _of_heads(self, node: fx.Node, scores: _Scores) -> fx.Node:
        """What is added, so that it is broadcast to [B, H, S, T]."""
        shape, (batch, heads, queries, _) = _shape(node), _shape(scores.q)
        if any(size not in (1, queries, _shape(scores.k)[2]) for size in shape[-2:]):
            raise _Unlike  # a size that nobody can tell from another
        if len(shape) != 3 or shape[0] in (1, heads):
            return node
        inner = _stripped(node)
        if len(_shape(inner)) == 4 and tuple(_shape(inner)[:2]) == (batch, heads):
            return self._cast(inner, _value(node).dtype)
        if operation(inner) is aten.repeat:  # the same for every row of the batch
            a = arguments(inner)
            of, times = a["self"], a["repeats"]
            if len(_shape(of)) == 3 and _shape(of)[0] == heads and list(times[1:]) == [1, 1]:
                return self._cast(of, _value(node).dtype)
        raise _Unlike

    def _make(self, target: Any, args: tuple[Any, ...], shape: Sequence[Any], dtype: Any, **options: Any) -> fx.Node:
        made = self._graph.call_function(target, args, options)
        made.meta = {**self._node.meta, "val": replace(_value(self._node), shape=tuple(shape), dtype=dtype)}
        return made


def _operands(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    a = list(arguments(node).values())
    if not all(isinstance(each, fx.Node) for each in a[:2]):
        raise _Unlike
    return a[0], a[1]


def _stripped(node: fx.Node) -> fx.Node:
    """Without casts, and reshapes between [B, H, S, T] and [B H, S, T]."""
    while node.op == "call_function":
        kind = operation(node)
        if kind not in _UNCHANGED and kind not in _RESHAPES:
            break
        inner = arguments(node)["self"]
        if kind in _RESHAPES and not _same_scores(_shape(inner), _shape(node)):
            break
        node = inner
    return node


def _same_scores(one: Sequence[Any], other: Sequence[Any]) -> bool:
    """Whether the shapes differ in nothing but that batch and heads are one dim."""
    few, many = sorted((tuple(one), tuple(other)), key=len)
    if len(few) == len(many):
        return few == many
    return len(few) == 3 and len(many) == 4 and few[1:] == many[2:] and few[0] == many[0] * many[1]


def _leads_to_product(node: fx.Node) -> bool:
    """Whether it is made of scores."""
    if node.op != "call_function":
        return False
    kind, a = operation(node), arguments(node)
    if kind in (*_PRODUCTS, aten.baddbmm):
        return True
    if kind not in (*_UNCHANGED, *_RESHAPES, *_ON_SCORES):
        return False
    sides = [a["self"], *([a["other"]] if kind is aten.add else [])]
    return any(isinstance(each, fx.Node) and _leads_to_product(each) for each in sides)


def _what_is_seen(node: fx.Node) -> dict[str, Any] | None:
    """Options of `attention` that say what transformers' mask says; None: it is another, or not of all rows alike."""
    node = _stripped(node)
    if node.target is not attention_mask:
        return None
    a = arguments(node)
    if a["padding"] is not None or not a["causal"] or a["q_length"] is not a["kv_length"]:
        return None
    return {name: a[name] for name in ("causal", "window", "chunk") if a[name]}


def _dims(node: fx.Node) -> tuple[int, int]:
    a, rank = arguments(node), len(_shape(node))
    return a["dim0"] % rank, a["dim1"] % rank


def _broadcast(one: Sequence[Any], other: Sequence[Any]) -> tuple[Any, ...]:
    longest = max(len(one), len(other))
    padded = [(1,) * (longest - len(each)) + tuple(each) for each in (one, other)]
    return tuple(b if a == 1 else a for a, b in zip(*padded, strict=True))


def _value(node: fx.Node) -> Value:
    found = node.meta["val"]
    if not isinstance(found, Value):
        raise _Unlike
    return found


def _shape(node: Any) -> tuple[Any, ...]:
    found = node.meta.get("val") if isinstance(node, fx.Node) else None
    if not isinstance(found, Value):
        raise _Unlike
    return tuple(found.shape)
