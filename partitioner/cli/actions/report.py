"""What `partitioner report --html` and `partitioner schedule` write: the page of a plan, and the stages' timelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from partitioner import __version__
from partitioner.analysis.report.generation_report import GenerationReport
from partitioner.analysis.report.page.contents import Placement, Work, page_contents, rows_of_a_rank
from partitioner.analysis.report.page.render import render
from partitioner.analysis.report.report import Report
from partitioner.analysis.report.timeline import draw, timings_of
from partitioner.compile.parts import Parts
from partitioner.errors import InputError, PlanError
from partitioner.planning.cluster import Cluster, bad_order, hops
from partitioner.planning.explain import as_data, sureness
from partitioner.planning.pricing.price import Pricer
from partitioner.planning.quantities import Workload
from partitioner.planning.search import Choice, search
from partitioner.planning.summary import summarize_program
from partitioner.program.plan import Plan
from partitioner.sharding.mesh import Mesh

__all__ = ["page_of", "require_room", "schedule", "write_page"]

_PLANS = 8


def schedule(parts: Parts[Any], *, microbatches: int, out: str | None) -> str:
    """The computed bubbles as text; `out`: where the picture goes."""
    table = parts.program.stages
    if table is None:
        raise InputError("a schedule needs several stages: give --pp, or pp= in --plan")
    timings = timings_of(table, microbatches=microbatches)
    if out is not None:
        Path(out).write_text(draw([(f"{title}: idle {timing.bubble:.1%}", timing) for title, timing in timings]))
    lines = [f"{parts.program.name}, {table.count} stages, times predicted for {table.balance}:"]
    lines += [f"  {title}: idle {timing.bubble:.1%}" for title, timing in timings]
    return "\n".join(lines) + (f"\nwritten to {out}" if out is not None else "")


def page_of(
    parts: Parts[Report], plan: Plan, work: Work, *, cluster: Cluster | None = None, goal: str = "latency"
) -> dict[str, Any]:
    """All that the page says of a plan; `cluster`: it also has places and times there."""
    notes: tuple[str, ...] = ()
    generation: GenerationReport | None = None
    cache: list[int] = []
    programs = {"text": parts.program}
    workload = Workload(work.prompt, work.new, work.batch)
    try:
        generation = parts.generation_report
        programs = {"prefill": parts.program_of("prefill"), "decode": parts.program_of("decode")}
        rows = rows_of_a_rank(work, parts.mesh, plan.replicas)
        cache = parts.cache_bytes(max_batch=rows, max_length=work.prompt + work.new)
    except PlanError as error:
        notes = (f"there is no page of generation: {error}",)
    return page_contents(
        programs,
        parts.report,
        generation,
        work,
        cache=cache,
        placement=None if cluster is None else _placement(cluster, plan.mesh),
        predicted=None if cluster is None else _predicted(parts, plan, cluster, workload, goal),
        replicas=plan.replicas,
        notes=notes,
    )


def write_page(page: dict[str, Any], out: str) -> None:
    try:
        Path(out).write_text(render(page, version=__version__), encoding="utf-8")
    except OSError as error:  # which does not name the file where the disk is full
        raise InputError(f"cannot write the page {out}: {error.strerror}") from error


def require_room(cluster: Cluster, mesh: Mesh) -> None:
    """mesh: of all replicas."""
    if mesh.world_size > cluster.size:
        raise InputError(f"--gpus {cluster.name}: {cluster.size} devices have no room for {mesh.world_size} ranks")


def _placement(cluster: Cluster, mesh: Mesh) -> Placement:
    """mesh: of all replicas; the groups of the first one's programs stand for those of all."""
    require_room(cluster, mesh)
    names = [dimension.name for dimension in cluster.dimensions]

    def link_of(ranks: Any) -> str:
        crossed = [name for name, hop in zip(names, hops(cluster, ranks), strict=True) if hop.n > 1]
        return crossed[-1] if crossed else names[0]

    axes: dict[str, list[str]] = {name: [] for name in names}
    for axis in ("tp", "sp", "pp", "dp", "ep", "etp"):
        if mesh.size(axis) > 1:
            axes[link_of(mesh.group((axis,), 0))].append(axis)
    links = tuple(
        {
            "name": dimension.name,
            "size": dimension.size,
            "gb_s": dimension.bytes_per_s / 1e9,
            "latency_s": dimension.latency_s,
            "axes": axes[dimension.name],
        }
        for dimension in cluster.dimensions
    )
    devices = tuple(device.name for device in cluster.devices)
    return Placement(
        cluster.name, devices, cluster.dimensions[0].size, cluster.size, cluster.weakest.usable_bytes, links, link_of,
        bad_order(cluster, mesh),
    )  # fmt: skip


def _predicted(parts: Parts[Report], plan: Plan, cluster: Cluster, workload: Workload, goal: str) -> dict[str, Any]:
    """What the planner says: of this plan, of the best ones, and of how sure it is."""
    if parts.traced is None:
        return {"unknown": "Times are not predicted of a bundle: name the model that it was made of."}
    try:
        summary = summarize_program(parts.traced)
    except PlanError as error:
        return {"unknown": f"Times are not predicted: {error}"}
    pricer = Pricer(summary, cluster)
    price = pricer.price(plan, workload)
    mine = Choice(goal, (), (price,)) if price.refused else Choice(goal, (price,), ())
    told = as_data(mine, cluster, summary, most=1)
    found = as_data(search(summary, cluster, workload, goal=goal), cluster, summary, most=_PLANS)
    kinds = ("linear", "prefill", "decode", *(("experts",) if summary.experts is not None else ()))
    measured = {kind: pricer.kernels.measured(kind, summary.dtype) for kind in kinds}
    del found["cluster"], found["model"]
    return {
        **found,
        "this_plan": (told["plans"] or told["refused"])[0],
        "sureness": sureness(cluster, summary, tables=measured),
    }
