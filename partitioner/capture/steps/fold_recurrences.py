"""Recurrences of the trace become ops of our runtime; one that begins at nothing begins at what is remembered.

    recurrence(x, None) -> y, last; state_write(last, "s")    ->    recurrence(x, state_read("s")) -> y, last; ...

A model's own function may always begin with no tokens before, as its kernel does. Where its last state is what the
layer remembers from then on, what the layer remembers is where it begins: `proof/recurrences.py` holds that against
the model's single steps.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

from torch import fx

from partitioner.capture.trace.recurrence_hooks import rename_recurrences
from partitioner.program.program import State, Value
from runtime.ops.state import state_read, state_write

__all__ = ["fold_recurrences"]

_LAST = 1
"""Which of a recurrence's results is the state after the last token."""


def fold_recurrences(graph: fx.Graph, states: Mapping[str, State], batch: fx.Node) -> None:
    """Rewrites `graph`; `batch`: an input with as many rows as the run."""
    for node in rename_recurrences(graph):
        if node.args[-1] is None and (name := _written(node)) is not None:
            node.args = (*node.args[:-1], _read(graph, node, states[name], batch))
    graph.lint()


def _written(node: fx.Node) -> str | None:
    """The name of the state that the recurrence leaves behind, if it is one."""
    found = {
        str(user.kwargs["state"])
        for last in node.users
        if last.target is operator.getitem and last.args[1] == _LAST
        for user in last.users
        if user.target is state_write
    }
    return found.pop() if len(found) == 1 else None


def _read(graph: fx.Graph, node: fx.Node, state: State, batch: fx.Node) -> fx.Node:
    options: Any = {"state": state.name, "shape": list(state.shape), "dtype": state.dtype}
    with graph.inserting_before(node):
        made = graph.call_function(state_read, (batch,), options)
    rows = batch.meta["val"].shape[0]
    made.meta = {"val": Value((rows, *state.shape), state.dtype), "path": node.meta.get("path", "")}
    return made
