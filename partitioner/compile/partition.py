"""partition(model, plan): capture, analyse, rewrite, check, emit; in that order and in one direction.

capture        the model becomes one Program
canonicalize   spellings made one
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
from partitioner.analysis.tokens.step_equivalence import why_steps_differ
from partitioner.analysis.tokens.token_mixing import why_rows_mix, why_tokens_mix
from partitioner.analysis.tokens.tokens_as_rows import why_not_as_rows, why_rows_meet
from partitioner.capture import states_found_once
from partitioner.capture.inputs.explicit_positions import explicit_positions
from partitioner.compile.emit import Emitter
from partitioner.compile.input_bounds import bound_inputs
from partitioner.compile.parts import Parts
from partitioner.compile.pass_manager.choose_passes import choose
from partitioner.compile.pass_manager.pass_order import check_plan, passes_of, splitting
from partitioner.compile.pass_manager.run_passes import run_passes
from partitioner.compile.tracing.probe_decode import compare_steps, is_another_text
from partitioner.compile.tracing.trace import trace, trace_piece, trace_step
from partitioner.errors import CaptureError, LayoutError, PlanError
from partitioner.program.model_record import ModelRecord
from partitioner.program.pause_collector import collector_paused
from partitioner.program.plan import Plan
from partitioner.program.program import Origins, Program, Value
from partitioner.program.progress import timed
from partitioner.program.stages import StageTable
from partitioner.proof.layouts import check_entries
from partitioner.proof.recurrences import why_pieces_differ
from partitioner.proof.rows import check_rows
from partitioner.proof.schedules import prove_stages
from partitioner.storage.bundle.bundle import load
from partitioner.storage.bundle.reshard_model import open_bundle
from partitioner.storage.checkpoint.open_checkpoint import open_checkpoint
from partitioner.storage.recognise import is_bundle
from runtime.kv_cache.device_memory import free_bytes
from runtime.program.host_default import host_default
from runtime.weights.read_ahead import read_ahead as begin_reading

__all__ = ["compile_program", "compile_steps", "partition", "trace", "trace_piece", "trace_step"]


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
    split = _split(traced, plan, "text")
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
        generation=functools.partial(_compile_generation, traced, split, plan, step, piece),
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


def _compile_generation(
    traced: Program,
    split: Program,
    plan: Plan,
    step: Callable[[], Program] | None,
    piece: Callable[[], Program] | None,
) -> tuple[Program, Program]:
    """Two programs that continue sequences, with a cache and logits of last tokens only: for prompts, and for single
    tokens; one and the same where the plan asks the same of both.

    They read the weights as the program for whole texts does, and share them. Where the model's tokens depend on each
    other by more than causal attention, it is the model's own use of a cache. Raises `PlanError` where that cannot be
    had either.
    """
    with timed("programs with a cache"), states_found_once():
        return _with_a_cache(traced, split, plan, step, piece)


def _with_a_cache(
    traced: Program,
    split: Program,
    plan: Plan,
    step: Callable[[], Program] | None,
    piece: Callable[[], Program] | None,
) -> tuple[Program, Program]:
    if not traced.has_head:
        raise PlanError(f"{traced.name} cannot generate: it has no head, so that its result is no logits")
    continuing = explicit_positions(traced)
    reason = _BY_STEPS if traced.tokens_as_rows else why_tokens_mix(continuing) or why_rows_mix(continuing)
    if reason is None:
        if continuing is not traced:  # another graph than that of the whole text
            bound_inputs(continuing)
            prefill, decode = _entries(continuing, plan, stages=split.stages)
        else:
            prefill, decode = _entries(traced, plan, text=split, stages=split.stages)
        for program in {id(each): each for each in (prefill, decode)}.values():
            check_rows(program)
        return prefill, decode
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
    note = None if traced.tokens_as_rows else compare_steps(traced, run_passes(stepping.copy(), [choose("kv-cache")]))
    prefill, decode = compile_steps(stepping, plan, stages=split.stages, piece=piece, whole=lambda: traced)
    for program in {id(each): each for each in (prefill, decode)}.values():
        program.notes += [note] if note is not None and _BY_PIECES not in program.notes else []
    return prefill, decode


@host_default
def compile_steps(
    stepping: Program,
    plan: Plan,
    *,
    stages: StageTable | None = None,
    piece: Callable[[], Program] | None = None,
    whole: Callable[[], Program | None] | None = None,
) -> tuple[Program, Program]:
    """What `trace_step` yields, for `plan`: for prompts, and for single tokens; cut as the whole text's program is.

    Where it takes one token at a time, prompts run by what `piece` yields, if it is proven to do the same; otherwise
    their tokens are rows of a batch of it, or run one after the other, and a note says why. Where the model's code for
    single tokens is another than for several, and that for several, however a text is cut, says what `whole` says of
    it, single tokens run by that too.
    """
    if all(state.per_token for state in stepping.states.values()):
        return _entries(stepping, plan, stages=stages)
    try:
        prefill, decode = _for_pieces(stepping, plan, stages, piece, whole)
    except (CaptureError, LayoutError, PlanError) as reason:
        prefill, decode = _entries(stepping, plan, stages=stages)
        why = why_rows_meet(stepping) or why_not_as_rows(prefill)
        note = f"prompts run token by token: {reason}; and not as rows of a batch: {why}"
        if why is None:
            prefill = _as_rows(prefill)
            note = f"prompts run by the model's code for single tokens, which are rows of a batch: {reason}"
        if why is not None or piece is not None:
            for program in {id(each): each for each in (prefill, decode)}.values():
                program.notes += [note]
    return prefill, decode


def _as_rows(step: Program) -> Program:
    """A program for one token, for several at once: they are rows of its batch."""
    found = step.copy()
    batch = found.symbols["batch"]
    found.add_input("last", Value((batch,), torch.int64), "required")
    found.limits = {**found.limits, "sequence": (1, None)}
    found.tokens_as_rows = True
    return found


_BY_STEPS = "its code for whole texts is traced for some lengths only"
_BY_PIECES = (
    "single tokens run by the model's code for several, as prompts and whole texts do: its code for single tokens "
    "computes something else"
)


def _for_pieces(
    stepping: Program,
    plan: Plan,
    stages: StageTable | None,
    piece: Callable[[], Program] | None,
    whole: Callable[[], Program | None] | None,
) -> tuple[Program, Program]:
    if piece is None:
        raise CaptureError("what the model remembers is a state that each token changes")
    pieces = piece()
    reason = why_pieces_differ(pieces, stepping)
    if reason is not None and (whole is None or not _are_its_texts(pieces, whole())):
        raise CaptureError(reason)
    prefill, one_by_pieces = _entries(pieces, plan, stages=stages)
    note = None if reason is None else _BY_PIECES
    if note is None:
        _, decode = _entries(stepping, plan, stages=stages)
        try:
            check_entries(prefill, decode)
        except LayoutError:  # the two codes can be divided among so many ranks, but not alike
            note = "single tokens run by the model's code for several, which divides its weights and states otherwise"
        else:
            return prefill, decode
    for program in {id(each): each for each in (prefill, one_by_pieces)}.values():
        program.notes += [note]
    return prefill, one_by_pieces


def _are_its_texts(pieces: Program, whole: Program | None) -> bool:
    """Whether pieces of any lengths, single tokens among them, are one recurrence, and do not differ from `whole`."""
    least, _ = pieces.limits.get("sequence", (1, None))
    if whole is None or least > 1 or why_pieces_differ(pieces, pieces) is not None:
        return False
    return not is_another_text(whole, run_passes(pieces.copy(), [choose("kv-cache")]))


def _split(traced: Program, plan: Plan, entry: str, stages: StageTable | None = None) -> Program:
    """With its weights divided, as the plan has it for this entry."""
    found = run_passes(traced.copy(plan.replica_mesh), splitting(traced, plan, entry))
    found.stages = stages
    found.keeps_stored = plan.weights == "stored"
    return found


def _entries(
    traced: Program,
    plan: Plan,
    *,
    text: Program | None = None,
    stages: StageTable | None = None,
    one_batch: bool = False,
) -> tuple[Program, Program]:
    """For prompts, and for single tokens. `text`: what `traced` was split to for whole texts; `stages`: how that is
    cut. one_batch: as `passes_of` has it.
    """
    for_text, for_prefill, for_decode = (splitting(traced, plan, entry) for entry in ("text", "prefill", "decode"))
    prefill, decode = (passes_of(plan, entry, one_batch=one_batch) for entry in ("prefill", "decode"))
    split = text if text is not None and for_text == for_prefill else _split(traced, plan, "prefill", stages)
    for_prompts = run_passes(split.copy(), prefill)
    prove_stages(for_prompts)
    if (for_decode, decode) == (for_prefill, prefill):
        return for_prompts, for_prompts
    if for_decode != for_prefill:
        split = text if text is not None and for_text == for_decode else _split(traced, plan, "decode", stages)
    for_tokens = run_passes(split.copy(), decode)
    prove_stages(for_tokens)
    if for_prompts.batch_axes != for_tokens.batch_axes:  # something in one of them needs all sequences
        notes = [*for_prompts.notes, *for_tokens.notes]
        for_prompts, for_tokens = _entries(traced, plan, text=text, stages=stages, one_batch=True)
        why = [note for note in notes if "cannot have sequences of their own" in note]
        for program in {id(each): each for each in (for_prompts, for_tokens)}.values():
            program.notes += why
    check_entries(for_prompts, for_tokens)
    return for_prompts, for_tokens
