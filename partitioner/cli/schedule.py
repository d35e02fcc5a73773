"""What `partitioner schedule` says: the timelines of a model's stages, from their predicted times."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from partitioner.compile.parts import Parts
from partitioner.errors import InputError
from partitioner.report.timeline import draw
from runtime.pipeline.schedule import chain, ring
from runtime.pipeline.timing import one_at_a_time, time_of

__all__ = ["schedule"]

_ROUNDS = 4


def schedule(parts: Parts[Any], *, microbatches: int, out: str | None) -> str:
    """The computed bubbles as text; `out`: where the picture goes."""
    table = parts.program.stages
    if table is None:
        raise InputError("a schedule is one of several stages: give --pp, or pp= in --plan")
    if microbatches < 1:
        raise InputError(f"--microbatches must be at least 1, got {microbatches}")
    whole = max(table.costs)
    # each piece of m takes 1/m of the batch's time on a stage; the slowest stage's whole batch is 1
    seconds = [[cost / whole / microbatches] for cost in table.costs]
    count = table.count
    timings = [
        (f"{microbatches} pieces in a chain", time_of(chain(count, microbatches), seconds)),
        ("one piece at a time, through all stages", one_at_a_time(seconds, microbatches)),
        (f"decode, {count} groups in a ring", time_of(ring(count, count, _ROUNDS * count), seconds)),
    ]
    if out is not None:
        Path(out).write_text(draw([(f"{title}: idle {timing.bubble:.1%}", timing) for title, timing in timings]))
    lines = [f"{parts.program.name}, {count} stages, times predicted for {table.balance}:"]
    lines += [f"  {title}: idle {timing.bubble:.1%}" for title, timing in timings]
    return "\n".join(lines) + (f"\nwritten to {out}" if out is not None else "")
