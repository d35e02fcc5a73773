"""`partitioner balance`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from partitioner.cli.common.options import Device, Dtype, Model, Timeout
from partitioner.cli.common.tables import say
from partitioner.cli.jobs.compile import Compile
from partitioner.errors import InputError

__all__ = ["balance_command"]


def balance_command(
    model: Model,
    text: Annotated[str, typer.Option(help="file with text like that which the model will get")],
    how: Compile,
    extra: Annotated[int, typer.Option(help="how many copies of the hottest experts to put on a second rank")] = 0,
    length: Annotated[int, typer.Option(help="the text is run in pieces of this many tokens")] = 512,
    out: Annotated[str | None, typer.Option("--out", "-o", help="also write the plan to this file")] = None,
    dtype: Dtype = None,
    device: Device = "auto",
    timeout_s: Timeout = 600.0,
) -> None:
    """Count which experts a text uses, and print a plan that gives all ranks about equal work."""
    from partitioner.cli.common.files import require_file
    from partitioner.cli.jobs.balance import TextCase, read_text
    from runtime.processes.launch import require_timeout

    require_timeout(timeout_s)
    if extra < 0:
        raise InputError(f"--extra must be at least 0, got {extra}")
    require_file("--out", out)
    written = read_text(model, text)
    case = TextCase(model, how, (), length, dtype, device)

    from partitioner.cli.actions.balance import balanced, measured, tokens_of

    case = replace(case, tokens=tokens_of(model, written))
    plan, said = balanced(case.plan, measured(case, timeout_s=timeout_s), extra=extra)
    say(f"{len(case.tokens)} tokens: {said}", Console(stderr=True))
    print(plan)
    if out is not None:
        Path(out).write_text(f"{plan}\n", encoding="utf-8")
