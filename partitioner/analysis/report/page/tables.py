"""The page's tables: columns and rows of what `contents` has, each cell with the number that it is sorted by."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runtime.kv_cache.device_memory import readable

__all__ = ["Cell", "Table", "seconds", "tables"]

MOST_ROWS = 256
"""Of one table; a page of thousands of ranks would be too large. The JSON has all."""


@dataclass(frozen=True)
class Cell:
    """text: as read. value: the number behind it, for sorting; None for text."""

    text: str
    value: float | int | None = None


@dataclass(frozen=True)
class Table:
    """rows: the first cell of each is its heading. left_out: how many rows are in the JSON only."""

    id: str
    caption: str
    headings: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    left_out: int = 0
    numbers: tuple[bool, ...] = ()
    """Which columns are numbers."""


def seconds(value: float) -> str:
    """As read: 1.23 s, 45.6 ms, 7.8 µs."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if abs(value) >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e-6:.2g} µs" if value else "0 s"


def tables(page: Mapping[str, Any]) -> dict[str, Table]:
    """By id; those without rows are left out."""
    found = [
        _ranks(page),
        _links(page),
        _memory(page),
        *(_steps(number, kind) for number, kind in enumerate(page["layers"])),
        _whole(page),
        _shared(page),
        _weights(page),
        _states(page),
        *(table for each in page["communication"] for table in _communication(each)),
        _stages(page),
        *_predicted(page),
    ]
    return {table.id: table for table in found if table.rows}


def _table(
    name: str, caption: str, columns: Sequence[tuple[str, str, str]], rows: Iterable[Mapping[str, Any]]
) -> Table:
    """columns: key, heading, and what it is: "text", "bytes", "number", "share" or "seconds"."""
    kept = list(rows)
    shown = tuple(tuple(_cell(row.get(key), kind) for key, _, kind in columns) for row in kept[:MOST_ROWS])
    numbers = tuple(kind != "text" for _, _, kind in columns)
    headings = tuple(heading for _, heading, _ in columns)
    return Table(name, caption, headings, shown, len(kept) - len(shown), numbers)


def _cell(value: Any, kind: str) -> Cell:
    if value is None or value == "":
        return Cell("-")
    if kind == "text":
        return Cell(str(value))
    if not math.isfinite(value):
        return Cell("-")
    if kind == "bytes":
        return Cell(readable(round(value)), value)
    if kind in ("share", "seconds"):
        return Cell(f"{value:.1%}" if kind == "share" else seconds(value), value)
    short = isinstance(value, float) and abs(value) < 1000
    return Cell(f"{value:.4g}" if short else f"{value:,.0f}", value)


def _ranks(page: Mapping[str, Any]) -> Table:
    degrees = page["degrees"]
    columns = [("rank", "rank", "number")]
    if page["cluster"] is not None:
        columns += [("host", "host", "number"), ("place", "device of the host", "number"), ("device", "kind", "text")]
    columns += [(axis, axis, "number") for axis, size in degrees.items() if size > 1]
    columns += [("layers", "layers", "text"), ("weights_bytes", "weights", "bytes")]
    columns += [("replicated_bytes", "of them on other ranks too", "bytes")]
    stages = (page["stages"] or {}).get("stages", [])
    layers = {each["stage"]: f"{each['first_layer']} to {each['last_layer']}" for each in stages}
    rows = [{**rank, "layers": layers.get(rank["pp"], "all")} for rank in page["ranks"]]
    return _table("ranks", "Where each rank is, and what it holds", columns, rows)


def _links(page: Mapping[str, Any]) -> Table:
    columns = [
        ("name", "link", "text"), ("size", "joins", "number"), ("gb_s", "GB/s of one device", "number"),
        ("latency_s", "latency", "seconds"), ("axes", "axes that cross it", "text"),
    ]  # fmt: skip
    links = [] if page["cluster"] is None else page["cluster"]["links"]
    rows = [{**link, "axes": ", ".join(link["axes"]) or "none"} for link in links]
    return _table("links", "Links, the innermost first", columns, rows)


def _memory(page: Mapping[str, Any]) -> Table:
    memory = page["memory"]
    columns = [("rank", "rank", "number"), ("own_bytes", "weights of its own", "bytes")]
    columns += [("replicated_bytes", "weights on other ranks too", "bytes")]
    columns += [("cache_bytes", "cache", "bytes")] if memory["keeps_a_cache"] else []
    if memory["counts_activations"]:
        columns += [("activation_bytes", "results", "bytes"), ("buffer_bytes", "buffers", "bytes")]
    columns.append(("total_bytes", "together", "bytes"))
    columns += [("share_of_limit", "of the limit", "share")] if memory["limit_bytes"] else []
    return _table("memory-table", "Memory of each rank", columns, memory["ranks"])


def _steps(number: int, kind: Mapping[str, Any]) -> Table:
    columns = [
        ("number", "step", "number"), ("what", "what", "text"), ("before", "in the model", "text"),
        ("after", "on the ranks", "text"),
    ]  # fmt: skip
    rows = [{"number": place, **_said(step)} for place, step in enumerate(kind["steps"], 1)]
    return _table(
        f"steps-{number}", f"Steps of {kind['name']} in {' and '.join(kind['entries'])}, in order", columns, rows
    )


def _said(step: Mapping[str, Any]) -> dict[str, str]:
    if step["kind"] == "exchange":
        size = readable(step["bytes_per_token"])
        after = f"{step['op']} over {step['axes']} ({step['ranks']} ranks), {size} per token: {step['purpose']}"
        return {"what": f"exchange at {step['path'] or 'the end'}", "before": "nothing", "after": after}
    if step["kind"] == "attention":
        after = "whole on every rank"
        if step["parts"]:
            after = f"heads over {step['axes']}: {_parts(step['parts'])}"
        return {"what": step["op"], "before": f"{step['heads']} heads", "after": after}
    after = "; ".join(
        f"{each['how']} over {each['axes']}: {_parts(each['parts'])}{', some on several ranks' * each['shared']}"
        for each in step["divided"]
    )
    shape = " x ".join(map(str, step["shape"]))
    return {
        "what": f"{step['op']} with {step['weight']}",
        "before": f"[{shape}], {readable(step['bytes'])}",
        "after": after or "whole on every rank",
    }


def _parts(sizes: Sequence[int]) -> str:
    if len(set(sizes)) == 1:
        return f"{sizes[0]} on each of {len(sizes)}"
    return "/".join(map(str, sizes[:16])) + ("/..." if len(sizes) > 16 else "")


_OF_WEIGHTS = [
    ("name", "weight", "text"), ("count", "how many", "number"), ("shape", "shape", "text"),
    ("bytes", "bytes of one", "bytes"), ("all_bytes", "bytes of all", "bytes"),
]  # fmt: skip


def _whole(page: Mapping[str, Any]) -> Table:
    rows = [row for row in page["weights"] if row["is_matrix"] and not row["split"]]
    return _table("whole", "Matrices that every rank has whole", [*_OF_WEIGHTS, ("reason", "why", "text")], rows)


def _shared(page: Mapping[str, Any]) -> Table:
    rows = [row for row in page["weights"] if row["split"] and row["reason"]]
    columns = [*_OF_WEIGHTS, ("split", "how", "text"), ("reason", "why", "text")]
    return _table("shared", "Divided weights of which several ranks hold some", columns, rows)


def _weights(page: Mapping[str, Any]) -> Table:
    rows = [{**row, "how": row["split"] or f"whole: {row['reason']}"} for row in page["weights"]]
    return _table("weights", "All weights", [*_OF_WEIGHTS, ("how", "on the ranks", "text")], rows)


def _states(page: Mapping[str, Any]) -> Table:
    columns = [
        ("name", "kept", "text"), ("count", "how many", "number"), ("shape", "shape", "text"), ("per", "per", "text"),
        ("bytes", "whole", "bytes"), ("bytes_of_a_rank", "on the fullest rank", "bytes"), ("how", "how", "text"),
        ("sees", "tokens seen, if not all", "number"),
    ]  # fmt: skip
    rows = [{**row, "how": "; ".join(filter(None, (row["split"] or "whole", row["reason"])))} for row in page["states"]]
    return _table("states", "What ranks keep of each sequence", columns, rows)


def _communication(each: Mapping[str, Any]) -> list[Table]:
    entry = each["entry"]
    links = [("link", "slowest link", "text")] if any(row["link"] for row in each["exchanges"]) else []
    columns = [
        ("op", "op", "text"), ("primitive", "primitive", "text"), ("axes", "over", "text"),
        ("ranks", "ranks", "number"), *links, ("at", "stage", "text"), ("layers", "layers", "number"),
        ("times", "times", "number"), ("brings_bytes", "a rank brings", "bytes"),
        ("total_bytes", "a rank sends in all", "bytes"),
    ]  # fmt: skip
    total = [
        ("axes", "over", "text"), ("ranks", "ranks", "number"), *links, ("times", "exchanges", "number"),
        ("bytes", "a rank sends in all", "bytes"),
    ]  # fmt: skip
    exchanges = [{**row, "at": ", ".join(map(str, row["stages"]))} for row in each["exchanges"]]
    return [
        _table(f"axes-{entry}", f"{entry}: bytes by axis, of the stage with most", total, each["by_axis"]),
        _table(f"exchanges-{entry}", f"{entry}: what is exchanged", columns, exchanges),
    ]


def _stages(page: Mapping[str, Any]) -> Table:
    columns = [
        ("stage", "stage", "number"), ("first_layer", "from", "text"), ("last_layer", "to", "text"),
        ("num_layers", "layers", "number"), ("bytes", "weights of a rank", "bytes"), ("share", "of the time", "share"),
        ("hands", "hands on", "text"),
    ]  # fmt: skip
    stages = (page["stages"] or {}).get("stages", [])
    rows = [{**each, "hands": " and ".join(each["hands_on"])} for each in stages]
    return _table("stages", "Stages", columns, rows)


def _predicted(page: Mapping[str, Any]) -> list[Table]:
    told = page["predicted"] or {}
    mine = told.get("this_plan") or {}
    parts = {"memory": "reading memory", "products": "products", "links": "links", "waiting": "waiting"}
    spent = [
        {"what": said, "prefill": mine["prefill_s"][name], "decode": mine["decode_s"][name]}
        for name, said in parts.items()
        if "prefill_s" in mine
    ]
    plans = [{"place": "this plan", **_barred(mine)}] if "ttft_s" in mine else []
    plans += [{"place": str(place), **_barred(plan)} for place, plan in enumerate(told.get("plans", []), 1)]
    columns = [("plan", "plan", "text"), ("devices", "devices", "number")]
    times = [("ttft_s", "first token", "seconds"), ("ttft_bar", "80% of measured", "text")]
    times += [("tpot_s", "each further token", "seconds"), ("tpot_bar", "80% of measured", "text")]
    times += [("tokens_per_s", "tokens/s", "number"), ("binds", "binds", "text"), ("reason", "why so", "text")]
    batch = [("plan", "plan", "text"), ("batch", "batch", "number"), ("tpot_s", "each further token", "seconds")]
    ways = {"what": "spent on", "prefill": "prompt", "decode": "each further token"}
    return [
        _table("spent", "What this plan's time is spent on",
               [(key, said, "text" if key == "what" else "seconds") for key, said in ways.items()], spent),
        _table("plans", "This plan, and the best ones for this cluster",
               [("place", "place", "text"), *columns, *times], plans),
        _table("frontier", "Throughput against time per token",
               [*batch, ("tokens_per_s", "tokens/s", "number")], told.get("frontier", [])),
        _table("refused", "Plans that do not fit, the closest first",
               [*columns, ("refused", "why not", "text")], told.get("refused", [])),
    ]  # fmt: skip


def _barred(plan: Mapping[str, Any]) -> dict[str, Any]:
    bars = {
        f"{name}_bar": "not known" if plan.get(f"{name}_80") is None else " to ".join(map(seconds, plan[f"{name}_80"]))
        for name in ("ttft", "tpot")
    }
    return {**plan, **bars}
