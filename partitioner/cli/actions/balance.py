"""`partitioner balance`: where the tokens of a text go, and a plan whose ranks have about as much of them each.

    measured(case, timeout_s=60)        by layer the tokens of each expert [E], over one process per rank
    balanced(plan, counts, extra=4)     the plan with owners of experts (`partitioner.program.balance`), and the gain

The owners are the same in every layer, so they are balanced by the layers' sums. The gain is that of each layer, in
which all wait for the rank with the largest load.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from partitioner.cli.jobs.balance import PASS, TextCase, options_of
from partitioner.errors import InputError
from partitioner.program.balance import balance, deal, imbalance
from partitioner.program.plan import Plan
from partitioner.serving.text.tokenizer import load_tokenizer
from runtime.processes.launch import launch
from runtime.processes.place import Place

__all__ = ["balanced", "measured", "tokens_of"]

Counts = Mapping[str, Sequence[int]]


def tokens_of(model: str, text: str) -> tuple[int, ...]:
    """Of a text, by the tokenizer of the folder `model`."""
    tokenizer, _ = load_tokenizer(model)
    found = tuple(tokenizer(text)["input_ids"])
    if not found:
        raise InputError(f"there are no tokens in the text, by the tokenizer of {model}")
    return found


def measured(case: TextCase, *, timeout_s: float) -> dict[str, list[int]]:
    """Ranks that share out an expert's matrices all count its tokens: of the numbers only the ratios count."""
    answers = launch(
        ["partitioner.cli.ranks.balance_rank"],
        num_ranks=case.plan.mesh.world_size,
        timeout_s=timeout_s,
        given=case.to_json().encode(),
        name=Place(case.plan.replica_mesh, 0, 0, case.plan.replicas).name_of_all,
    )
    total: dict[str, Counter[int]] = {}
    sizes: dict[str, int] = {}
    for answer in answers:
        for path, counts in json.loads(answer).items():
            sizes[path] = len(counts)
            total.setdefault(path, Counter()).update(dict(enumerate(counts)))
    if not total:
        raise InputError(f"no routed experts were captured of {case.model!r}: there is nothing to balance")
    if len(set(sizes.values())) > 1:
        raise InputError(f"the layers have {sorted(set(sizes.values()))} experts, and owners are those of every layer")
    return {path: [counts[expert] for expert in range(sizes[path])] for path, counts in total.items()}


def balanced(plan: Plan, counts: Counts, *, extra: int) -> tuple[Plan, str]:
    """`plan` with the owners that `counts` and `extra` copies give, its other options as they are; and the gain."""
    num_experts = len(next(iter(counts.values())))
    options, others = options_of(plan)
    before = options.get("owners") or deal(num_experts, plan.ep)
    extra = max(extra, plan.ep - num_experts)  # every rank has something to do
    owners = balance([sum(layer) for layer in zip(*counts.values(), strict=True)], plan.ep, extra)
    now, then = ([imbalance(layer, of) for layer in counts.values()] for of in (before, owners))
    said = (
        f"{len(counts)} layers of {num_experts} experts on {plan.ep} ranks, largest load over the mean: "
        f"{statistics.fmean(now):.3f} before (at most {max(now):.3f}), {statistics.fmean(then):.3f} after (at most "
        f"{max(then):.3f})"
    )
    if statistics.fmean(then) >= statistics.fmean(now):
        return plan, f"{said}: no gain, the plan is as it was"
    return replace(plan, passes=(*others, (PASS, {**options, "owners": owners}))), said
