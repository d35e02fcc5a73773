"""The passes of a plan, in execution order: one literal list, with the condition of each beside it.

    text       whole texts at once
    prefill    the tokens of prompts, behind what is in the cache
    decode     one token per sequence

Each of these entries is a program of its own; where a plan asks the same of two, they share one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from partitioner.compile.pass_manager.choose_passes import Chosen, choose, wanted
from partitioner.compile.weight_globs import select
from partitioner.errors import PlanError
from partitioner.program.plan import Plan
from partitioner.sharding.mesh import AXES

if TYPE_CHECKING:  # a plan is checked without torch
    from partitioner.program.program import Program

__all__ = ["ORDER", "BuiltIn", "check_plan", "passes_of", "splitting"]

TEXT, GENERATION = ("text",), ("prefill", "decode")
EVERYWHERE = (*TEXT, *GENERATION)
Reasons = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class BuiltIn:
    """A pass of ours. entries: where it runs. when: for which plans. splits: it divides weights, alike in all entries.

    by_entry: what else it does differs between entries, as its `for_entry` says.
    """

    name: str
    entries: tuple[str, ...]
    when: Callable[[Plan], bool]
    splits: bool = False
    by_entry: bool = False
    last: bool = False
    """After the user's own."""
    options: Callable[[Plan], dict[str, object]] = lambda plan: {}
    """Of the pass, that the plan gives as fields of its own."""


def _always(plan: Plan) -> bool:
    return True


def _has_experts(plan: Plan) -> bool:
    return plan.ep * plan.etp > 1


def why_one_batch(plan: Plan) -> str:
    """Why ranks of dp that share out experts do not have sequences of their own; "" where they do, as far as the
    model lets them.
    """
    if plan.replica_mesh.size("dp") == 1:
        return "no experts are shared out over dp"
    if _options_of(plan, "expert-parallel").get("exchange") == "replicate":
        return "exchange=replicate is for tokens that all ranks have"
    views = [plan.replica_mesh.in_attention_view(axis) for axis in ("ep", "etp")]
    if not {axis for axes in views for axis in axes} <= {*AXES, *(a for a in ("ep", "etp") if plan.degree(a) == 1)}:
        return "the experts' groups of ranks go across those of attention"
    if "sequence-parallel" in _named(plan):
        return "sequence-parallel shares out the tokens of one batch"
    return ""


def _options_of(plan: Plan, name: str) -> dict[str, object]:
    """What the plan says of a pass."""
    found = [chosen.step for chosen in wanted(plan) if chosen.step.name == name]
    return {field.name: getattr(found[0], field.name) for field in fields(found[0])} if found else {}  # type: ignore[arg-type]


def _named(plan: Plan) -> set[str]:
    """The passes that the plan names."""
    return {
        each if isinstance(each, str) else each[0] if isinstance(each, tuple) else each.name for each in plan.passes
    }


ORDER = (
    BuiltIn("expert-parallel", EVERYWHERE, _has_experts, splits=True, by_entry=True),
    BuiltIn("tensor-parallel", EVERYWHERE, lambda plan: plan.tp > 1 or _has_experts(plan), splits=True),
    BuiltIn(
        "data-parallel",
        ("prefill",),
        lambda plan: not why_one_batch(plan),
        options=lambda plan: {} if plan.sp == 1 else {"gathers": False},
    ),
    BuiltIn("data-parallel", ("decode",), lambda plan: not why_one_batch(plan), options=lambda plan: {"alike": True}),
    BuiltIn(
        "context-parallel",
        ("text", "prefill"),
        lambda plan: plan.sp > 1,
        options=lambda plan: {} if plan.sp_attention == "auto" else {"attention": plan.sp_attention},
    ),
    BuiltIn("sequence-parallel", ("text", "prefill"), lambda plan: "sequence-parallel" in _named(plan)),
    BuiltIn(
        "kv-cache",
        GENERATION,
        _always,
        options=lambda plan: {} if plan.cache == "auto" else {"cache": plan.cache},
    ),
    BuiltIn("last-token", GENERATION, _always),
    BuiltIn("fuse", EVERYWHERE, _always),
    BuiltIn("overlap", ("text", "prefill"), lambda plan: plan.ep > 1 and plan.pp == 1),
    BuiltIn("overlap", ("decode",), lambda plan: plan.ep > 1 and plan.pp == 1, options=lambda plan: {"gathers": False}),
    # then the user's own, in the plan's order
    BuiltIn("pipeline", EVERYWHERE, lambda plan: plan.pp > 1, last=True),
)


def check_plan(plan: object) -> Plan:
    """The plan, if it is one and passes serve all that it asks for; before the trace, which takes longer."""
    if not isinstance(plan, Plan):
        raise PlanError(f"the plan must be a Plan, such as Plan(tp=2); got {plan!r}")
    wanted(plan)
    return plan


def splitting(traced: Program, plan: Plan, entry: str) -> list[Chosen]:
    """The passes that divide the weights, alike in all entries of one plan."""
    keep = select(traced, plan.keep_whole)  # what matches nothing is refused on one rank too
    found = list(_built_in(plan, (each for each in ORDER if each.splits), keep))
    varied = {each.name for each in ORDER if each.by_entry}
    for i, chosen in enumerate(found):
        if chosen.step.name in varied:
            step: Any = chosen.step
            found[i] = replace(chosen, step=step.for_entry(entry, replace(traced, mesh=plan.replica_mesh)))
    return found


def passes_of(plan: Plan, entry: str, *, one_batch: bool = False) -> list[Chosen]:
    """Those that come after `splitting`, for one entry. one_batch: ranks of dp get no sequences of their own."""
    names = {each.name for each in ORDER}
    own = [chosen for chosen in wanted(plan) if chosen.step.name not in names]
    left_out = {"data-parallel"} if one_batch else set()
    here = [each for each in ORDER if not each.splits and entry in each.entries and each.name not in left_out]
    before, after = ([each for each in here if each.last is last] for last in (False, True))
    return [*_built_in(plan, before), *own, *_built_in(plan, after)]


def _with_options(chosen: Chosen, options: dict[str, object]) -> Chosen:
    """A pass that the plan configures, with what its fields say as well. Raises `PlanError` where they contradict."""
    step: Any = chosen.step
    for field in fields(step):
        said = getattr(step, field.name)
        if field.name in options and said not in (field.default, options[field.name]):
            raise PlanError(
                f"the plan says {field.name}={options[field.name]} for the pass {step.name}, and "
                f"{step.name}.{field.name}={said}: give one of them"
            )
    return replace(chosen, step=replace(step, **options))


def _built_in(plan: Plan, built_in: Iterable[BuiltIn], keep: Reasons = ()) -> Iterable[Chosen]:
    """Each that the plan needs, as the plan configures it. keep: weights that none of them may split, with reasons."""
    configured = {chosen.step.name: chosen for chosen in wanted(plan)}
    for each in built_in:
        if not each.when(plan):
            continue
        options = each.options(plan)
        chosen = configured.get(each.name) or choose(each.name, **options)
        if each.name in configured and options:
            chosen = _with_options(chosen, options)
        if keep:
            step: Any = chosen.step  # every pass that splits has the field
            chosen = replace(chosen, step=replace(step, keep_whole=(*step.keep_whole, *keep)))
        yield chosen
