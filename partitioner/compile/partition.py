"""partition(model, plan): capture, analyse, rewrite, check; in that order and in one direction.

capture        the model becomes one Program
canonicalize   spellings made one
bound_inputs   which values the inputs may have
passes         those that the plan asks for, in the order in which they stand here, then the user's own
check          layouts inferred anew after every pass
report         what was split, what was not and why
"""

from __future__ import annotations

import difflib
import fnmatch
import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from partitioner.analysis.tokens.step_equivalence import why_steps_differ
from partitioner.analysis.tokens.token_mixing import why_rows_mix, why_tokens_mix
from partitioner.capture import capture, capture_step
from partitioner.capture.inputs.explicit_positions import explicit_positions
from partitioner.compile.canonicalize import canonicalize
from partitioner.compile.input_bounds import bound_inputs
from partitioner.compile.parts import Parts
from partitioner.compile.probe_decode import compare_steps
from partitioner.compile.run_passes import Chosen, choose, run_passes, wanted
from partitioner.errors import CaptureError, PlanError
from partitioner.program.model_record import ModelRecord
from partitioner.program.plan import Plan
from partitioner.program.program import Origins, Program
from partitioner.report.report import Report, make_report
from partitioner.sharding.mesh import Mesh
from partitioner.storage.bundle.bundle import load
from partitioner.storage.bundle.reshard_model import open_bundle
from partitioner.storage.checkpoint.open_checkpoint import open_checkpoint
from partitioner.storage.recognise import is_bundle

__all__ = ["compile_program", "compile_steps", "partition", "trace", "trace_step"]


def partition(
    model: PreTrainedModel | str | Path,
    plan: Plan,
    *,
    dtype: torch.dtype | None = None,
    mapped: bool = False,
    max_length: int | None = None,
    length: int | None = None,
) -> Parts[Report]:
    """Compiles a Hugging Face model for `plan`.

    The model may hold its weights or be on the meta device, and is not changed. A path is a checkpoint folder: its
    model is built without weights, and each rank reads its own shard from the files when it is loaded, cast to `dtype`
    (None: that of the checkpoint). Or it is a bundle, which is split anew in the same way. `mapped`: on a CPU, weights
    are used where they lie in the files, which must stay as they are (`runtime.weights.read_shards`). `max_length` is
    the longest sequence that will be run, for position encodings that depend on it; `length` compiles for that one
    length, for models whose code cannot be traced for all lengths at once.

    Raises `CaptureError` where the model cannot be traced, `PlanError` where the plan does not fit it.
    """
    _check_plan(plan)  # before the trace, which takes longer
    wanted(plan)
    origins: Origins | None = None
    notes: tuple[str, ...] = ()
    if isinstance(model, (str, Path)) and is_bundle(model):
        if dtype is not None:
            raise CaptureError(f"dtype={dtype}: {model} is a bundle, whose weights have been read and cast already")
        bundle = open_bundle(load(model, mapped=mapped))
        model, origins = bundle.model, bundle.origins
        max_length = bundle.max_length if max_length is None else max_length
        length = bundle.length if length is None else length
    elif isinstance(model, (str, Path)):
        opened = open_checkpoint(model, dtype=dtype, mapped=mapped)
        model, origins, notes = opened.model, opened.origins, opened.notes
    elif dtype is not None:
        raise CaptureError(
            f"dtype={dtype} casts what is read from a checkpoint folder; this {type(model).__name__} has its weights: "
            "convert it by model.to(dtype)"
        )
    elif mapped:
        raise CaptureError(
            f"mapped=True is for the files of a folder; this {type(model).__name__} has its weights: leave it out"
        )
    traced = _from(origins, trace(model, max_length=max_length, length=length))
    traced.notes = [*notes, *traced.notes]
    return compile_program(
        traced,
        plan,
        step=functools.partial(_step, model, origins, max_length),
        model=ModelRecord.of(model, max_length=max_length, length=length),
    )


def _step(model: PreTrainedModel, origins: Origins | None, max_length: int | None) -> Program:
    return _from(origins, trace_step(model, max_length=max_length))


def _from(origins: Origins | None, traced: Program) -> Program:
    """The same program, its weights to be read from a checkpoint, which must hold them."""
    traced.origins = origins
    for weight in traced.weights.values():
        if origins is not None and weight.source == "checkpoint":
            origins.find(weight.name, weight.aliases)
    return traced


def trace(model: PreTrainedModel, *, max_length: int | None = None, length: int | None = None) -> Program:
    """The model as one canonical program, before any pass; it can be compiled for several plans."""
    if not isinstance(model, PreTrainedModel):
        raise CaptureError(
            f"cannot capture a {type(model).__name__}: required is a model of transformers (a PreTrainedModel with its "
            "config), such as AutoModelForCausalLM.from_pretrained(...) yields" + _within(model)
        )
    for name, given in (("max_length", max_length), ("length", length)):
        if given is not None and (not isinstance(given, int) or isinstance(given, bool) or given < 1):
            raise CaptureError(f"{name} must be a whole number of tokens, at least 1; got {given!r}")
    traced = capture(model, mesh=Mesh.of(), max_length=max_length, length=length)
    canonicalize(traced)
    bound_inputs(traced)
    return traced


def _within(wrapper: object) -> str:
    """What a wrapper (compiled, parallel, with adapters) is wrapped around."""
    for path, module in wrapper.named_modules() if isinstance(wrapper, nn.Module) else ():
        if isinstance(module, PreTrainedModel):
            return f"; it is wrapped around one, a {type(module).__name__}: give that, its .{path}"
    return ""


def trace_step(model: PreTrainedModel, *, max_length: int | None = None) -> Program:
    """The model as one program that takes some tokens at a time, with what it remembers of those before as states."""
    traced = capture_step(model, mesh=Mesh.of(), max_length=max_length)
    canonicalize(traced)
    bound_inputs(traced)
    return traced


def compile_program(
    traced: Program, plan: Plan, *, step: Callable[[], Program] | None = None, model: ModelRecord | None = None
) -> Parts[Report]:
    """Compiles what `trace` yields, which is not changed.

    `step` yields what `trace_step` does: called when generation is first asked for, of a model whose tokens meet in
    more than attention. `model`: what a bundle says of it.
    """
    _check_plan(plan)
    split = run_passes(traced.copy(plan.mesh), _splitting(traced, plan))
    program = run_passes(split.copy(), [*_named("fuse"), *wanted(plan)])
    return Parts(
        program,
        make_report(program, plan=str(plan)),
        traced=traced,
        generation=functools.partial(_compile_generation, traced, split, plan, step),
        plan=plan,
        model=model,
    )


def _compile_generation(traced: Program, split: Program, plan: Plan, step: Callable[[], Program] | None) -> Program:
    """A program that continues sequences: with a cache, and logits of last tokens only.

    It reads the weights as the program for whole texts does, and shares them. Where the model's tokens depend on each
    other by more than causal attention, it is the model's own use of a cache. Raises `PlanError` where that cannot be
    had either.
    """
    if not traced.has_head:
        raise PlanError(f"{traced.name} cannot generate: it has no head, so that its result is no logits")
    continuing = explicit_positions(traced)
    reason = why_tokens_mix(continuing) or why_rows_mix(continuing)
    if reason is None:
        if continuing is not traced:  # another graph than that of the whole text
            bound_inputs(continuing)
            split = run_passes(continuing.copy(plan.mesh), _splitting(continuing, plan))
        return run_passes(split.copy(), [*_named("kv-cache", "last-token", "fuse"), *wanted(plan)])
    refusal = f"{traced.name} cannot generate with a cache: {reason}"
    if step is None:
        raise PlanError(refusal)
    try:
        stepping = step()
    except CaptureError as error:
        raise PlanError(f"{refusal}; and its own cache cannot be captured: {error}") from error
    reason = why_steps_differ(stepping)
    if reason is not None:
        raise PlanError(f"{refusal}; and with its own cache, {reason}")
    note = compare_steps(traced, run_passes(stepping.copy(), _named("kv-cache")))
    program = compile_steps(stepping, plan)
    program.notes += [note] if note is not None else []
    return program


def compile_steps(stepping: Program, plan: Plan) -> Program:
    """What `trace_step` yields, for `plan`."""
    passes = [*_splitting(stepping, plan), *_named("kv-cache", "last-token", "fuse"), *wanted(plan)]
    return run_passes(stepping.copy(plan.mesh), passes)


def _check_plan(plan: object) -> None:
    if not isinstance(plan, Plan):
        raise PlanError(f"the plan must be a Plan, such as Plan(tp=2); got {plan!r}")


def _splitting(traced: Program, plan: Plan) -> list[Chosen]:
    """The passes that divide the weights, which all programs of one plan have in common."""
    keep = _keep_whole(traced, plan.keep_whole)
    return [choose("tensor-parallel", keep_whole=keep)] if plan.tp > 1 else []


def _named(*names: str) -> list[Chosen]:
    return [choose(name) for name in names]


def _keep_whole(program: Program, globs: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """The weights that globs of names (or of modules, or of aliases) select, each with the glob as its reason."""
    found: dict[str, str] = {}
    for glob in globs:
        names = {w.name: (w.name, *w.aliases) for w in program.weights.values()}
        hits = [n for n, known in names.items() if any(_matches(name, glob) for name in known)]
        if not hits:
            known = {part for aliases in names.values() for name in aliases for part in _prefixes(name)}
            near = ", ".join(_near(glob, known)) or "nothing"
            raise PlanError(f"keep_whole={glob!r} matches no weight; near it: {near}")
        found.update(dict.fromkeys(hits, f"kept whole by the plan ({glob})"))
    return tuple(sorted(found.items()))


def _near(glob: str, names: set[str]) -> list[str]:
    """What may have been meant: the glob with another name in the place of the first that nothing matches."""
    parts = glob.split(".")
    for count in range(len(parts) - 1, 0, -1):
        begin = ".".join(parts[:count])
        end = None if parts[count - 1] == "*" else count + 1  # which may stand for several
        found = [name for name in names if _matches(name, begin)]
        deeper = {part for name in found for part in name.split(".")[count:end]}
        if hits := difflib.get_close_matches(parts[count], sorted(deeper), n=3, cutoff=0.4):
            return [".".join([begin, hit, *parts[count + 1 :]]) for hit in hits]
        if found and not deeper:
            return [begin]  # what follows is too much
        if found:
            break
    lowered = {name.lower(): name for name in sorted(names)}
    return [lowered[hit] for hit in difflib.get_close_matches(glob.lower(), lowered, n=3, cutoff=0.4)]


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _matches(name: str, glob: str) -> bool:
    return any(fnmatch.fnmatchcase(part, glob) for part in _prefixes(name))
