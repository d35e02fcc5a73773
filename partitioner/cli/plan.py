"""The commands that ask before anything runs: plan, fit, and cluster.

partitioner plan MODEL --gpus 8xH100 --prompt 4096 --new 512 --batch 32 --for throughput
partitioner fit MODEL --gpus 8xH100       exit code 0 fits, 1 does not, 2 invalid arguments
partitioner cluster show 32x8xH100        the cluster as YAML, to edit
partitioner cluster detect                this machine, measured
partitioner cluster import topology.xml   NCCL's, Slurm's or AIConfigurator's, to edit
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from partitioner.cli.common.command import command
from partitioner.cli.common.options import CacheDtype, Dtype, Model
from partitioner.cli.common.tables import print_table, say
from partitioner.errors import InputError
from partitioner.planning.cluster import Cluster
from partitioner.planning.explain import as_data, cards_for_weights, held_text, interval, reason, served_text, sureness
from partitioner.planning.importers.read_file import import_cluster
from partitioner.planning.machine.detect import detect
from partitioner.planning.pricing.price import Pricer
from partitioner.planning.pricing.stored_format import StoredFormat
from partitioner.planning.quantities import Price, Workload
from partitioner.planning.released import released_bytes
from partitioner.planning.search import GOALS, Choice, broken_limits, search
from partitioner.planning.summary import summarize
from partitioner.program.plan import WEIGHTS
from partitioner.storage.checkpoint.open_checkpoint import can_open, open_checkpoint
from partitioner.storage.checkpoint.quantized_tensors import quantization_fields
from partitioner.storage.hub import fetched
from partitioner.storage.named_model import dtype_named, load_config, load_model
from runtime.kv_cache.cache_size import require_dtype

__all__ = ["register"]

Gpus = Annotated[str, typer.Option("--gpus", help="the cluster: 8xH100, 32x8xH100, or a .yaml file")]
Weights = Annotated[
    str,
    typer.Option(help="weights of a quantised checkpoint: expanded, or stored as in its files (--plan weights=stored)"),
]
Json = Annotated[bool, typer.Option("--json", help="print JSON")]


def register(app: typer.Typer) -> None:
    command(app, "plan")(plan_command)
    command(app, "fit")(fit_command)
    command(app, "cluster")(cluster_command)


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
    cluster, workload = Cluster.parse(gpus), Workload(prompt, new, batch, ttft, tpot)
    _require(goal, weights, cache_dtype)
    fields = _stored(model, weights)
    if weights == "stored" and fields is None:
        raise InputError(
            f"{model} has no quantization_config: nothing of it is stored in fewer bits; leave --weights out"
        )
    summary = summarize(_model(model, dtype))
    stored = None if fields is None else StoredFormat.released(summary.dtype, fields)
    choice = search(summary, cluster, workload, goal=goal, stored=stored, cache_dtype=cache_dtype)
    if as_json:
        data = as_data(choice, cluster, summary, most=top, stored=stored, cache_dtype=cache_dtype)
        print(json.dumps(data, indent=1))
    else:
        _print_choice(choice, Pricer(summary, cluster, stored=stored, cache_dtype=cache_dtype), top)
    if not choice.ranked:
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
    cluster, workload = Cluster.parse(gpus), Workload(prompt, new, batch)
    _require("throughput", weights, cache_dtype)
    formats = [_stored(name, weights) for name in models]
    if weights == "stored" and not any(formats):
        raise InputError(
            f"{', '.join(models)}: no quantization_config, so nothing is stored in fewer bits; leave --weights out"
        )
    told = [
        _fit(name, dtype, cluster, workload, weights_only, fields, cache_dtype)
        for name, fields in zip(models, formats, strict=True)
    ]
    if as_json:
        print(json.dumps(told, indent=1))
    else:
        kind = cluster.weakest
        title = f"{cluster.name}: {cluster.size} x {kind.name}, {kind.usable_bytes / (1 << 30):.0f} GiB usable each"
        print_table(title, _weights_table(told, cluster) if weights_only else _fit_table(told))
        for each in told:
            if each.get("why"):
                say(f"{each['model']}: {each['why']}")
    if not all(each["fits"] for each in told):
        raise typer.Exit(1)


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
    if action not in ("show", "detect", "import") or (action != "detect") != (what is not None):
        raise InputError("write partitioner cluster show 8xH100, cluster detect, or cluster import FILE")
    if action != "import" and (device is not None or hosts is not None or topology):
        raise InputError(f"--device, --hosts and --topology are for cluster import; cluster {action} takes none")
    if action == "import":
        found = import_cluster(Path(str(what)), device=device, hosts=hosts, topology=topology)
    else:
        found = Cluster.parse(what) if what is not None else detect()
    text = found.to_yaml()
    if out is not None:
        Path(out).write_text(text, encoding="utf-8")
    Console().print(text, markup=False, highlight=False, soft_wrap=True)


def _model(name: str, dtype: str | None) -> Any:
    kind: torch.dtype | None = None if dtype in (None, "auto") else dtype_named(str(dtype))
    name = fetched(name)
    if can_open(name):
        return open_checkpoint(name, dtype=kind, mapped=False).model
    return load_model(name, dtype=kind, meta=True)


def _require(goal: str, weights: str, cache_dtype: str | None) -> None:
    """Before a model is traced, which takes a minute."""
    if goal not in GOALS:
        raise InputError(f"--for is one of {', '.join(GOALS)}; got {goal!r}")
    if weights not in WEIGHTS:
        raise InputError(f"--weights is one of {', '.join(WEIGHTS)}; got {weights!r}")
    require_dtype(cache_dtype)


def _stored(name: str, weights: str) -> Mapping[str, Any] | None:
    """The quantization_config of what ranks hold as stored; None: they hold it expanded, or it has none."""
    return None if weights == "expanded" else quantization_fields(load_config(fetched(name)).to_dict())


def _fit(
    name: str,
    dtype: str | None,
    cluster: Cluster,
    workload: Workload,
    weights_only: bool,
    stored: Mapping[str, Any] | None,
    cache_dtype: str | None,
) -> dict[str, Any]:
    model = _model(name, dtype)
    kind = cluster.weakest
    own = {id(p): p.numel() * p.element_size() for p in model.parameters()}
    num_bytes = sum(own.values())
    halved = sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
    told: dict[str, Any] = {
        "model": Path(name.removeprefix("config:")).stem or name,
        "weight_bytes": num_bytes,
        "cards_for_weights": cards_for_weights(num_bytes, kind.usable_bytes),
        "cards_for_weights_of_one_byte": cards_for_weights(halved, kind.usable_bytes),
        "usable_bytes_of_a_card": kind.usable_bytes,
    }
    released = quantization_fields(load_config(fetched(name)).to_dict())
    if released is not None:
        told["released_bytes"] = round(released_bytes(model, released))
        told["cards_as_released"] = cards_for_weights(told["released_bytes"], kind.usable_bytes)
        told["fits_as_released"] = told["cards_as_released"] <= cluster.size
    if weights_only:
        fits = told["cards_for_weights"] <= cluster.size
        return {**told, "fits": fits if stored is None else told["fits_as_released"]}
    summary = summarize(model)
    held = None if stored is None else StoredFormat.released(summary.dtype, stored)
    kept: dict[str, Any] = {"stored": held, "cache_dtype": cache_dtype}
    pricer = Pricer(summary, cluster, **kept)
    choice = search(summary, cluster, workload, goal="throughput", frontier=False, **kept)
    cache = sum(pricer.memory(each.plan, workload, each.layers).cache for each in choice.ranked[:1])
    if not choice.ranked:
        least = min((r for r in choice.refused if r.memory.total), key=lambda r: r.memory.total, default=None)
        return {**told, "fits": False, "why": f"closest: {least.plan}, {least.refused}" if least else "no plan"}
    fewest = min(choice.ranked, key=lambda each: (each.plan.mesh.world_size, each.latency_s))
    return {
        **told,
        "fits": True,
        "devices": fewest.plan.mesh.world_size,
        "plan": str(fewest.plan),
        "bytes_of_the_fullest": fewest.memory.total,
        "weights": fewest.memory.weights,
        "cache": fewest.memory.cache,
        "activations": fewest.memory.activations,
        "cache_of_best": cache,
    }


def _weights_table(told: list[dict[str, Any]], cluster: Cluster) -> Table:
    """Of the weights alone: in the model's dtype, and as they were released."""
    table = Table()
    table.add_column("model")
    for heading in ("weights", "cards", "fits", "as released", "cards", "fits"):
        table.add_column(heading, justify="right")
    for each in told:
        cards = each["cards_for_weights"]
        released = "cards_as_released" in each
        table.add_row(
            each["model"], f"{each['weight_bytes'] / 1e9:.1f} GB", str(cards), _yes(cards <= cluster.size),
            *_released(each), _yes(each["fits_as_released"]) if released else "",
        )  # fmt: skip
    return table


def _yes(fits: bool) -> str:
    return "yes" if fits else "no"


def _fit_table(told: list[dict[str, Any]]) -> Table:
    table = Table()
    told_of_released = any("released_bytes" in each for each in told)
    for heading in (
        "model",
        "weights",
        "cards for weights",
        "of one byte each",
        *(("as released", "cards as released") if told_of_released else ()),
        "fits",
        "fewest cards",
        "plan",
        "fullest",
    ):
        table.add_column(heading, justify="left" if heading in ("model", "plan") else "right")
    for each in told:
        fullest = f"{each['bytes_of_the_fullest'] / 1e9:.1f} GB" if "bytes_of_the_fullest" in each else ""
        table.add_row(
            each["model"], f"{each['weight_bytes'] / 1e9:.1f} GB", str(each["cards_for_weights"]),
            str(each["cards_for_weights_of_one_byte"]), *(_released(each) if told_of_released else ()),
            _yes(each["fits"]), str(each.get("devices", "")),
            each.get("plan", ""), fullest,
        )  # fmt: skip
    return table


def _released(each: dict[str, Any]) -> tuple[str, str]:
    if "released_bytes" not in each:
        return "", ""
    return f"{each['released_bytes'] / 1e9:.1f} GB", str(each["cards_as_released"])


def _print_choice(choice: Choice, pricer: Pricer, top: int) -> None:
    cluster, summary = pricer.cluster, pricer.summary
    if choice.ranked:
        table = Table()
        for heading in ("plan", "cards", "memory", "ttft", "tpot", "tokens/s", "per card", "binds"):
            table.add_column(heading, justify="left" if heading in ("plan", "binds") else "right")
        for each in choice.ranked[:top]:
            table.add_row(*_row(each))
        print_table(f"{summary.name} on {cluster.name}, for {choice.goal}", table)
        for each in choice.ranked[:top]:
            if limits := "; ".join(text for text in (*broken_limits(each), each.note) if text):
                say(f"{each.plan} breaks a limit: {limits}" if broken_limits(each) else f"{each.plan}: {limits}")
        best = choice.ranked[: min(3, top)]
        for each in best:
            say(f"{each.plan}: {reason(each, cluster, summary, num_bytes=pricer.num_bytes)}")
        for each in best:
            ttft, tpot = _with_bar(each.ttft_s, "ttft"), _with_bar(each.tpot_s, "tpot")
            say(f"{each.plan} for one batch: ttft {ttft}, tpot {tpot}")
        for each in best:
            say(served_text(pricer, each))
        for each in best:
            say(f"{each.plan} holds {held_text(pricer, each.plan)}")
    for each in choice.refused[: 3 if choice.ranked else top]:
        say(f"refused {each.plan}: {each.refused}")
    if choice.contexts:
        longest = choice.contexts[0]
        say(f"longest prompt: {longest[1]} tokens, by {longest[0]}")
    if choice.frontier:
        points = ", ".join(f"{p.tokens_per_s:.0f} tok/s at {p.tpot_s * 1e3:.1f} ms ({p.plan}, batch {p.workload.batch})"
                           for p in choice.frontier[:8] if p.workload is not None)  # fmt: skip
        say(f"frontier: {points}")
    own = summary.dtype if pricer.stored is None else pricer.stored.table
    kinds = {"linear": own, "prefill": summary.dtype, "decode": summary.dtype, "experts": own}
    tables = {kind: pricer.kernels.measured(kind, dtype) for kind, dtype in kinds.items()}
    if summary.experts is None:
        del tables["experts"]
    say(sureness(cluster, summary, tables=tables))


def _with_bar(seconds: float, what: str) -> str:
    bar = interval(seconds, what)
    said = f"{seconds * 1e3:.1f} ms"
    return said if bar is None else f"{said} ({bar[0] * 1e3:.1f}..{bar[1] * 1e3:.1f})"


def _row(price: Price) -> list[str]:
    cards = price.plan.mesh.world_size
    return [
        str(price.plan), str(cards), f"{price.memory.total / 1e9:.1f} GB", f"{price.ttft_s * 1e3:.1f} ms",
        f"{price.tpot_s * 1e3:.1f} ms", f"{price.tokens_per_s:.0f}", f"{price.tokens_per_s / cards:.1f}",
        price.decode.binds if price.decode is not None else "",
    ]  # fmt: skip
