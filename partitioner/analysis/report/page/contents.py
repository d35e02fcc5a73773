"""All that the page says, as plain data: what `--json` prints and what the page's tables and pictures are made of.

replicas        copies of the plan's ranks that have nothing to tell each other: all but `ranks` and `memory` is of one
ranks           where each rank is: replica, coordinates in it, place on the cluster, bytes
memory          bytes per rank by what they are for, against the limit
stages          layers, bytes and share of the time of each stage
layers          kinds of layers as steps (`layer_kinds`)
weights         how each group of weights is divided, and why those that are not are whole
communication   what is exchanged in a run of each entry (`traffic`)
schedule        timelines of the stages
predicted       what the planner says of it on a cluster; None without one
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from partitioner.analysis.report.generation_report import GenerationReport
from partitioner.analysis.report.page.layer_kinds import layer_kinds
from partitioner.analysis.report.page.traffic import LinkOf, traffic
from partitioner.analysis.report.report import Report
from partitioner.analysis.report.timeline import timings_of
from partitioner.program.program import Program
from partitioner.sharding.mesh import DEGREES, Mesh

__all__ = ["Placement", "Work", "page_contents", "rows_of_a_rank"]


@dataclass(frozen=True)
class Work:
    """What is served. batch: requests at the same time; pieces: into how many a batch is divided over stages."""

    prompt: int
    new: int
    batch: int
    pieces: int = 8


@dataclass(frozen=True)
class Placement:
    """A cluster as the page needs it. hosts: devices of one. links: innermost first, as rows. link_of: see `traffic`.

    usable_bytes: what a rank may hold.
    """

    name: str
    devices: tuple[str, ...]
    per_host: int
    size: int
    usable_bytes: int
    links: tuple[dict[str, Any], ...]
    link_of: LinkOf
    note: str = ""


def page_contents(
    programs: Mapping[str, Program],
    report: Report,
    generation: GenerationReport | None,
    work: Work,
    *,
    cache: Sequence[int],
    placement: Placement | None,
    predicted: Mapping[str, Any] | None,
    replicas: int,
    notes: tuple[str, ...],
) -> dict[str, Any]:
    """programs: by entry, "text" or "prefill" and "decode". cache: bytes on each rank of a replica, of all its rows.

    predicted: of `partitioner.planning`, as plain data.
    """
    first = next(iter(programs.values()))
    mesh = first.mesh
    rows = rows_of_a_rank(work, mesh, replicas)
    link_of = placement.link_of if placement is not None else None
    sizes = {
        "text": {"batch": rows, "sequence": work.prompt},
        "prefill": {"batch": rows, "sequence": _at_a_time(programs.get("prefill"), work.prompt)},
        "decode": {"batch": rows, "sequence": 1, "past": work.prompt + work.new // 2},
    }
    table = first.stages
    further = () if generation is None else [note for note in generation.notes if note not in report.notes]
    told = dict.fromkeys((*report.notes, *(f"of decode steps: {note}" for note in further), *notes))
    return {
        "model": report.model,
        "plan": report.plan,
        "degrees": {axis: mesh.size(axis) for axis in DEGREES} | {"dp": mesh.size("dp") * replicas},
        "replicas": replicas,
        "num_ranks": mesh.world_size * replicas,
        "dtypes": list(report.dtypes),
        "work": {**asdict(work), "rows_of_a_rank": rows},
        "bytes_whole": report.bytes_whole,
        "matrix_share": report.matrix_share,
        "cluster": None if placement is None else _cluster(placement, mesh.world_size * replicas),
        "ranks": _ranks(mesh, replicas, report, placement),
        "memory": _memory(
            report, replicas, list(cache) or [0] * mesh.world_size, placement, predicted, generation is not None
        ),
        "stages": None if report.stages is None else _stages(report),
        "layers": _kinds(programs),
        "weights": _weights(report),
        "states": [] if generation is None else _states(generation),
        "communication": [traffic(entry, program, sizes[entry], link_of) for entry, program in programs.items()],
        "schedule": []
        if table is None or mesh.size("pp") == 1
        else [
            {"title": title, "idle": timing.bubble, "spans": [asdict(span) for span in timing.spans],
             "stop": timing.stop, "stages": timing.stages}
            for title, timing in timings_of(table, microbatches=work.pieces)
        ],
        "predicted": predicted,
        "notes": list(told),
    }  # fmt: skip


def rows_of_a_rank(work: Work, mesh: Mesh, replicas: int) -> int:
    """Of the batch: replicas, and the ranks of `mesh` along dp, share it out."""
    return max(1, -(-work.batch // (mesh.size("dp") * replicas)))


def _kinds(programs: Mapping[str, Program]) -> list[dict[str, Any]]:
    """Of all entries; a kind that is the same in several stands once."""
    found: list[dict[str, Any]] = []
    for entry, program in programs.items():
        for kind in layer_kinds(program):
            same = next((one for one in found if {**one, "entries": 0} == {**kind, "entries": 0}), None)
            if same is None:
                found.append({**kind, "entries": [entry]})
            else:
                same["entries"].append(entry)
    return found


def _at_a_time(program: Program | None, prompt: int) -> int:
    most = None if program is None else program.limits.get("sequence", (1, None))[1]
    return prompt if most is None else min(prompt, most)


def _cluster(placement: Placement, num_ranks: int) -> dict[str, Any]:
    return {
        "name": placement.name,
        "devices": list(dict.fromkeys(placement.devices)),
        "num_devices": placement.size,
        "per_host": placement.per_host,
        "usable_bytes": placement.usable_bytes,
        "links": [dict(link) for link in placement.links],
        "idle_devices": max(0, placement.size - num_ranks),
        "note": placement.note,
    }


def _ranks(mesh: Mesh, replicas: int, report: Report, placement: Placement | None) -> list[dict[str, Any]]:
    found = []
    for rank in range(mesh.world_size * replicas):
        replica, within = divmod(rank, mesh.world_size)
        at = mesh.coordinates(within)
        one: dict[str, Any] = {"rank": rank, "replica": replica, **{axis: at[axis] for axis in DEGREES}}
        one["dp"] += replica * mesh.size("dp")
        if placement is not None:
            one["host"], one["place"] = divmod(rank, placement.per_host)
            one["device"] = placement.devices[rank % len(placement.devices)]
        one["weights_bytes"] = report.bytes_per_rank[within]
        one["replicated_bytes"] = report.replicated_per_rank[min(within, len(report.replicated_per_rank) - 1)]
        found.append(one)
    return found


def _memory(
    report: Report,
    replicas: int,
    cache: list[int],
    placement: Placement | None,
    predicted: Mapping[str, Any] | None,
    keeps: bool,
) -> dict[str, Any]:
    """Results and buffers are the planner's, of the fullest rank, and counted for all."""
    mine = (predicted or {}).get("this_plan") or {}
    extra = mine.get("memory_bytes", {})
    results, buffers = (math.ceil(extra.get(name, 0)) for name in ("activations", "buffers"))
    limit = None if placement is None else placement.usable_bytes
    rows = []
    for rank in range(replicas * len(report.bytes_per_rank)):
        within = rank % len(report.bytes_per_rank)
        weights = report.bytes_per_rank[within]
        shared = report.replicated_per_rank[min(within, len(report.replicated_per_rank) - 1)]
        total = weights + cache[within] + results + buffers
        rows.append(
            {
                "rank": rank,
                "own_bytes": weights - shared,
                "replicated_bytes": shared,
                "cache_bytes": cache[within],
                "activation_bytes": results,
                "buffer_bytes": buffers,
                "total_bytes": total,
                "share_of_limit": None if not limit else total / limit,
            }
        )
    return {
        "limit_bytes": limit,
        "fullest": max(rows, key=lambda row: row["total_bytes"])["rank"],
        "fits": None if limit is None else all(row["total_bytes"] <= limit for row in rows),
        "keeps_a_cache": keeps,
        "counts_activations": bool(extra),
        "ranks": rows,
    }


def _stages(report: Report) -> dict[str, Any]:
    assert report.stages is not None
    return {
        "balance": report.stages.balance,
        "evenness": report.stages.evenness,
        "places": report.stages.places,
        "shared_head": list(report.stages.head),
        "evenness_alone": report.stages.evenness_alone or None,
        "shared": [{"name": name, "stages": list(held)} for name, held in report.stages.shared],
        "stages": [
            {
                "stage": number,
                "first_layer": row.layers[0] if row.layers else "",
                "last_layer": row.layers[-1] if row.layers else "",
                "num_layers": len(row.layers),
                "bytes": row.bytes,
                "share": row.share,
                "hands_on": list(row.hands_on),
            }
            for number, row in enumerate(report.stages.rows)
        ],
    }


def _weights(report: Report) -> list[dict[str, Any]]:
    return [
        {
            "name": row.pattern,
            "count": len(row.names),
            "shape": list(row.shape),
            "bytes": row.bytes,
            "all_bytes": row.bytes * len(row.names),
            "is_matrix": row.is_matrix,
            "split": row.split,
            "reason": row.reason,
        }
        for row in report.rows
    ]


def _states(generation: GenerationReport) -> list[dict[str, Any]]:
    return [
        {
            "name": row.pattern,
            "count": len(row.names),
            "shape": list(row.shape),
            "dtype": row.dtype,
            "per": "token" if row.per_token else "sequence",
            "sees": row.sees,
            "bytes": row.bytes,
            "bytes_of_a_rank": max(row.bytes_per_rank),
            "split": row.split,
            "reason": row.reason,
        }
        for row in generation.states
    ]
