"""Why one weight is held as it is: from the weight, op by op, to the one that decides."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections import deque

from torch import fx

from partitioner.analysis.report.report import matrix_users, reason_for, split_text
from partitioner.errors import PlanError
from partitioner.program.node_arguments import describe, node_values
from partitioner.program.program import Program, Weight
from runtime.kv_cache.device_memory import readable

__all__ = ["explain"]

_FURTHEST = 40
"""How many ops are listed between a weight and what decides."""


def explain(program: Program, name: str) -> str:
    """What became of the weight `name` (or the first that it matches, with *), why, and what that costs a rank.

    Raises PlanError where there is none.
    """
    weight = _find(program, name)
    reason = reason_for(program, weight, matrix_users(program))
    split = split_text(program.layout_of(weight.name))
    kind = str(weight.dtype).removeprefix("torch.")
    lines = [f"{weight.name} {list(weight.shape)}, {kind}, {readable(weight.bytes)}: {split or 'whole on every rank'}"]
    if not split:
        ranks = program.mesh.world_size
        lost = weight.bytes - weight.bytes // ranks
        lines.append(f"lost: {readable(lost)} on each of {ranks} ranks, against an even part")
    if reason:
        lines.append(f"because: {reason}")
    lines += [f"  {_said(node)}" for node in _way(program, weight, reason)]
    return "\n".join(lines)


def _find(program: Program, name: str) -> Weight:
    known = {alias: weight for weight in program.weights.values() for alias in (weight.name, *weight.aliases)}
    for alias, weight in known.items():
        if fnmatch.fnmatchcase(alias, name) or fnmatch.fnmatchcase(alias, f"{name}.weight"):
            return weight
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.4)
    hint = f"; near it: {', '.join(near)}" if near else ""
    raise PlanError(f"no weight is named {name!r}{hint}")


def _way(program: Program, weight: Weight, reason: str) -> list[fx.Node]:
    """The nodes from the weight to the one that the reason names; to its first use where it names none."""
    start = next(node for node in program.graph.nodes if node.op == "get_attr" and node.target == weight.name)
    wanted, before, todo = _in_any_layer(reason), dict[fx.Node, fx.Node](), deque([start])
    seen = {start}
    while todo:
        node = todo.popleft()
        if node is not start and node.op == "call_function" and _names(wanted, node):
            way = [node]
            while way[-1] is not start:
                way.append(before[way[-1]])
            return way[::-1][1:][-_FURTHEST:]
        for user in node.users:
            if user not in seen:
                seen.add(user)
                before[user] = node
                todo.append(user)
    return [user for user in start.users if node_values(user)][:1]


def _names(pattern: str, node: fx.Node) -> bool:
    said = _in_any_layer(describe(node))
    return bool(node.meta.get("path")) and re.search(re.escape(said) + r"(?![\w.])", pattern) is not None


def _in_any_layer(text: str) -> str:
    return re.sub(r"(?<=\.)\d+\b", "*", text)


def _said(node: fx.Node) -> str:
    source = node.meta.get("source")
    value = node.meta["val"]
    return f"{describe(node)}{f' ({source})' if source else ''}: {value}"
