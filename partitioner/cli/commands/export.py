"""`partitioner export` and `partitioner show`: bundles."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from partitioner.cli.common.options import Checkpoint, Dtype, Model, Revision
from partitioner.cli.common.tables import say
from partitioner.cli.jobs.compile import Compile

__all__ = ["export_command", "show_command"]


def export_command(
    model: Model,
    out: Annotated[str, typer.Option("--out", "-o", help="a new folder")],
    how: Compile,
    dtype: Dtype = None,
    reference: Annotated[
        bool, typer.Option("--reference", help="leave the weights in the checkpoint, and refer to them")
    ] = False,
    revision: Revision = None,
) -> None:
    """Write a bundle: what each rank runs, and its slices of the weights. Loading a bundle executes no code from it."""
    from partitioner.storage.dtypes import require_asked
    from partitioner.storage.hub import fetched
    from partitioner.storage.recognise import require_new

    require_new(out)
    require_asked(dtype)
    model = fetched(model, revision=revision)

    from partitioner.cli.actions.export import export

    say(export(model, how, out, dtype=dtype, reference=reference), Console(stderr=True))


def show_command(
    folder: Annotated[str, typer.Argument(help="a bundle")],
    rank: Annotated[int | None, typer.Option(help="print what this rank runs")] = None,
    generation: Annotated[bool, typer.Option("--generation", help="with --rank: its decode graph")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="read and check all files, weights included")] = False,
    checkpoint: Checkpoint = None,
) -> None:
    """Print what is in a bundle."""
    from partitioner.storage.bundle.bundle import load
    from partitioner.storage.bundle.describe import describe, show_graph

    bundle = load(folder, checkpoint=checkpoint)
    if verify:
        bundle.verify()
    say(describe(bundle) if rank is None else show_graph(bundle, rank, generation=generation))
    if verify:
        say("all files are as they were written")
