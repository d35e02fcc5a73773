"""Which way is quickest for how many bytes: measured on the GPUs at hand when ranks first meet, and kept.

    small, large   the kernels of ours (`large_kernel.py`)
    in two         a reduce_scatter and an all_gather: each rank sums a piece, where there are more than two
    nccl           NCCL

`measure.py` takes the times.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

__all__ = ["SIZES", "Choice", "Row", "Way"]

Way = Literal["small", "large", "in two", "nccl"]

Row = tuple[int, Mapping[str, float]]
"""Bytes that a rank brings, and the microseconds of each way."""

SIZES = {
    "all_reduce": tuple(2**power for power in range(10, 28)),
    "all_gather": tuple(4**power for power in range(5, 14)),
    "reduce_scatter": tuple(4**power for power in range(5, 14)),
    "permute": tuple(4**power for power in range(5, 14)),
}
"""What is measured. An all_to_all has no choice: no rank knows how much two others exchange."""


@dataclass(frozen=True)
class Choice:
    """By kind: up to how many bytes which way, in ascending order; the last has no end."""

    table: Mapping[str, Sequence[tuple[float, Way]]]

    @classmethod
    def unmeasured(cls) -> Choice:
        """Where nothing is known: what holds for all GPUs that see each other."""
        return cls(dict.fromkeys(SIZES, ((65536, "small"), (math.inf, "nccl"))))

    @classmethod
    def always(cls, way: Way) -> Choice:
        return cls(dict.fromkeys(SIZES, ((math.inf, way),)))

    @classmethod
    def of_times(cls, times: Mapping[str, Sequence[Row]]) -> Choice:
        """The quickest way for every size; between two sizes that of the nearer."""
        table: dict[str, Sequence[tuple[float, Way]]] = {}
        for kind, rows in times.items():
            ends = [math.sqrt(one[0] * other[0]) for one, other in itertools.pairwise(rows)]
            of_kind: list[tuple[float, Way]] = []
            for (_, of_ways), end in zip(rows, [*ends, math.inf], strict=True):
                best = min((way for way in get_args(Way) if way in of_ways), key=of_ways.__getitem__)
                if of_kind and of_kind[-1][1] == best:
                    of_kind.pop()
                of_kind.append((end, best))
            table[kind] = tuple(of_kind)
        return cls(table)

    def of(self, kind: str, num_bytes: int) -> Way:
        return next(way for end, way in self.table[kind] if num_bytes <= end)

    def to_json(self) -> str:
        return json.dumps(
            {kind: [[None if end == math.inf else end, way] for end, way in rows] for kind, rows in self.table.items()}
        )

    @classmethod
    def from_data(cls, data: Any) -> Choice | None:
        """None: it is not what `to_json` wrote."""
        try:
            table = {
                kind: tuple((math.inf if end is None else float(end), way) for end, way in data[kind]) for kind in SIZES
            }
        except (TypeError, ValueError, KeyError):
            return None
        sound = all(
            rows and rows[-1][0] == math.inf and all(way in get_args(Way) for _, way in rows) for rows in table.values()
        )
        return cls(table) if sound else None
