"""`partitioner schedule`."""

from __future__ import annotations

from typing import Annotated

import typer

from partitioner.cli.common.options import Dtype, Model
from partitioner.cli.common.tables import say
from partitioner.cli.jobs.compile import Compile
from partitioner.errors import InputError

__all__ = ["schedule_command"]


def schedule_command(
    model: Model,
    how: Compile,
    dtype: Dtype = None,
    microbatches: Annotated[int, typer.Option(help="number of pieces of a batch or prompt")] = 8,
    out: Annotated[str | None, typer.Option("--out", "-o", help="write the picture to this file, as SVG")] = None,
) -> None:
    """Print how long pipeline stages are idle, from their predicted times; needs no weights."""
    from partitioner.cli.common.files import require_file
    from partitioner.storage.dtypes import require_asked

    if microbatches < 1:
        raise InputError(f"--microbatches must be at least 1, got {microbatches}")
    require_file("--out", out)
    require_asked(dtype)
    if how.plan_of(model).pp == 1:
        raise InputError("a schedule needs several stages: give --pp, or pp= in --plan")

    from partitioner.cli.actions.report import schedule

    say(schedule(how.compile(model, dtype=dtype, meta=True), microbatches=microbatches, out=out))
