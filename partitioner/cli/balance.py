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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from partitioner.cli.common.command import command
from partitioner.cli.common.options import Compile, Device, Dtype, Job, Model, Timeout
from partitioner.errors import InputError
from partitioner.program.balance import balance, deal, imbalance
from partitioner.program.plan import Plan
from partitioner.serving.text.tokenizer import load_tokenizer
from runtime.processes.choose_device import choose_device
from runtime.processes.launch import launch, require_timeout
from runtime.processes.place import Place

__all__ = ["TextCase", "balanced", "measured", "register", "text_tokens"]

PASS = "expert-parallel"
"""The pass whose option `owners` is."""
Counts = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class TextCase(Job):
    """tokens: of the text, which is run in pieces of `length`. dtype: None for that of the weights."""

    tokens: tuple[int, ...] = ()
    length: int = 512
    dtype: str | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.plan.ep < 2:
            raise InputError("experts are balanced over the ranks of ep, of which there is one: give --ep, at least 2")
        if self.length < 1:
            raise InputError(f"--length must be at least 1, got {self.length}")
        if "capacity" in _options(self.plan)[0]:
            raise InputError(
                f"{PASS}.capacity leaves out what full experts refuse, so that the hottest ones would not be counted: "
                "measure without it, and add it to the plan that is printed"
            )
        self.placed  # noqa: B018 - checks the device

    @property
    def placed(self) -> torch.device:
        return choose_device(self.device, num_ranks=self.plan.mesh.world_size)

    @property
    def pieces(self) -> list[list[int]]:
        return [list(self.tokens[at : at + self.length]) for at in range(0, len(self.tokens), self.length)]


def text_tokens(model: str, text: str) -> tuple[int, ...]:
    """Of the file `text`, by the tokenizer of the folder `model`."""
    if not Path(model).is_dir():
        raise InputError(f"{model!r} is not a folder: give a checkpoint folder with its tokenizer")
    try:
        written = Path(text).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the text {text}: {error}") from error
    tokenizer, _ = load_tokenizer(model)
    found = tuple(tokenizer(written)["input_ids"])
    if not found:
        raise InputError(f"there are no tokens in the text {text}")
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
    options, others = _options(plan)
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


def _options(plan: Plan) -> tuple[dict[str, Any], list[Any]]:
    """Those of the pass, and the plan's other passes."""
    options: dict[str, Any] = {}
    others: list[Any] = []
    for chosen in plan.passes:  # as a plan holds them that was read
        if isinstance(chosen, tuple) and chosen[0] == PASS:
            options = dict(chosen[1])
        elif chosen != PASS:
            others.append(chosen)
    return options, others


def register(app: typer.Typer) -> None:
    """Adds the command."""
    command(app, "balance")(balance_command)


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
    require_timeout(timeout_s)
    if extra < 0:
        raise InputError(f"--extra must be at least 0, got {extra}")
    if out is not None and (Path(out).is_dir() or not Path(out).resolve().parent.is_dir()):
        raise InputError(f"--out {out}: give a file in a folder that exists")
    case = TextCase(model, how, text_tokens(model, text), length, dtype, device)
    plan, said = balanced(case.plan, measured(case, timeout_s=timeout_s), extra=extra)
    Console(stderr=True).print(f"{len(case.tokens)} tokens: {said}", markup=False, highlight=False, soft_wrap=True)
    print(plan)
    if out is not None:
        Path(out).write_text(f"{plan}\n", encoding="utf-8")
