"""Whether a graph that takes some tokens at a time is right with any number of slots behind its caches.

A slot that no token has filled must weigh nothing, and a row must not notice how many slots there are, for others in
its batch need more of them. Values with a dim of slots (size T) are followed from where caches are appended to:

    raw       one row per slot, whatever lies there            cache_append
    mask      0 where a token may look, else very small        position_mask
    masked    very small where it may not                      raw + mask, masked_fill(raw, mask != 0, -big)
    weights   0 where it may not                               softmax(masked) over the slots
    chosen    the best few, as numbers                         topk(masked) over the slots

Only weights may be contracted over the slots, only masked values compared along them, and what is chosen only be marked. Values made from sizes alone
(ALiBi's distances, say: arXiv:2108.12409) are made for two numbers of slots, and must be the same for the slots that
both have; or differ by one number throughout where all that happens is a softmax, which does not notice.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from partitioner.analysis.arguments import arguments, evaluate, map_nodes, node_values, operation
from partitioner.analysis.moves import IDENTITIES, is_move
from partitioner.analysis.rules import notation
from partitioner.program import Program, Value
from runtime.ops.attention import attention
from runtime.ops.cached_attention import cached_attention
from runtime.ops.state import cache_append, position_mask

aten = torch.ops.aten

__all__ = ["why_slots_matter"]

RAW, MASK, BLOCKED, SEEN, MASKED, WEIGHTS = "raw", "mask", "blocked", "seen", "masked", "weights"
"""blocked, seen: booleans made of a mask, true where a token may not look, or may."""
CHOSEN = "chosen"
"""The numbers of the best slots; those that hold no token only where fewer do than are chosen."""
_SMALL, _MODERATE = -1e4, 100.0
_BATCH, _SEQUENCE = 2, 3
_FEW, _MANY = 7, 11
_POINTS, _PLENTY = (1, 2, 3, 7, 64, 1000, 4097), 1 << 40
_LARGEST = 1 << 22
_SIZED = {
    aten.view, aten.reshape, aten._unsafe_view, aten.expand, aten.unflatten, aten.repeat, aten.new_zeros, aten.new_ones,
    aten.new_full, aten.new_empty, aten.zeros, aten.ones, aten.full, aten.empty,
}  # fmt: skip
"""Ops whose integers are sizes of their result."""


def why_slots_matter(program: Program) -> str | None:
    """The first op, in graph order, that would read slots without a token, or count them; None: there is none."""
    if "slots" not in program.symbols:
        return None
    follow = _Following(program)
    for node in program.graph.nodes:
        if node.op == "call_function":
            problem = follow.step(node)
            if problem:
                path = node.meta.get("path")
                return f"{operation(node).__name__} at {node.name!r}{f' in {path}' if path else ''} {problem}"
    return None


class _Following:
    def __init__(self, program: Program) -> None:
        self.program, self.slots = program, program.symbols["slots"]
        self.kind: dict[fx.Node, str] = {}
        """Of values with a dim of slots that depend on tokens."""
        self.varies: set[fx.Node] = {n for n in program.graph.nodes if n.op == "placeholder" and n.target != "slots"}
        """Nodes that depend on more than sizes and weights."""
        self.checked: dict[fx.Node, str | None] = {}
        self.made: tuple[dict[fx.Node, Any], dict[fx.Node, Any]] = ({}, {})

    def step(self, node: fx.Node) -> str | None:
        values = node_values(node)
        if not values:
            return None
        if not any(n in self.varies for n in node.all_input_nodes):
            return None  # made of sizes: looked at where it is used
        self.varies.add(node)
        for source in node.all_input_nodes:
            if source not in self.varies and node_values(source):
                problem = self._made_of_sizes(source, node)
                if problem:
                    return problem
        problem = self._integers(node)
        if problem or node.target is cached_attention:
            return problem
        chosen = any(self.kind.get(n) == CHOSEN for n in node.all_input_nodes)
        if not chosen and not any(self._has_slots(n) for n in (node, *node.all_input_nodes)):
            return None
        return self._follow(node)

    def _has_slots(self, node: fx.Node) -> bool:
        return any(self._counts(size) for value in node_values(node) for size in value.shape)

    def _counts(self, size: Any) -> bool:
        return isinstance(size, sympy.Basic) and self.slots in size.free_symbols

    def _places(self, value: Value) -> list[int]:
        return [i for i, size in enumerate(value.shape) if self._counts(size)]

    # -- values with a dim of slots ------------------------------------------------------------------------------------

    def _follow(self, node: fx.Node) -> str | None:
        op = operation(node)
        if op is aten.topk:
            return self._choose(node)
        if any(self.kind.get(n) == CHOSEN for n in node.all_input_nodes):
            return self._use_choice(node, op)
        for value in node_values(node):
            if any(value.shape[i] != self.slots for i in self._places(value)) or len(self._places(value)) > 1:
                return "mixes slots with another dim"
        if op is cache_append:
            self.kind[node] = RAW
            return None
        if op is position_mask:
            self.kind[node] = MASK if node.kwargs.get("causal") else RAW
            return None
        if op is attention:
            return self._attention(node)
        operands = [n for n in node.all_input_nodes if self._has_slots(n)]
        kinds = {self.kind.get(n, RAW) for n in operands}
        if is_move(node):
            return self._move(node, operands, kinds)
        rule = notation(node)
        lost = set()
        for operand in rule.operands:
            for i in self._places(node_values(operand.node)[0]):
                letter = operand.letters[i]
                if letter is None or letter in rule.whole or letter in rule.sums or rule.opaque:
                    lost.add(operand.node)
        if lost:
            return self._along_slots(node, op, lost)
        self.kind[node] = self._pointwise(node, op)
        return None

    def _choose(self, node: fx.Node) -> str | None:
        """The k best of the slots are the same with more slots, if those without a token come last."""
        a = arguments(node)
        source, k = a["self"], a["k"]
        rank = len(node_values(source)[0].shape)
        if self._places(node_values(source)[0]) != [a["dim"] % rank] or not a["largest"]:
            return "chooses among something other than slots"
        if self.kind.get(source) not in (MASK, MASKED):
            return "chooses among slots that hold no token"
        count = k.meta["val"] if isinstance(k, fx.Node) else sympy.Integer(k)
        counts = {size: count.xreplace({self.slots: sympy.Integer(size)}) for size in (*_POINTS, _PLENTY)}
        # with fewer slots than are to be chosen, all are
        if not count.is_Integer and any(got != min(size, counts[_PLENTY]) for size, got in counts.items()):
            return "depends on how many slots there are"
        self.kind[node] = CHOSEN
        return None

    def _use_choice(self, node: fx.Node, op: Any) -> str | None:
        """Which are chosen may be marked, one mark per slot: for those without a token no mark counts."""
        if op is operator.getitem and self.kind.get(node.args[0]) == CHOSEN:  # type: ignore[arg-type]
            if node.args[1] != 1:
                return "reads the values of slots that may hold no token"
            self.kind[node] = CHOSEN
            return None
        if op in IDENTITIES:
            self.kind[node] = CHOSEN
            return None
        if op in (aten.new_ones, aten.new_zeros, aten.new_full) and self._places(node_values(node)[0]):
            self.kind[node] = RAW
            return None
        a = arguments(node)
        rank = len(node_values(node)[0].shape)
        if (
            op is aten.scatter
            and self.kind.get(a["index"]) == CHOSEN
            and not isinstance(a.get("value", a.get("src")), fx.Node)
            and self.kind.get(a["self"], RAW) != CHOSEN
            and self._places(node_values(node)[0]) == [a["dim"] % rank]
        ):
            self.kind[node] = RAW
            return None
        return "does more with the choice of slots than to mark them"

    def _attention(self, node: fx.Node) -> str | None:
        a = arguments(node)
        mask = a["mask"]
        if not isinstance(mask, fx.Node) or self.kind.get(mask) not in (MASK, MASKED):
            return "attends without a mask by position"
        return None

    def _move(self, node: fx.Node, operands: list[fx.Node], kinds: set[str]) -> str | None:
        op = operation(node)
        kind = kinds.pop() if len(kinds) == 1 else RAW
        for value in node_values(node):
            if not self._places(value):
                return "takes some of the slots"
        if kind == MASK and node_values(node)[0].dtype is torch.bool:
            kind = BLOCKED
        self.kind[node] = kind
        if op in IDENTITIES or op in _SIZED or op is operator.getitem:
            return None
        a = arguments(node)
        if op in (aten.slice, aten.narrow, aten.select, aten.flip, aten.roll, aten.unfold, aten.diagonal, aten.cat,
                  aten.constant_pad_nd, aten.pad, aten.split, aten.split_with_sizes, aten.chunk, aten.unbind,
                  aten.slice_scatter, aten.select_scatter, aten.stack):  # fmt: skip
            dims = a.get("dim", a.get("dims"))
            places = {i - len(node_values(n)[0].shape) for n in operands for i in self._places(node_values(n)[0])}
            rank = len(node_values(operands[0])[0].shape)
            if not isinstance(dims, int) or (dims % rank) - rank in places:
                return "moves slots"
        return None

    def _along_slots(self, node: fx.Node, op: Any, lost: set[fx.Node]) -> str | None:
        if op in (aten.softmax, aten._softmax):
            (source,) = lost
            if self.kind.get(source) not in (MASK, MASKED):
                return "weighs slots that hold no token"
            self.kind[node] = WEIGHTS
            return None
        rule = notation(node)
        contracted = bool(rule.sums) and not rule.whole and len(rule.operands) > 1
        if contracted and any(self.kind.get(n) == WEIGHTS for n in lost):
            return None
        if op is aten.sum and all(self.kind.get(n) == WEIGHTS for n in lost):
            return None
        return "reads slots that hold no token"

    def _pointwise(self, node: fx.Node, op: Any) -> str:
        a = arguments(node)
        of = self.kind.get
        if op is aten.add:
            kinds = {of(v) for v in (a["self"], a["other"]) if isinstance(v, fx.Node)}
            return MASKED if kinds & {MASK, MASKED} else RAW
        if op is aten.sub:
            return MASKED if of(a["self"]) in (MASK, MASKED) and of(a["other"]) not in (MASK, MASKED) else RAW
        if op is aten.masked_fill and self._is_small(a["value"]):
            hidden = of(a["self"]) if of(a["self"]) in (MASK, MASKED) else RAW  # hides more of them
            return MASKED if of(a["mask"]) == BLOCKED else hidden or RAW
        if op is aten.where:
            if of(a["condition"]) == SEEN and self._is_small(a["other"]):
                return MASKED
            if of(a["condition"]) == BLOCKED and self._is_small(a["self"]):
                return MASKED
        if op in (aten.ne, aten.lt) and of(a["self"]) == MASK and a["other"] == 0:
            return BLOCKED
        if op in (aten.eq, aten.ge) and of(a["self"]) == MASK and a["other"] == 0:
            return SEEN
        if op in (aten.logical_not, aten.bitwise_not):
            return {BLOCKED: SEEN, SEEN: BLOCKED}.get(of(a["self"], RAW), RAW)
        if op in (aten.maximum, aten.clamp_min) or op is aten.clamp:
            return RAW
        if op in (aten.mul, aten.div) and of(a["self"]) in (MASKED, WEIGHTS):
            by = a["other"]
            return of(a["self"], RAW) if of(a["self"]) == WEIGHTS or self._is_moderate(by, op) else RAW
        return RAW

    def _is_small(self, value: Any) -> bool:
        if isinstance(value, (int, float)):
            return value <= _SMALL
        if not isinstance(value, fx.Node) or value in self.varies:
            return False
        found = self._make(value, 0)
        return isinstance(found, Tensor) and bool((found <= _SMALL).all())

    def _is_moderate(self, value: Any, op: Any) -> bool:
        """Whether what is very small stays so, times or divided by it."""
        if isinstance(value, fx.Node):
            if value in self.varies or not node_values(value):
                return False
            data = self.program.values.get(str(value.target)) if value.op == "get_attr" else self._make(value, 0)
            if not isinstance(data, Tensor) or data.is_meta or not data.numel():
                return False
            low, high = float(data.min()), float(data.max())
        else:
            low = high = float(value)
        return low >= 1 / _MODERATE if op is aten.mul else 0 < low <= high <= _MODERATE

    # -- values made of sizes ------------------------------------------------------------------------------------------

    def _integers(self, node: fx.Node) -> str | None:
        """A number of slots may be the size of something; nothing else may be made of it."""
        if operation(node) in _SIZED or operation(node) is aten.topk or not any(self._counts(n.meta.get("val")) for n in node.all_input_nodes):
            return None
        if operation(node) is aten.slice:
            a = arguments(node)
            start, end = a["start"], a["end"]
            whole = node_values(a["self"])[0].shape[a["dim"]]
            if start in (0, None) and isinstance(end, fx.Node) and end.meta["val"] == whole:
                return None
        return "depends on how many slots there are"

    def _made_of_sizes(self, source: fx.Node, user: fx.Node) -> str | None:
        """`source` depends on sizes and weights only; its values must not change with the number of slots."""
        if source in self.checked:
            return self.checked[source]
        self.checked[source] = problem = self._compare(source, user)
        return problem

    def _involved(self, node: fx.Node) -> bool:
        seen, todo = set(), [node]
        while todo:
            found = todo.pop()
            if found in seen:
                continue
            seen.add(found)
            if self._has_slots(found) or self._counts(found.meta.get("val")):
                return True
            todo += found.all_input_nodes
        return False

    def _compare(self, source: fx.Node, user: fx.Node) -> str | None:
        if source.op == "get_attr" or not self._involved(source):
            return None
        if source.op == "placeholder":
            return None if operation_or_none(user) in (cache_append, position_mask) else "reads the slots themselves"
        what = f"reads {source.name!r}, which cannot be followed for different numbers of slots"
        try:
            few, many = self._make(source, 0), self._make(source, 1)
        except Exception:  # an op that needs more than sizes
            return what
        values = node_values(source)
        if not isinstance(few, Tensor) or not isinstance(many, Tensor) or len(values) != 1:
            return what
        places = [i for i, sizes in enumerate(zip(few.shape, many.shape, strict=True)) if sizes == (_FEW, _MANY)]
        for place in places:
            many = many.narrow(place, 0, _FEW)
        if few.shape == many.shape and torch.equal(few, many):
            return None
        if few.shape == many.shape and few.is_floating_point() and places == [few.dim() - 1]:
            moved = (few - many).double()
            if bool((moved - moved[..., :1]).abs().max() <= 1e-6 * moved.abs().max()) and self._only_weighed(source):
                return None  # the same for all slots: a softmax does not notice
        return f"reads {source.name!r}, whose values change with the number of slots"

    def _only_weighed(self, source: fx.Node) -> bool:
        """Whether all that becomes of it is to be added to scores, of which a softmax over the slots is taken."""
        for user in source.users:
            op = operation(user)
            if op in (aten.softmax, aten._softmax):
                if arguments(user)["dim"] not in (-1, len(node_values(user)[0].shape) - 1):
                    return False
            elif (op in (aten.add, aten.baddbmm, aten.masked_fill) and arguments(user).get("alpha", 1) == 1) or (
                op in IDENTITIES or op in (aten.expand, aten.unsqueeze)
            ):
                if arguments(user).get("beta", 1) != 1 or not self._only_weighed(user):
                    return False
            elif op is not attention or arguments(user)["mask"] is not source:
                return False
        return bool(source.users)

    def _make(self, node: fx.Node, which: int) -> Any:
        """The value of a node made of sizes and weights, with few slots or many."""
        made = self.made[which]
        if node not in made:
            sizes = {"batch": _BATCH, "sequence": _SEQUENCE, "slots": (_FEW, _MANY)[which]}
            symbols = {symbol: sizes[name] for name, symbol in self.program.symbols.items()}
            values = node_values(node)
            if not values:
                made[node] = evaluate(node.meta["val"], symbols)
            elif node.op == "get_attr":
                made[node] = self._weight(str(node.target))
            elif node.op == "placeholder":
                made[node] = torch.arange(sizes["slots"])
            else:
                run: Callable[..., Any] = node.target  # type: ignore[assignment]
                args, kwargs = map_nodes((node.args, dict(node.kwargs)), lambda n: self._make(n, which))
                made[node] = run(*args, **kwargs)
        return made[node]

    def _weight(self, name: str) -> Tensor:
        """Its data, or numbers that are all different where there is none."""
        weight = self.program.weights[name]
        if weight.numel > _LARGEST:
            raise ValueError(name)
        data = self.program.values[name]
        if not data.is_meta:
            return data.cpu()
        return torch.arange(weight.numel).reshape(weight.shape).to(weight.dtype)


def operation_or_none(node: fx.Node) -> Any:
    return operation(node) if node.op == "call_function" else None
