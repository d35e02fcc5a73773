"""Whatever runs come: pieces of any size, rows of any length, options and ranks; the same as on one rank."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.runtime.kv_cache.sharded_cases import HEADS, HOWS, Run, check
from tests.runtime.ops.rows.sp_cases import drawn


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[Run], int, int, str, dict[str, Any]]:
    rows, parts, how = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.sampled_from(HOWS))
    options = draw(
        st.sampled_from(
            [
                {},
                {"window": 1},
                {"window": 5},
                {"window": 5, "sees": 5},
                {"chunk": 4},
                {"chunk": 4, "sees": 4},
                {"softcap": 2.0},
                {"softcap": 2.0, "window": 7, "sees": 7},
                {"sinks": drawn(HEADS, seed=7)},
                {"sinks": drawn(HEADS, seed=7), "window": 3, "sees": 3},
                {"kv_map": [0, 1, 1, 1]},
            ]
        )
    )
    order = draw(st.sampled_from(("zigzag", "blocks")))
    lengths, runs = [0] * rows, []
    for _ in range(draw(st.integers(1, 6))):
        decode = all(lengths) and draw(st.booleans())
        wanted = [1 if decode else draw(st.integers(0, 9)) for _ in range(rows)]
        active = [bool(count) for count in wanted]
        if decode:
            active = [draw(st.booleans()) for _ in range(rows)]
        if not any(active) or not all(on or length for on, length in zip(active, lengths, strict=True)):
            continue  # a row that has nothing cannot repeat it
        starts = tuple(length if on else length - 1 for on, length in zip(active, lengths, strict=True))
        counts = tuple(count if on else 1 for on, count in zip(active, wanted, strict=True))
        runs.append(Run(starts, counts, tuple(active), decode=decode))
        lengths = [length + (count if on else 0) for on, length, count in zip(active, lengths, counts, strict=True)]
    return runs, rows, parts, how, {**options, "order": order, "step": draw(st.integers(9, 20))}


@given(cases())
@settings(max_examples=40, deadline=None)
def test_any_runs(case: tuple[list[Run], int, int, str, dict[str, Any]]) -> None:
    runs, rows, parts, how, options = case
    if runs:
        check(runs, rows, parts, how, **options)
