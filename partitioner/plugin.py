"""What the author of a pass needs, in one place; `docs/extending/writing_a_pass.md` walks through one.

    @layout_rule(my_op)                  says what an op of yours computes, so that layouts can be inferred through it
    def _(node, a): return Notation(..)
    add_made_weight(program, of, ..)     a weight that is made from another when a rank is loaded
    drop_unused_weights(program)         those that nothing reads any more
    weights_named(program, globs)        which weights a user means
    check_rule(my_op, x, w)              whether the op does what its rule says, on numbers
    COMMUNICATING                        the ops that communicate, and what they exchange

The graph's own vocabulary (Program, Value, Layout, ...) is imported here as well, so that a plugin depends on this
module and on nothing else of ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx

from partitioner.analysis.rules import RULES
from partitioner.analysis.rules.data_movement import IDENTITIES, MOVES
from partitioner.analysis.rules.notation import Letters, Notation, Operand, Rule, is_tensor, letters, value_of
from partitioner.compile.weight_globs import matching
from partitioner.errors import PlanError
from partitioner.program.node_arguments import arguments, operation
from partitioner.program.plan import Pass
from partitioner.program.program import Program, Value, Weight
from partitioner.proof.layouts import SPECIAL
from partitioner.proof.try_rule import check_rule
from partitioner.sharding.index_set import IndexSet
from partitioner.sharding.layout import REPLICATED, Layout, Split
from runtime.ops.communicating import COMMUNICATING, Communicating, Meeting

__all__ = [
    "COMMUNICATING",
    "REPLICATED",
    "Communicating",
    "IndexSet",
    "Layout",
    "Letters",
    "Meeting",
    "Notation",
    "Operand",
    "Pass",
    "PlanError",
    "Program",
    "Split",
    "Value",
    "Weight",
    "add_made_weight",
    "arguments",
    "check_rule",
    "drop_unused_weights",
    "is_tensor",
    "layout_rule",
    "letters",
    "operation",
    "value_of",
    "weights_named",
]


def layout_rule(*ops: Callable[..., object]) -> Callable[[Rule], Rule]:
    """Decorator: the function is the rule of these ops. It gets a node and its arguments by name.

    Once per op: what an op means cannot be changed by whoever is imported last.
    """
    keys: list[object] = []
    for op in ops:
        if not callable(op):
            raise PlanError(f"a layout rule is for functions; got {op!r}")
        # the table's key is the op without its overload
        key = op.overloadpacket if isinstance(op, torch._ops.OpOverload) else op
        if key in RULES or key in MOVES or key in IDENTITIES or key in SPECIAL:
            raise PlanError(f"the op {_name(key)} has a layout rule already: give yours to an op of your own")
        keys.append(key)

    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(keys, rule))
        return rule

    return register


def add_made_weight(
    program: Program,
    of: Weight,
    name: str,
    make: Callable[[Tensor], Tensor],
    *,
    shape: Sequence[int],
    dtype: torch.dtype,
    layout: Layout | None = None,
) -> fx.Node:
    """The node of a weight that is `make(the whole of)`; a rank then takes the part that `layout` says. None: all.

    `make` must be a function of a module: it runs on the rank when its weights are loaded, wherever they come from.
    """
    made = Weight(name, tuple(shape), dtype, "made", of=of, make=make)
    if program.weights.get(name, made) != made:
        raise PlanError(f"the program has another weight {name!r} already")
    if any(name.startswith(f"{other}.") for other in program.weights):
        # a rank's graph_module has weights under their names, and a tensor has no attributes
        raise PlanError(f"a weight cannot be named {name!r}, as if it were inside another weight")
    if layout is not None and (len(layout.dims) != len(made.shape) or layout.partial):
        raise PlanError(f"the weight {name!r} of shape {list(shape)} cannot have the layout {layout}")
    program.weights[name] = made
    if layout is not None and not layout.is_replicated:
        program.weight_layouts[name] = layout
    node = program.graph.create_node("get_attr", name, name=name.replace(".", "_"))
    node.meta = {"val": Value(made.shape, dtype), "layout": layout or REPLICATED(len(made.shape))}
    return node


def drop_unused_weights(program: Program) -> None:
    """Forgets the weights that no node reads any more, so that no rank loads them and no report counts them."""
    for node in list(program.graph.nodes):
        if node.op == "get_attr" and not node.users:
            program.graph.erase_node(node)
    read = {node.target for node in program.graph.nodes if node.op == "get_attr"}
    for name in [name for name in program.weights if name not in read]:
        del program.weights[name]
        program.weight_layouts.pop(name, None)


def weights_named(program: Program, globs: Sequence[str], *, among: Sequence[str]) -> list[str]:
    """Those of the weights `among` that a glob selects by their name, an alias, or a module that they are in.

    Raises `PlanError` for a glob that selects none: nothing is skipped in silence.
    """
    found: set[str] = set()
    for glob in globs:
        hits, near = matching(program, glob, among)
        if not hits:
            raise PlanError(f"{glob!r} selects no weight that this pass can take; near it: {near}")
        found.update(hits)
    return [name for name in among if name in found]


def _name(op: object) -> str:
    return op.__qualname__ if hasattr(op, "__qualname__") else str(op)
