"""Layouts of identical nodes inferred once: layers repeat, and what holds for one holds for all.

A node is known by its op, its arguments and the layouts and shapes of its operands. What is remembered names operands
by their place, so that it serves any node that is known by the same: of the same program, after each pass, and of all
others in one compile, where the mesh, the symbols and the integers of ranks that stand in the arguments are the same
too. What other nodes say (sizes that are read off tensors) serves the one program only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import fx

from partitioner.analysis.layouts.infer_experts import infer_experts, is_routed
from partitioner.analysis.layouts.infer_layout import Inference, Layouts, infer_compute
from partitioner.analysis.layouts.infer_move import infer_move
from partitioner.analysis.layouts.localise import Localised, Scaled, localise, moves_alike
from partitioner.analysis.rules.data_movement import is_move
from partitioner.program.program import Entry, PerRankInt, Program
from partitioner.sharding.layout import Layout

__all__ = ["Inferrer"]

T = TypeVar("T")


@dataclass(frozen=True, repr=False)
class _Operand:
    """Stands for the i-th input node."""

    place: int

    def __repr__(self) -> str:  # of which each key is made: without the guard against circles of a dataclass's own
        return f"_Operand({self.place})"


class Inferrer:
    """Infers layouts and local moves for one program, remembering by structure."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._own: dict[Any, Any] = {}
        self._of_all = program.inferred.setdefault((program.mesh, tuple(program.symbols.items())), {})

    def infer(self, node: fx.Node, layouts: Layouts) -> Inference:
        def work() -> Inference:
            if is_move(node):
                return infer_move(self.program, node, layouts)
            if is_routed(node, layouts):
                return infer_experts(self.program, node, layouts)
            return infer_compute(self.program, node, layouts)

        return self._memoised("infer", node, layouts, work, shared=True)

    def localise(self, node: fx.Node, given: Layouts, outputs: tuple[Layout, ...]) -> tuple[bool, Localised | None]:
        """Whether a move can run on local tensors, and what it becomes if it is not left as it is."""

        def work() -> tuple[bool, Localised | None]:
            done = localise(self.program, node, given, outputs)
            return moves_alike(self.program, node, done or _as_is(node), given, outputs), done

        return self._memoised("localise", node, given, work)

    def moves_alike(self, node: fx.Node, given: Layouts, outputs: tuple[Layout, ...]) -> bool:
        """Whether a move as it stands is right on every rank."""
        return self._memoised(
            "alike", node, given, lambda: moves_alike(self.program, node, _as_is(node), given, outputs), shared=True
        )

    def _memoised(
        self, question: str, node: fx.Node, layouts: Layouts, work: Callable[[], T], *, shared: bool = False
    ) -> T:
        """shared: whether an answer adds nothing to the program, so that others may have it."""
        inputs = node.all_input_nodes
        place = {source: i for i, source in enumerate(inputs)}
        integers: list[Entry] = []

        def stand_in(leaf: Any) -> Any:
            if isinstance(leaf, PerRankInt) and leaf.name in self.program.table:
                integers.append(self.program.table[leaf.name])
            return _Operand(place[leaf]) if isinstance(leaf, fx.Node) else leaf

        shape = fx.node.map_aggregate((node.args, tuple(sorted(node.kwargs.items()))), stand_in)
        operands = tuple((layouts.get(n), _hashable(n.meta.get("val"))) for n in inputs)
        local = tuple(n.args for n in inputs if n not in layouts and n.op == "call_function")
        key: tuple[Any, ...] = (question, node.target, repr(shape), operands, repr(local) if local else "")
        memory = self._own
        if shared and not local:
            memory, key = self._of_all, (*key, tuple(integers), _hashable(node.meta.get("val")))
        known = memory.get(key)
        if known is None:
            found = work()
            memory[key] = _exchange(found, lambda n: _Operand(place[n]) if isinstance(n, fx.Node) else n)
            return found
        answer: T = _exchange(known, lambda n: inputs[n.place] if isinstance(n, _Operand) else n)
        return answer


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _as_is(node: fx.Node) -> Localised:
    return Localised(node.target, node.args, dict(node.kwargs))  # type: ignore[arg-type]


def _exchange(found: Any, leaf: Callable[[Any], Any]) -> Any:
    """`found` with nodes and stand-ins for operands exchanged."""
    if isinstance(found, Inference):
        return Inference(found.outputs, tuple((leaf(n), layout) for n, layout in found.requires), found.problem)
    if isinstance(found, Localised):
        return Localised(found.target, _exchange(found.args, leaf), _exchange(found.kwargs, leaf))
    if isinstance(found, Scaled):
        return Scaled(leaf(found.node), found.whole, found.local)
    if isinstance(found, (tuple, list)):
        return type(found)(_exchange(x, leaf) for x in found)
    if isinstance(found, dict):
        return {k: _exchange(v, leaf) for k, v in found.items()}
    return leaf(found)
