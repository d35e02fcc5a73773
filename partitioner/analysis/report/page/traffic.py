"""What ranks send each other in a run: by op, by axis, by link, at given sizes; as plain data.

    brings    bytes that a rank brings to one exchange, the most that any rank of its group brings
    sends     bytes that leave a rank for it, by the algorithms of `analysis.cost.device` (a ring: an all-reduce of n
              ranks sends 2 (n - 1) / n times what it brings)

Of rank 0's groups; in a stage, of the rank that stands in rank 0's place there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from partitioner.analysis.cost.device import sent_share
from partitioner.analysis.cost.node_cost import node_costs
from partitioner.analysis.cost.program_cost import program_cost
from partitioner.analysis.report.report import pattern_of
from partitioner.program.node_arguments import layer_of
from partitioner.program.program import Program
from runtime.ops.communicating import COMMUNICATING, axes_text, read_call

__all__ = ["LinkOf", "traffic"]

LinkOf = Callable[[Sequence[int]], str]
"""The name of the slowest link that a group of ranks crosses."""


def traffic(entry: str, program: Program, sizes: Mapping[str, int], link_of: LinkOf | None) -> dict[str, Any]:
    """Of one run of an entry."""
    past = sizes.get("past", 0) if program.states else 0
    known = {**sizes, "slots": past + sizes.get("sequence", 1)}  # of a cache as large as it must be
    given = {name: known.get(name, 1) for name in program.symbols} | {"past": past}
    at = dict.fromkeys(("dp", "pp", "sp", "tp"), 0)
    axes = {
        node.name: axes_text(read_call(node).axes)
        for node in program.graph.nodes
        if node.op == "call_function" and node.target in COMMUNICATING
    }
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    layers: dict[tuple[Any, ...], set[str]] = defaultdict(set)
    unsure: dict[str, None] = {}
    for cost in node_costs(program, at, given):
        for meeting in cost.meetings:
            if len(meeting.ranks) == 1:
                continue
            stages = tuple(sorted(cost.stages))
            key = (cost.op, meeting.kind, axes[cost.name], stages, meeting.most)
            # the same in every layer
            unsure.update(dict.fromkeys(pattern_of(said) for said in cost.unsure.split("; ") if said))
            row = groups.setdefault(
                key,
                {
                    "op": cost.op,
                    "primitive": meeting.kind,
                    "axes": axes[cost.name],
                    "ranks": len(meeting.ranks),
                    "stages": list(stages),
                    "link": link_of(meeting.ranks) if link_of is not None else "",
                    "times": 0,
                    "brings_bytes": meeting.most,
                    "sends_bytes": round(sent_share(meeting.kind, len(meeting.ranks)) * meeting.most),
                },
            )
            row["times"] += 1
            layers[key].add(layer_of(cost.path))
    rows = [
        {**row, "layers": len(layers[key] - {""}), "total_bytes": row["times"] * row["sends_bytes"]}
        for key, row in groups.items()
    ]
    rows += _crossings(program, given, link_of)
    return {
        "entry": entry,
        "rows_of_batch": given.get("batch", 1),
        "tokens": given.get("sequence", 1),
        "past": given["past"],
        "exchanges": rows,
        "by_axis": _by_axis(rows),
        "most_bytes": max(_of_stages(rows, "total_bytes").values(), default=0),
        "unsure": list(unsure),
    }


def _crossings(program: Program, given: Mapping[str, int], link_of: LinkOf | None) -> list[dict[str, Any]]:
    """What stages hand on."""
    at = dict.fromkeys(("dp", "pp", "sp", "tp"), 0)
    group = program.mesh.group(("pp",), 0)
    return [
        {
            "op": f"hand on to stage {stage + 1}",
            "primitive": "send",
            "axes": "pp",
            "ranks": 2,
            "stages": [stage],
            "link": link_of(group[stage : stage + 2]) if link_of is not None else "",
            "times": 1,
            "brings_bytes": size,
            "sends_bytes": size,
            "layers": None,
            "total_bytes": size,
        }
        for stage, size in enumerate(program_cost(program, at, given).crossing_bytes)
    ]


def _by_axis(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of the stage in which it is most."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        key = row["axes"], row["link"]
        found.setdefault(key, []).append(row)
    return [
        {
            "axes": axes,
            "link": link,
            "ranks": own[0]["ranks"],
            "times": max(_of_stages(own, "times").values()),
            "bytes": max(_of_stages(own, "total_bytes").values()),
        }
        for (axes, link), own in found.items()
    ]


def _of_stages(rows: list[dict[str, Any]], number: str) -> dict[int, int]:
    """A number, added up by stage: a rank is in one."""
    found: dict[int, int] = defaultdict(int)
    for row in rows:
        for stage in row["stages"]:
            found[stage] += row[number]
    return found
