"""What every trace must be: valid events, nested properly, that tell where the time of the steps went."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch import nn

from runtime.execution.chrome_trace import TRACKS, Trace
from tests.support import partitioned

SIZES = {
    "hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32, "intermediate_size": 512,
    "num_hidden_layers": 2, "vocab_size": 512,
}  # fmt: skip
"""Ops of 20 us and more: recording one takes about half a microsecond."""


def model() -> nn.Module:
    found: nn.Module = partitioned.sized("llama", **SIZES)
    return found


def validate(trace: Trace, *, num_ranks: int) -> list[dict[str, Any]]:
    """Asserts the schema and the nesting; the events."""
    events = trace.events()
    names = {(e["pid"], e["args"]["name"]) for e in events if e["name"] == "process_name"}
    assert names == {(rank, f"rank {rank} (tp={rank})" if num_ranks > 1 else "rank 0") for rank in range(num_ranks)}
    tracks = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert tracks == {(rank, tid): name for rank in range(num_ranks) for tid, name in enumerate(TRACKS)}
    spans: dict[tuple[int, int], list[tuple[float, float, str]]] = defaultdict(list)
    for event in events:
        assert isinstance(event["name"], str), event
        assert event["name"], event
        assert event["ph"] in "MXCsf", event
        assert event["ts"] >= 0, event
        if event["ph"] == "X":
            assert event["dur"] >= 0, event
            assert event["cat"] == tracks[event["pid"], event["tid"]]
            spans[event["pid"], event["tid"]].append((event["ts"], -event["dur"], event["name"]))
        elif event["ph"] == "C":
            assert all(value >= 0 for value in event["args"].values()), event
    for (_, tid), found in spans.items():
        _assert_nested(sorted(found), alone=TRACKS[tid] != "steps")
    return events


def _assert_nested(spans: list[tuple[float, float, str]], *, alone: bool) -> None:
    """Any two are one inside the other, or apart; `alone`: apart."""
    open_: list[float] = []
    for start, minus, name in spans:
        end = start - minus
        while open_ and open_[-1] <= start + 1e-3:
            open_.pop()
        assert not (alone and open_), f"{name} overlaps"
        assert not open_ or end <= open_[-1] + 1e-3, f"{name} ends after what it is in"
        open_.append(end)
