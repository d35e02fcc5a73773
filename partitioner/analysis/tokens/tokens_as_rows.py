"""Whether a graph for one token at a time is fit to run several, as rows of its batch.

Of the traced graph it is proven that no row looks at another (the layout rules, asked about the batch); of what the
passes made of it, that whatever must wait for the token before computes with its own rank's numbers only, and that rows
come first in all that goes in and out of it. How it is then run: `runtime/execution/prompts/tokens_as_rows.py`.
"""

from __future__ import annotations

import sympy
from torch import fx

from partitioner.analysis.layouts.infer_layout import Layouts
from partitioner.analysis.tokens.token_mixing import BATCH_RULES, first_mixing
from partitioner.program.node_arguments import arguments, symbols_of
from partitioner.program.program import Program, Value
from partitioner.sharding.layout import REPLICATED
from runtime.execution.prompts.token_loops import loops_of, states_of
from runtime.execution.prompts.tokens_as_rows import is_size, of_rows
from runtime.ops.attention import attention
from runtime.ops.cached_attention import cached_attention
from runtime.ops.communicating import COMMUNICATING
from runtime.ops.state import state_read, state_write

__all__ = ["why_not_as_rows", "why_rows_meet"]

_INPUTS = {"input_ids", "position_ids", "active"}
_KNOWN = (attention, cached_attention, state_read, state_write)


def why_rows_meet(step: Program) -> str | None:
    """The first op of a traced step, before any pass, that looks from one row at another; None: there is none."""
    return first_mixing(step, "batch", {**BATCH_RULES, state_read: _read, state_write: _write})


def why_not_as_rows(program: Program) -> str | None:
    """Why what the passes made of such a step cannot run several tokens at once; None: it can."""
    if program.stages is not None or program.batch_axes or program.mesh.size("sp") > 1:
        return "stages, or ranks with tokens or sequences of their own, run them one by one"
    names = {given.name for given in program.inputs}
    if not names <= _INPUTS or not {"input_ids", "active"} <= names:
        return f"it takes {', '.join(sorted(names))}"
    for node in program.graph.nodes:
        if node.kwargs.get("state") is not None and node.target not in _KNOWN:
            return f"{node.name} reads what is kept of earlier tokens in a way that is for one token"
        if node.target in (attention, cached_attention) and (problem := _why_attention(program, node)):
            return problem
    states, loops = states_of(program.graph), loops_of(program.graph)
    if isinstance(states, str) or isinstance(loops, str):
        return str(states if isinstance(states, str) else loops)
    rows, batch = of_rows(program.graph), program.symbols["batch"]
    crossing = [write.args[0] for _, write in states.values()]
    for loop in loops:
        talks = next((node for node in loop.body if node.target in COMMUNICATING or node.target in _KNOWN), None)
        if talks is not None:
            return (
                f"{talks.name} in {talks.meta.get('path') or 'the model'} waits for the token before, and asks others"
            )
        crossing += [*loop.handed_on, *(n for n in loop.given if n in rows and not is_size(n))]
        held = [n for n in loop.given if n not in rows and not is_size(n)]
        counting = next((n for n in held if not _is_without(n.meta["val"], batch)), None)
        if counting is not None:
            return f"{counting.name} is the same for all rows, and counts them"
    wrong = next((n for n in crossing if not isinstance(n, fx.Node) or not _is_by_row(n.meta["val"], batch)), None)
    if wrong is not None:
        return f"{wrong} meets a state, and is not one row per sequence"
    (logits,) = program.graph.output_node().all_input_nodes
    shape = logits.meta["val"].shape
    return None if len(shape) == 3 and shape[:2] == (batch, 1) else f"its result is {logits.meta['val']}"


def _why_attention(program: Program, node: fx.Node) -> str | None:
    a = arguments(node)
    if a["mask"] is not None or not a["causal"]:
        return f"the attention {node.name!r} has a mask of its own, or none"
    shapes = [a[name].meta["val"].shape for name in ("q", "k", "v")]
    if any((shape[0], shape[2]) != (program.symbols["batch"], 1) for shape in shapes):
        return f"the attention {node.name!r} is not of one token per row"
    return None


def _is_by_row(value: object, batch: sympy.Symbol) -> bool:
    """Whether a tensor has one row for each of the batch, and no other dim that counts them."""
    if not isinstance(value, Value) or value.shape[:1] != (batch,):
        return False
    return all(isinstance(size, int) or size.is_Integer for size in value.shape[1:])


def _is_without(value: object, batch: sympy.Symbol) -> bool:
    return isinstance(value, Value) and all(batch not in symbols_of(size) for size in value.shape)


def _read(node: fx.Node, layouts: Layouts) -> str | None:
    (batch,) = node.all_input_nodes
    rank = len(node.meta["val"].shape)
    layouts[node] = REPLICATED(rank).with_dim(0, layouts[batch].dims[0])
    return None


def _write(node: fx.Node, layouts: Layouts) -> str | None:
    value, active = node.all_input_nodes
    rank = len(node.meta["val"].shape)
    if layouts[value] != REPLICATED(rank).with_dim(0, layouts[active].dims[0]):
        return "keeps something other than one row per {what}"
    layouts[node] = layouts[value]
    return None
