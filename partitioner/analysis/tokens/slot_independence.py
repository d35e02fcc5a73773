"""Whether a graph that takes some tokens at a time is right with any number of slots behind its caches.

A slot that no token has filled must weigh nothing, and a row must not notice how many slots there are, for others in
its batch need more of them. Values with a dim of slots (size T) are followed from where caches are appended to:

    raw       one row per slot, whatever lies there            cache_append
    mask      0 where a token may look, else very small        position_mask
    masked    very small where it may not                      raw + mask, masked_fill(raw, mask != 0, -big)
    weights   0 where it may not                               softmax(masked) over the slots
    chosen    the best few, as numbers                         topk(masked) over the slots

Only weights may be contracted over the slots, only masked values compared along them, and what is chosen only be
marked. Values made from sizes alone are the business of `analysis.sizes`.
"""

from __future__ import annotations

import operator
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from partitioner.analysis.rules import notation
from partitioner.analysis.rules.data_movement import IDENTITIES, is_move
from partitioner.analysis.tokens.slot_constants import MadeOfSizes, counts, has_slots
from partitioner.program.node_arguments import arguments, node_values, operation
from partitioner.program.program import Program, Value
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
_POINTS, _PLENTY = (1, 2, 3, 7, 64, 1000, 4097), 1 << 40
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
        self.sizes = MadeOfSizes(program)

    def step(self, node: fx.Node) -> str | None:
        values = node_values(node)
        if not values:
            return None
        if not any(n in self.varies for n in node.all_input_nodes):
            return None  # made of sizes: looked at where it is used
        self.varies.add(node)
        for source in node.all_input_nodes:
            if source not in self.varies and node_values(source):
                problem = self.sizes.problem(source, node)
                if problem:
                    return problem
        problem = self._integers(node)
        if problem or node.target is cached_attention:
            return problem
        chosen = any(self.kind.get(n) == CHOSEN for n in node.all_input_nodes)
        if not chosen and not any(has_slots(self.slots, n) for n in (node, *node.all_input_nodes)):
            return None
        return self._follow(node)

    def _places(self, value: Value) -> list[int]:
        return [i for i, size in enumerate(value.shape) if counts(self.slots, size)]

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
        operands = [n for n in node.all_input_nodes if has_slots(self.slots, n)]
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
        if op in IDENTITIES or op in _SIZED or op is operator.getitem or not operands:
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
        found = self.sizes.make(value, 0)
        return isinstance(found, Tensor) and bool((found <= _SMALL).all())

    def _is_moderate(self, value: Any, op: Any) -> bool:
        """Whether what is very small stays so, times or divided by it."""
        if isinstance(value, fx.Node):
            if value in self.varies or not node_values(value):
                return False
            if value.op == "get_attr" and self.program.weights[str(value.target)].source == "checkpoint":
                return False  # another may be loaded
            data = self.program.weight_data[str(value.target)] if value.op == "get_attr" else self.sizes.make(value, 0)
            if not isinstance(data, Tensor) or data.is_meta or not data.numel():
                return False
            low, high = float(data.min()), float(data.max())
        else:
            low = high = float(value)
        return low >= 1 / _MODERATE if op is aten.mul else 0 < low <= high <= _MODERATE

    def _integers(self, node: fx.Node) -> str | None:
        """A number of slots may be the size of something; nothing else may be made of it."""
        if (
            operation(node) in _SIZED
            or operation(node) is aten.topk
            or not any(counts(self.slots, n.meta.get("val")) for n in node.all_input_nodes)
        ):
            return None
        if operation(node) is aten.slice:
            a = arguments(node)
            # the first slots of a table: what stands there does not depend on where it is cut off
            if a["start"] in (0, None) and isinstance(a["end"], fx.Node) and a["end"].meta["val"] == self.slots:
                return None
        return "depends on how many slots there are"
