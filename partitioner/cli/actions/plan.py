"""What `partitioner plan` and `partitioner fit` do: plans for a model on a cluster, in tables or as JSON.

plan(model, cluster, workload, held, ...)     True where one fits
fit([model, ...], cluster, workload, ...)     True where all do
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from partitioner.cli.common.tables import print_table, say
from partitioner.errors import InputError
from partitioner.planning.cluster import Cluster
from partitioner.planning.explain import as_data, cards_for_weights, held_text, interval, reason, served_text, sureness
from partitioner.planning.pricing.price import Pricer
from partitioner.planning.pricing.stored_format import StoredFormat
from partitioner.planning.quantities import Price, Workload
from partitioner.planning.released import released_bytes
from partitioner.planning.search import Choice, broken_limits, search
from partitioner.planning.summary import summarize
from partitioner.storage.checkpoint.open_checkpoint import can_open, open_checkpoint
from partitioner.storage.checkpoint.quantized_tensors import quantization_fields
from partitioner.storage.dtypes import dtype_asked
from partitioner.storage.hub import fetched
from partitioner.storage.named_model import load_config, load_model

__all__ = ["Held", "fit", "plan"]


@dataclass(frozen=True)
class Held:
    """How ranks hold the model. dtype: None for its own. cache_dtype: as in `CacheSize`. stored: weights of a quantised
    checkpoint as in its files.
    """

    dtype: str | None = None
    cache_dtype: str | None = None
    stored: bool = False


def plan(model: str, cluster: Cluster, workload: Workload, held: Held, *, goal: str, top: int, as_json: bool) -> bool:
    """Prints the best `top` plans, and why others are refused."""
    fields = _stored(model) if held.stored else None
    if held.stored and fields is None:
        raise InputError(
            f"{model} has no quantization_config: nothing of it is stored in fewer bits; leave --weights out"
        )
    summary = summarize(_model(model, held.dtype))
    stored = None if fields is None else StoredFormat.released(summary.dtype, fields)
    kept: dict[str, Any] = {"stored": stored, "cache_dtype": held.cache_dtype}
    choice = search(summary, cluster, workload, goal=goal, **kept)
    if as_json:
        print(json.dumps(as_data(choice, cluster, summary, most=top, **kept), indent=1))
    else:
        _print_choice(choice, Pricer(summary, cluster, **kept), top)
    return bool(choice.ranked)


def fit(
    models: Sequence[str], cluster: Cluster, workload: Workload, held: Held, *, weights_only: bool, as_json: bool
) -> bool:
    """Prints of each whether it fits. weights_only: its weights alone, without tracing."""
    formats = [_stored(name) if held.stored else None for name in models]
    if held.stored and not any(formats):
        raise InputError(
            f"{', '.join(models)}: no quantization_config, so nothing is stored in fewer bits; leave --weights out"
        )
    told = [
        _fit(name, cluster, workload, held, fields, weights_only=weights_only)
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
    return all(each["fits"] for each in told)


def _model(name: str, dtype: str | None) -> Any:
    kind, name = dtype_asked(dtype), fetched(name)
    if can_open(name):
        return open_checkpoint(name, dtype=kind, mapped=False).model
    return load_model(name, dtype=kind, meta=True)


def _stored(name: str) -> Mapping[str, Any] | None:
    """Its quantization_config; None: it has none."""
    return quantization_fields(load_config(fetched(name)).to_dict())


def _fit(
    name: str,
    cluster: Cluster,
    workload: Workload,
    held: Held,
    stored: Mapping[str, Any] | None,
    *,
    weights_only: bool,
) -> dict[str, Any]:
    """stored: the quantization_config of what ranks hold as stored; None: they hold it expanded, or it has none."""
    model = _model(name, held.dtype)
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
    released = _stored(name)
    if released is not None:
        told["released_bytes"] = round(released_bytes(model, released))
        told["cards_as_released"] = cards_for_weights(told["released_bytes"], kind.usable_bytes)
        told["fits_as_released"] = told["cards_as_released"] <= cluster.size
    if weights_only:
        fits = told["cards_for_weights"] <= cluster.size
        return {**told, "fits": fits if stored is None else told["fits_as_released"]}
    summary = summarize(model)
    kept: dict[str, Any] = {
        "stored": None if stored is None else StoredFormat.released(summary.dtype, stored),
        "cache_dtype": held.cache_dtype,
    }
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
