"""`partitioner verify`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from partitioner.cli.common.options import Device, Model, Revision, Simulate, Timeout
from partitioner.cli.common.tables import print_table, say
from partitioner.cli.jobs.compile import Compile

if TYPE_CHECKING:
    from partitioner.cli.actions.verify import Outcome

__all__ = ["verify_command"]


def verify_command(
    model: Model,
    how: Compile,
    dtype: Annotated[str, typer.Option(help="dtypes to compare in, separated by commas")] = "float64,float32",
    lengths: Annotated[str, typer.Option(help="sequence lengths, separated by commas")] = "1,5,40",
    simulate: Simulate = False,
    device: Device = "auto",
    revision: Revision = None,
    seed: Annotated[int, typer.Option(help="seed of random weights and inputs")] = 0,
    timeout_s: Timeout = 600.0,
    cache_dtype: Annotated[
        str | None, typer.Option(help="fp8: also print how much worse such a cache is than one in bfloat16")
    ] = None,
) -> None:
    """Compare the partitioned model with the original, over one process per rank."""
    from partitioner.cli.jobs.verify import Case, parse_lengths
    from partitioner.storage.hub import fetched
    from runtime.processes.launch import require_timeout

    require_timeout(timeout_s)  # also where no process is started
    place = "cpu" if simulate else device
    wanted = tuple(dtype.split(",")), parse_lengths(lengths)
    case = Case(fetched(model, revision=revision), how, *wanted, seed, place, cache_dtype)

    from partitioner.cli.actions.verify import (
        cache_losses,
        cache_losses_in_processes,
        explain,
        verify,
        verify_in_processes,
    )

    outcomes = list(verify(case)) if simulate else verify_in_processes(case, timeout_s=timeout_s)
    over = "one process per rank, over gloo" if case.placed.type == "cpu" else "one process and GPU per rank"
    print_table(f"{case.model}, {case.plan}, {'one thread per rank' if simulate else over}", _table(outcomes))
    worst = next((outcome for outcome in outcomes if not outcome.equal), None)
    if worst is not None:
        divergence = explain(case, worst)
        equal = "in the trace, or in rounding: in float64 the partitioned graph equals the traced one"
        at = equal if divergence is None else str(divergence)
        Console().print(f"first difference ({worst.dtype}, length {worst.length}): {at}", markup=False, highlight=False)
        raise typer.Exit(1)
    if cache_dtype is not None:
        losses = cache_losses(case) if simulate else cache_losses_in_processes(case, timeout_s=timeout_s)
        for loss in losses:
            say(str(loss))


def _table(outcomes: list[Outcome]) -> Table:
    table = Table()
    for heading in ("dtype", "length", "relative error", "allowed", ""):
        table.add_column(heading, justify="left" if heading in ("dtype", "") else "right")
    for outcome in outcomes:
        verdict = "[green]equal[/]" if outcome.equal else "[red]differs[/]"
        table.add_row(outcome.dtype, str(outcome.length), f"{outcome.error:.1e}", f"{outcome.accepted:.0e}", verdict)
    return table
