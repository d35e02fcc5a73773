"""Recurrences of the trace become ops of our runtime; one that begins at nothing begins at what is remembered.

    recurrence(x, None) -> y, last; state_write(last, "s")    ->    recurrence(x, state_read("s")) -> y, last; ...
    recurrence(x_i, None) -> y_i, last_i for each i,
      state_write(stack([last_0, last_1, ..], d), "s")        ->    recurrence(x_i, state_read("s").select(d, i)) ...

A model's own function may always begin with no tokens before, as its kernel does. Where its last state is what the
layer remembers from then on, what the layer remembers is where it begins: `proof/recurrences.py` holds that against
the model's single steps.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from partitioner.capture.trace.recurrence_hooks import rename_recurrences
from partitioner.program.node_arguments import arguments
from partitioner.program.program import State, Value
from runtime.ops.state import state_read, state_write

__all__ = ["fold_recurrences"]

aten = torch.ops.aten
_LAST = 1
"""Which of a recurrence's results is the state after the last token."""
_Part = tuple[int, int] | None
"""The dim of the state, batch included, and the index there that is a recurrence's own; None: it is all of it."""


def fold_recurrences(graph: fx.Graph, states: Mapping[str, State], batch: fx.Node) -> None:
    """Rewrites `graph`; `batch`: an input with as many rows as the run."""
    for node in rename_recurrences(graph):
        found = _written(node) if node.args[-1] is None else set()
        if len(found) == 1:
            ((name, part),) = found
            node.args = (*node.args[:-1], _read(graph, node, states[name], part, batch))
    graph.lint()


def _written(node: fx.Node) -> set[tuple[str, _Part]]:
    """The states that the recurrence leaves behind, by name, and which part of them."""
    found = set[tuple[str, _Part]]()
    for last in node.users:
        if last.target is not operator.getitem or last.args[1] != _LAST:
            continue
        for user in last.users:
            if user.target is state_write:
                found.add((str(user.kwargs["state"]), None))
            elif user.target is aten.stack.default:
                parts, dim = arguments(user)["tensors"], arguments(user)["dim"] % (len(last.meta["val"].shape) + 1)
                writes = [str(each.kwargs["state"]) for each in user.users if each.target is state_write]
                found |= {(name, (dim, i)) for name in writes for i, part in enumerate(parts) if part is last}
    return found


def _read(graph: fx.Graph, node: fx.Node, state: State, part: _Part, batch: fx.Node) -> fx.Node:
    options: Any = {"state": state.name, "shape": list(state.shape), "dtype": state.dtype}
    path = node.meta.get("path", "")
    with graph.inserting_before(node):
        made = graph.call_function(state_read, (batch,), options)
        shape = (batch.meta["val"].shape[0], *state.shape)
        made.meta = {"val": Value(shape, state.dtype), "path": path}
        if part is not None:
            dim, index = part
            made = graph.call_function(aten.select.int, (made, dim, index))
            made.meta = {"val": Value((*shape[:dim], *shape[dim + 1 :]), state.dtype), "path": path}
    return made
