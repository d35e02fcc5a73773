"""A choice in words: the reason for a plan in a sentence, what binds, how sure, and JSON of all of it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from partitioner.planning.cluster import Cluster
from partitioner.planning.pricing.continuous import shared_steps
from partitioner.planning.pricing.own_steps import own_steps
from partitioner.planning.pricing.price import Pricer
from partitioner.planning.pricing.stored_format import StoredFormat
from partitioner.planning.quantities import Price
from partitioner.planning.search import Choice, broken_limits
from partitioner.planning.summary import Summary
from partitioner.program.plan import Plan

__all__ = ["as_data", "cards_for_weights", "held_text", "interval", "reason", "served_text", "sureness"]

RESIDUALS = Path(__file__).with_name("tables") / "residuals.json"


def reason(price: Price, cluster: Cluster, summary: Summary, *, num_bytes: int | None = None) -> str:
    """Why the plan is as it is, in a sentence with its numbers. num_bytes: of all weights, where they are stored."""
    plan, inside = price.plan, cluster.dimensions[0]
    usable, weights = price.memory.usable, num_bytes or summary.num_bytes
    said: list[str] = []
    if plan.tp > 1:
        spent = price.decode.by_collective.get("all_reduce", 0.0) / price.tpot_s if price.decode is not None else 0.0
        where = f"inside a host over {inside.name}" if plan.tp <= inside.size else f"across hosts of {inside.size}"
        said.append(f"tp={plan.tp} {where}, whose all-reduces are {spent:.0%} of a token")
    if plan.sp > 1:
        tokens = "" if price.workload is None else f" of {price.workload.prompt} tokens"
        said.append(f"sp={plan.sp} for prompts{tokens}, of which each rank has 1/{plan.sp}")
    if plan.pp > 1:
        too_much = price.memory.weights * plan.pp > price.memory.usable
        why = f"{weights / 1e9:.0f} GB of weights" if too_much else "fewer all-reduces"
        said.append(f"pp={plan.pp} for {why}, handing on {summary.hidden_bytes / 1e3:.0f} kB per token")
        if price.shares_head:
            said.append("its stages share out the vocabulary head")
    if plan.ep > 1:
        how = price.exchange or "replicate"
        count = summary.experts.count if summary.experts is not None else 0
        said.append(f"ep={plan.ep} for {count} experts ({how})")
    if plan.mesh.size("dp") > 1:
        together = ", each rank of it with requests of its own, in step with the others" if plan.ep > 1 else ""
        said.append(f"dp={plan.mesh.size('dp')} for more requests at a time{together}")
    idle = cluster.size - plan.mesh.world_size
    if idle:
        said.append(f"{idle} devices idle, since more ranks would talk more than they compute")
    if not said:
        said.append(f"one device, since {weights / 1e9:.1f} GB fit into {usable / 1e9:.1f} GB")
    return "; ".join(said)


def residuals() -> Mapping[str, Any]:
    return json.loads(RESIDUALS.read_text(encoding="utf-8")) if RESIDUALS.is_file() else {}


def interval(seconds: float, what: str) -> tuple[float, float] | None:
    """Between which 80% of measured times were, of those predicted so; what: "ttft" or "tpot"."""
    found = residuals().get("measured_over_predicted", {}).get(what)
    return None if found is None or math.isinf(seconds) else (seconds * found["10%"], seconds * found["90%"])


def sureness(cluster: Cluster, summary: Summary, *, tables: Mapping[str, bool]) -> str:
    """Which prices are from measured tables, and which are speed of light."""
    names = [name for name, known in tables.items() if known]
    missing = [name for name, known in tables.items() if not known]
    kind = cluster.weakest.name
    said = [
        f"kernels of {kind}: {', '.join(names)} from measured tables" if names else f"kernels of {kind}: none measured"
    ]
    if missing:
        said.append(f"{', '.join(missing)}: speed of light, times a fixed share")
    if own := own_steps(cluster.weakest.fitted):
        said.append(f"steps of up to {own.MOST_ROWS} rows in 16 bits: this product's own, as measured on {kind}: {own}")
    for dimension in cluster.dimensions:
        how = "NCCL tables of 2 to 8 GPUs" if dimension.fitted else "alpha and beta of its data sheet, not measured"
        said.append(f"{dimension.name}: {how}")
    found = residuals()
    said.append(f"{found['said']} the bounds in brackets" if found else "no bounds: nothing measured to compare with")
    return "; ".join(said + summary.notes)


def cards_for_weights(num_bytes: int, usable: int) -> int:
    """How many devices the weights alone need, if each could take as much as it has room for."""
    return -(-num_bytes // usable)


def held_text(pricer: Pricer, plan: Plan) -> str:
    """How weights and what is remembered of a token are kept, as the plan is priced."""
    stored, dtype = pricer.stored, pricer.summary.dtype
    weights = f"weights in {dtype}"
    if stored is not None:
        which = "experts' weights" if stored.experts_only else "weights of layers"
        weights = f"{which} as stored ({stored.name}, {stored.bits:g} bits each), others in {dtype}"
    kept = "one latent of each token" if pricer.keeps_latents(plan) else "keys and values of each token"
    size = pricer.cache_bytes(plan)
    return f"{weights}; {kept} in {pricer.cache_dtype or dtype}, {size / 1e3:.1f} kB a token on the fullest stage"


def served_text(pricer: Pricer, price: Price) -> str:
    """Times of requests that come as others end, with the interval in which 80% of measured ones were."""
    assert price.workload is not None
    served = shared_steps(pricer, price.plan, price.workload).served()
    said = []
    for what, seconds in (("ttft", served.ttft_s), ("tpot", served.tpot_s)):
        bar = interval(seconds, what)
        between = f" ({bar[0] * 1e3:.1f}..{bar[1] * 1e3:.1f})" if bar is not None else ""
        said.append(f"{what} {seconds * 1e3:.1f} ms{between}")
    waiting = price.workload.batch - served.running
    room = f", of {price.workload.batch} requests {waiting} wait for room in the cache" if waiting > 0 else ""
    return f"{price.plan} under steady load: {', '.join(said)}{room}"


def as_data(
    choice: Choice,
    cluster: Cluster,
    summary: Summary,
    *,
    most: int,
    stored: StoredFormat | None = None,
    cache_dtype: str | None = None,
) -> dict[str, Any]:
    pricer = Pricer(summary, cluster, stored=stored, cache_dtype=cache_dtype)
    return {
        "model": summary.name,
        "cluster": cluster.as_data(),
        "goal": choice.goal,
        "plans": [_price_data(each, pricer) for each in choice.ranked[:most]],
        "refused": [_price_data(each, pricer) for each in choice.refused[:most]],
        "frontier": [_price_data(each, pricer) for each in choice.frontier],
        "contexts": dict(choice.contexts[:most]),
    }


def _price_data(price: Price, pricer: Pricer) -> dict[str, Any]:
    memory = {name: getattr(price.memory, name) for name in ("weights", "cache", "activations", "buffers", "usable")}
    told: dict[str, Any] = {"plan": str(price.plan), "devices": price.plan.mesh.world_size, "memory_bytes": memory}
    if price.refused:
        return {**told, "refused": price.refused}
    assert price.prefill is not None
    assert price.decode is not None
    assert price.workload is not None
    parts = ("memory", "products", "links", "waiting")
    served = shared_steps(pricer, price.plan, price.workload).served()
    return {
        **told,
        "batch": price.workload.batch,
        "ttft_s": price.ttft_s,
        "ttft_80": interval(price.ttft_s, "ttft"),
        "tpot_s": price.tpot_s,
        "tpot_80": interval(price.tpot_s, "tpot"),
        "tokens_per_s": price.tokens_per_s,
        "under_steady_load": {
            "ttft_s": served.ttft_s,
            "ttft_80": interval(served.ttft_s, "ttft"),
            "tpot_s": served.tpot_s,
            "tpot_80": interval(served.tpot_s, "tpot"),
            "running": served.running,
        },
        "prefill_s": {name: getattr(price.prefill, name) for name in parts},
        "decode_s": {name: getattr(price.decode, name) for name in parts},
        "collectives_of_a_token_s": price.decode.by_collective,
        "binds": price.decode.binds,
        "layers": list(price.layers),
        "shares_head": price.shares_head,
        "reason": reason(price, pricer.cluster, pricer.summary, num_bytes=pricer.num_bytes),
        "holds": held_text(pricer, price.plan),
        "limits_broken": broken_limits(price),
        "note": price.note,
    }
