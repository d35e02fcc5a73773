"""The one rule table: what each op computes, in index notation. An op without a row is opaque, and the report says
so.
"""

from __future__ import annotations

import torch
from torch import fx

from partitioner.analysis.rules import along_dims, contractions, elementwise, indexed, runtime_ops, states
from partitioner.analysis.rules.elementwise import pointwise
from partitioner.analysis.rules.notation import Notation, Rules, opaque
from partitioner.program.node_arguments import arguments, operation

__all__ = ["RULES", "notation"]

RULES = Rules()
for part in (elementwise, along_dims, contractions, indexed, runtime_ops, states):
    RULES.update(part.RULES)


def notation(node: fx.Node) -> Notation:
    """The notation of a call_function node that is not a move."""
    rule = RULES.get(operation(node))
    if rule is None and isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags:
        rule = pointwise
    found = rule(node, arguments(node)) if rule else None
    return found or opaque(node)
