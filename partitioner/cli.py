"""The command line.

    partitioner verify MODEL --tp 4      compare the partitioned model with the original; exit code 1 where they differ
    partitioner report MODEL --tp 4      what would be split and what not, without any data

Exit codes: 0 equal, 1 a difference or a lost rank, 2 something in the question is wrong (one line says what).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from partitioner.compile import partition
from partitioner.errors import CommunicationError, PartitionerError
from partitioner.named_model import load_model
from partitioner.plan import Plan
from partitioner.verify import Case, Outcome, dtype_named, explain, parse_lengths, verify, verify_in_processes

__all__ = ["app", "main"]

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)

Model = Annotated[str, typer.Argument(help="a checkpoint folder, config:FILE.json, or a model type of transformers")]
Tp = Annotated[int, typer.Option(help="tensor-parallel ranks")]


@app.command("verify")
def verify_command(
    model: Model,
    tp: Tp = 2,
    dtype: Annotated[str, typer.Option(help="one or several, with commas between")] = "float64,float32",
    lengths: Annotated[str, typer.Option(help="sequence lengths, with commas between")] = "1,5,40",
    simulate: Annotated[bool, typer.Option("--simulate", help="all ranks in this process, one thread each")] = False,
    seed: Annotated[int, typer.Option(help="of random weights and inputs")] = 0,
    timeout_s: Annotated[float, typer.Option("--timeout", help="seconds until the processes are stopped")] = 600.0,
) -> None:
    """Compare the partitioned model with the original, over one process per rank."""
    with _errors():
        case = Case(model, tp, tuple(dtype.split(",")), parse_lengths(lengths), seed)
        for name in case.dtypes:
            dtype_named(name)
        outcomes = list(verify(case)) if simulate else verify_in_processes(case, timeout_s=timeout_s)
        console = Console()
        console.print(_table(case, outcomes, "one thread per rank" if simulate else "one process per rank, gloo"))
        worst = next((outcome for outcome in outcomes if not outcome.equal), None)
        if worst is not None:
            divergence = explain(case, worst)
            equal = "in the trace, or in rounding: in float64 the partitioned graph equals the traced one"
            at = equal if divergence is None else str(divergence)
            console.print(
                f"first difference ({worst.dtype}, length {worst.length}): {at}", markup=False, highlight=False
            )
            raise typer.Exit(1)


@app.command("report")
def report_command(model: Model, tp: Tp = 2) -> None:
    """Print what would be split over the ranks and what would not, and why. Needs no weights and little memory."""
    with _errors():
        parts = partition(load_model(model, dtype=torch.float32, meta=True), Plan(tp=tp))
        Console().print(str(parts.report), markup=False, highlight=False)


def main() -> None:
    app()


@contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except PartitionerError as error:
        hint = " (--simulate shows at which node)" if isinstance(error, CommunicationError) else ""
        Console(stderr=True).print(f"error: {error}{hint}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1 if isinstance(error, CommunicationError) else 2) from None


def _table(case: Case, outcomes: list[Outcome], how: str) -> Table:
    table = Table(title=f"{case.model}, tp={case.tp}, {how}")
    for heading in ("dtype", "length", "relative error", "accepted", ""):
        table.add_column(heading, justify="left" if heading in ("dtype", "") else "right")
    for outcome in outcomes:
        verdict = "[green]equal[/]" if outcome.equal else "[red]differs[/]"
        table.add_row(outcome.dtype, str(outcome.length), f"{outcome.error:.1e}", f"{outcome.accepted:.0e}", verdict)
    return table
