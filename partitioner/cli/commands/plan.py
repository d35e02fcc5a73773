"""`partitioner plan` and `partitioner fit`."""

from __future__ import annotations

from typing import Annotated

import typer

from partitioner.cli.common.options import CacheDtype, Dtype, Model
from partitioner.errors import InputError

__all__ = ["fit_command", "plan_command"]

Gpus = Annotated[str, typer.Option("--gpus", help="the cluster: 8xH100, 32x8xH100, or a .yaml file")]
Weights = Annotated[
    str,
    typer.Option(help="weights of a quantised checkpoint: expanded, or stored as in its files (--plan weights=stored)"),
]
Json = Annotated[bool, typer.Option("--json", help="print JSON")]


def plan_command(
    model: Model,
    gpus: Gpus,
    prompt: Annotated[int, typer.Option(help="tokens per prompt")] = 1024,
    new: Annotated[int, typer.Option(help="new tokens per prompt")] = 256,
    batch: Annotated[int, typer.Option(help="requests at the same time, over the whole cluster")] = 1,
    goal: Annotated[str, typer.Option("--for", help="goal: latency, throughput or context")] = "latency",
    ttft: Annotated[float | None, typer.Option(help="limit: seconds to the first token")] = None,
    tpot: Annotated[float | None, typer.Option(help="limit: seconds between two tokens")] = None,
    top: Annotated[int, typer.Option(min=1, help="how many plans to print")] = 8,
    weights: Weights = "expanded",
    dtype: Dtype = None,
    cache_dtype: CacheDtype = None,
    as_json: Json = False,
) -> None:
    """Rank plans for a model on a cluster by predicted times. Needs no weights and runs nothing on the cluster."""
    from partitioner.planning.cluster import Cluster
    from partitioner.planning.quantities import Workload

    cluster, workload = Cluster.parse(gpus), Workload(prompt, new, batch, ttft, tpot)
    _require(goal, weights, dtype, cache_dtype)

    from partitioner.cli.actions.plan import Held, plan

    held = Held(dtype, cache_dtype, stored=weights == "stored")
    if not plan(model, cluster, workload, held, goal=goal, top=top, as_json=as_json):
        raise typer.Exit(1)


def fit_command(
    models: Annotated[list[str], typer.Argument(help="checkpoint folders, config:FILE.json or model types")],
    gpus: Gpus,
    prompt: Annotated[int, typer.Option(help="tokens per prompt")] = 4096,
    new: Annotated[int, typer.Option(help="new tokens per prompt")] = 512,
    batch: Annotated[int, typer.Option(help="requests at the same time")] = 1,
    weights_only: Annotated[bool, typer.Option("--weights-only", help="count cards, without tracing")] = False,
    weights: Weights = "expanded",
    dtype: Dtype = None,
    cache_dtype: CacheDtype = None,
    as_json: Json = False,
) -> None:
    """Say whether models fit on a cluster, and how. Exit code 0 if all do, 1 if one does not."""
    from partitioner.planning.cluster import Cluster
    from partitioner.planning.quantities import Workload

    cluster, workload = Cluster.parse(gpus), Workload(prompt, new, batch)
    _require("throughput", weights, dtype, cache_dtype)

    from partitioner.cli.actions.plan import Held, fit

    held = Held(dtype, cache_dtype, stored=weights == "stored")
    if not fit(models, cluster, workload, held, weights_only=weights_only, as_json=as_json):
        raise typer.Exit(1)


def _require(goal: str, weights: str, dtype: str | None, cache_dtype: str | None) -> None:
    """Before a model is traced, which takes a minute."""
    from partitioner.planning.quantities import GOALS
    from partitioner.program.plan import WEIGHTS
    from partitioner.storage.dtypes import require_asked
    from runtime.kv_cache.device_memory import require_dtype

    if goal not in GOALS:
        raise InputError(f"--for is one of {', '.join(GOALS)}; got {goal!r}")
    if weights not in WEIGHTS:
        raise InputError(f"--weights is one of {', '.join(WEIGHTS)}; got {weights!r}")
    require_asked(dtype)
    require_dtype(cache_dtype)
