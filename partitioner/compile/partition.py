"""partition(model, plan): capture, analyse, rewrite, check, emit; in that order and in one direction.

capture        the model becomes one Program
canonicalize   equivalent ops become one
bound_inputs   which values the inputs may have
passes         those that the plan asks for, in the order in which they stand here, then the user's own
check          layouts inferred anew after every pass; that no pass mixes tokens of a model that has a cache
report         what was split, what was not and why
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from partitioner.analysis.report.report import Report, make_report
from partitioner.analysis.rules.recognise_attention import recognise_attention
from partitioner.analysis.tokens.token_mixing import why_rows_mix
from partitioner.analysis.tokens.tokens_as_rows import why_not_as_rows
from partitioner.compile.emit import Emitter
from partitioner.compile.generation import compile_generation, split_weights
from partitioner.compile.parts import Parts
from partitioner.compile.pass_manager.pass_order import check_plan, passes_of
from partitioner.compile.pass_manager.run_passes import run_passes
from partitioner.compile.tracing.trace import trace, trace_piece, trace_step
from partitioner.errors import CaptureError, PlanError
from partitioner.program.model_record import ModelRecord
from partitioner.program.pause_collector import collector_paused
from partitioner.program.plan import Plan
from partitioner.program.program import Origins, Program
from partitioner.program.progress import timed
from partitioner.proof.schedules import prove_stages
from partitioner.storage.bundle.bundle import load
from partitioner.storage.bundle.reshard_model import open_bundle
from partitioner.storage.checkpoint.open_checkpoint import open_checkpoint
from partitioner.storage.recognise import is_bundle
from runtime.kv_cache.device_memory import free_bytes
from runtime.program.host_default import host_default
from runtime.weights.read_ahead import read_ahead as begin_reading

__all__ = ["compile_program", "partition"]


@host_default
def partition(
    model: PreTrainedModel | str | Path,
    plan: Plan,
    *,
    dtype: torch.dtype | None = None,
    mapped: bool = False,
    read_ahead: bool = False,
    max_length: int | None = None,
    fixed_length: int | None = None,
) -> Parts[Report]:
    """Compiles a Hugging Face model for `plan`.

    - model: a model with weights or on the meta device, which is not changed; a checkpoint folder, whose model is built
      without weights, and from whose files each rank reads its own shard when it is loaded; or a bundle to reshard.
    - dtype: cast weights of a folder to this while reading. None: the checkpoint's.
    - mapped: on a CPU, memory-map the weights; the files must not change (`runtime.weights.read_shards`).
    - read_ahead: let the disk read while the model is traced; for ranks that are all on this machine.
    - max_length: the longest sequence that will be run, for position encodings that depend on it.
    - fixed_length: compile for this one length, for models whose code cannot be traced for all lengths at once.

    Raises `CaptureError` if the model cannot be traced, `PlanError` if the plan does not fit it.
    """
    check_plan(plan)
    origins: Origins | None = None
    notes: tuple[str, ...] = ()
    if isinstance(model, (str, Path)) and is_bundle(model):
        if dtype is not None:
            raise CaptureError(f"dtype={dtype}: {model} is a bundle, whose weights have been read and cast already")
        if read_ahead:
            raise CaptureError(f"read_ahead=True is for a checkpoint folder; {model} is a bundle: leave it out")
        bundle = open_bundle(load(model, mapped=mapped))
        model, origins = bundle.model, bundle.origins
        max_length = bundle.max_length if max_length is None else max_length
        fixed_length = bundle.fixed_length if fixed_length is None else fixed_length
    elif isinstance(model, (str, Path)):
        opened = open_checkpoint(model, dtype=dtype, mapped=mapped)
        model, origins, notes = opened.model, opened.origins, opened.notes
        if read_ahead:
            begin_reading(origins.files, free_bytes(torch.device("cpu")))
    elif dtype is not None:
        raise CaptureError(
            f"dtype={dtype} casts what is read from a checkpoint folder; this {type(model).__name__} has its weights: "
            "convert it by model.to(dtype)"
        )
    elif mapped or read_ahead:
        option = "mapped" if mapped else "read_ahead"
        raise CaptureError(
            f"{option}=True is for the files of a folder; this {type(model).__name__} has its weights: leave it out"
        )
    traced = _from(origins, trace(model, max_length=max_length, fixed_length=fixed_length))
    traced.notes = [*notes, *traced.notes]
    return compile_program(
        traced,
        plan,
        step=functools.partial(_step, model, origins, max_length),
        piece=functools.partial(_piece, model, origins, max_length),
        model=ModelRecord.of(model, max_length=max_length, fixed_length=fixed_length),
    )


def _step(model: PreTrainedModel, origins: Origins | None, max_length: int | None) -> Program:
    return _from(origins, trace_step(model, max_length=max_length))


def _piece(model: PreTrainedModel, origins: Origins | None, max_length: int | None) -> Program:
    return _from(origins, trace_piece(model, max_length=max_length))


def _from(origins: Origins | None, traced: Program) -> Program:
    """The same program, its weights to be read from a checkpoint, which must hold them."""
    traced.origins = origins
    for weight in traced.weights.values():
        if origins is not None and weight.source == "checkpoint":
            origins.find(weight.name, weight.aliases)
    return traced


@collector_paused()
@host_default
def compile_program(
    traced: Program,
    plan: Plan,
    *,
    step: Callable[[], Program] | None = None,
    piece: Callable[[], Program] | None = None,
    model: ModelRecord | None = None,
) -> Parts[Report]:
    """Compiles what `trace` yields, which is not changed.

    `step` yields what `trace_step` does: called when generation is first asked for, of a model whose tokens meet in
    more than attention; `piece` what `trace_piece` does, called where such a model remembers a state per sequence.
    `model`: what a bundle says of it.
    """
    check_plan(plan)
    traced = replace(traced, inferred={})  # rules may have changed since another compile of it
    if plan.sp > 1:  # only attention may look from one token at another
        candidate = traced.copy()
        traced = candidate if recognise_attention(candidate) else traced
    split = split_weights(traced, plan, "text")
    text = run_passes(split.copy(), passes_of(plan, "text"))
    if text.tokens_as_rows and (why := why_not_as_rows(text)) is not None:
        raise PlanError(f"{text.name} runs whole texts by its code for single tokens, and cannot with this plan: {why}")
    if text.stages is not None:
        text.stages = replace(text.stages, rows_apart=_rows_apart(traced))
    split.stages = text.stages
    with timed("proof of the stages"):
        prove_stages(text)
    return Parts(
        text,
        make_report(text, plan=repr(plan), replicas=plan.replicas, stored_per_rank=_stored_bytes(text)),
        traced=traced,
        generation=functools.partial(compile_generation, traced, split, plan, step, piece),
        plan=plan,
        model=model,
    )


def _stored_bytes(program: Program) -> tuple[int, ...]:
    """What each rank holds of weights, where it holds them as stored."""
    if not program.keeps_stored:
        return ()
    emitter, mesh = Emitter(program), program.mesh
    ranks = (emitter.rank(mesh.coordinates(rank)) for rank in range(mesh.world_size))
    return tuple(sum(weight.bytes for weight in rank.weights) for rank in ranks)


def _rows_apart(traced: Program) -> bool:
    """Whether a batch may be run in pieces, rows first in all that is given and in the result."""
    (result,) = traced.graph.output_node().all_input_nodes
    batch = traced.symbols.get("batch")
    shapes = [result.meta["val"].shape, *(given.value.shape for given in traced.inputs)]
    first = all(batch not in shape[1:] for shape in shapes) and shapes[0][:1] == (batch,)
    return first and why_rows_mix(traced) is None
