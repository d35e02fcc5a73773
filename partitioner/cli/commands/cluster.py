"""`partitioner cluster`: show and import need no torch; detect measures by it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from partitioner.cli.common.tables import say
from partitioner.errors import InputError

__all__ = ["cluster_command"]


def cluster_command(
    action: Annotated[str, typer.Argument(help="show, detect, or import")],
    what: Annotated[
        str | None,
        typer.Argument(
            help="for show: 8xH100, 32x8xH100, or a .yaml file; for import: NCCL's topology XML, Slurm's "
            "topology.yaml, or a system of aiconfigurator-core"
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="for import: the device or host, if the file does not say it: H100, 8xH100")
    ] = None,
    hosts: Annotated[int | None, typer.Option(help="for import: how many hosts like the one of the file")] = None,
    topology: Annotated[
        str,
        typer.Option(help="for import: which topology of Slurm's file; by default the one that it marks as default"),
    ] = "",
    out: Annotated[str | None, typer.Option("--out", "-o", help="write it to this file")] = None,
) -> None:
    """Print a cluster as YAML: a preset, this machine (measured in some seconds), or a file of another tool."""
    from partitioner.cli.common.files import require_file

    if action not in ("show", "detect", "import") or (action != "detect") != (what is not None):
        raise InputError("write partitioner cluster show 8xH100, cluster detect, or cluster import FILE")
    if action != "import" and (device is not None or hosts is not None or topology):
        raise InputError(f"--device, --hosts and --topology are for cluster import; cluster {action} takes none")
    require_file("--out", out)
    if action == "import":
        from partitioner.planning.importers.read_file import import_cluster

        found = import_cluster(Path(str(what)), device=device, hosts=hosts, topology=topology)
    elif what is not None:
        from partitioner.planning.cluster import Cluster

        found = Cluster.parse(what)
    else:
        from partitioner.planning.machine.detect import detect

        found = detect()
    text = found.to_yaml()
    if out is not None:
        Path(out).write_text(text, encoding="utf-8")
    say(text)
