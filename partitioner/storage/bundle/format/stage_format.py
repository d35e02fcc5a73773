"""A rank's pipeline stage as data: what crosses to the next one, and along which dims a rank has its own rows of it.

    {"count": 2, "receives": [], "sends": [{"name": .., "shape": ["batch", "sequence", 64], "dtype": "float32",
     "rows": [{"dim": 1, "axes": ["sp"], "order": "zigzag"}]}], "rows_apart": true, "pairs_per_token": 0}

"rows" is absent where every rank has all of what crosses. A head that all stages share out has a graph of its own, over
the rank's weights:

    {"graph": "sha256..", "integers": [], "receives": [..]}
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx

from partitioner.sharding.mesh import AXES
from partitioner.storage.bundle.format.untrusted_json import DTYPES, IDENTIFIER, Record, dtype_name, whole_number
from runtime.program.rank_program import Crossing, OwnRows, SharedHead, Stage

__all__ = ["MOST_DIMS", "head_data", "read_dims", "read_head", "read_stage", "stage_data"]

Data = dict[str, Any]
_ORDERS = {name: name for name in ("blocks", "zigzag")}
MOST_DIMS = 16


def stage_data(stage: Stage) -> Data:
    return {
        "count": stage.count,
        "receives": list(map(_crossing_data, stage.receives)),
        "sends": list(map(_crossing_data, stage.sends)),
        "rows_apart": stage.rows_apart,
        "pairs_per_token": stage.pairs_per_token,
    }


def head_data(head: SharedHead, *, graph: str, integers: Sequence[int]) -> Data:
    """`graph`: the digest of its text."""
    return {"graph": graph, "integers": list(integers), "receives": list(map(_crossing_data, head.receives))}


def read_head(record: Record, build: Callable[..., fx.Graph], *, inputs: Sequence[str]) -> SharedHead:
    """`build(digest, integers=, inputs=)` builds its graph, when it is asked for."""
    digest, integers = record.digest("graph"), record.integers("integers", low=-(2**62))
    receives = tuple(map(_read_crossing, record.records("receives")))
    if not receives or any(crossing.rows for crossing in receives):
        record.fail("receives", "what the last stage has all of, one value at the least")
    given = [*inputs, *(f"receive_{i}" for i in range(len(receives)))]
    record.done()
    return SharedHead(functools.partial(build, digest, integers=integers, inputs=given), receives)


def _crossing_data(crossing: Crossing) -> Data:
    found: Data = {"name": crossing.name, "shape": list(crossing.shape), "dtype": dtype_name(crossing.dtype)}
    if crossing.rows:
        found["rows"] = [{"dim": rows.dim, "axes": list(rows.axes), "order": rows.order} for rows in crossing.rows]
    return found


def read_stage(record: Record, coordinates: Mapping[str, int]) -> Stage:
    """Which one it is, the rank's coordinate says."""
    stage = Stage(
        coordinates["pp"],
        record.integer("count", low=2, high=2**16),
        tuple(map(_read_crossing, record.records("receives"))),
        tuple(map(_read_crossing, record.records("sends"))),
        rows_apart=record.flag("rows_apart"),
        pairs_per_token=record.integer("pairs_per_token", high=2**40),
    )
    if stage.index >= stage.count:
        record.fail("count", f"more than the rank's own stage, {stage.index}")
    record.done()
    return stage


def _read_crossing(record: Record) -> Crossing:
    shape = read_dims(record)
    # those whose ranks have all of it do not say so
    rows = tuple(_read_own_rows(each, shape) for each in record.records("rows")) if record.has("rows") else ()
    crossing = Crossing(record.text("name", IDENTIFIER), shape, record.one_of("dtype", DTYPES), rows)
    record.done()
    return crossing


def _read_own_rows(record: Record, shape: tuple[int | str, ...]) -> OwnRows:
    rows = OwnRows(
        record.integer("dim", high=max(len(shape) - 1, 0)),
        record.texts("axes", IDENTIFIER),
        record.one_of("order", _ORDERS),
    )
    if not rows.axes or not set(rows.axes) <= set(AXES) - {"pp"} or len(set(rows.axes)) != len(rows.axes):
        record.fail("axes", f"some of {', '.join(axis for axis in AXES if axis != 'pp')}, each once")
    if not shape or not isinstance(shape[rows.dim], str):
        record.fail("dim", "one whose size inputs tell")
    record.done()
    return rows


def read_dims(record: Record) -> tuple[int | str, ...]:
    shape = record.any("shape")
    if not isinstance(shape, list) or len(shape) > MOST_DIMS:
        record.fail("shape", "a list of dims")
    for dim in shape:
        named = isinstance(dim, str) and IDENTIFIER.fullmatch(dim)
        if not named and not whole_number(dim, high=2**31):
            record.fail("shape", "of whole numbers and plain names")
    return tuple(shape)
