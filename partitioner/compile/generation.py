"""Programs that continue sequences: for prompts, and for single tokens, with a cache and logits of last tokens only.

    attention alone mixes tokens      the graph for whole texts, whose attention reads a cache (`passes/kv_cache.py`)
    something else mixes them too     the model's own use of a cache, traced by steps: `step`
    .. and each token changes states  prompts by a trace of several tokens at a time (`piece`), if it is proven to do
                                      the same; else as rows of a batch, or token by token

Both are one program where the plan asks the same of them. Both share the weights of the program for whole texts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from partitioner.analysis.tokens.step_equivalence import why_steps_differ
from partitioner.analysis.tokens.token_mixing import why_rows_mix, why_tokens_mix
from partitioner.analysis.tokens.tokens_as_rows import why_not_as_rows, why_rows_meet
from partitioner.capture import states_found_once
from partitioner.capture.inputs.explicit_positions import explicit_positions
from partitioner.compile.pass_manager.choose_passes import choose
from partitioner.compile.pass_manager.pass_order import passes_of, splitting
from partitioner.compile.pass_manager.run_passes import run_passes
from partitioner.compile.tracing.input_bounds import bound_inputs
from partitioner.compile.tracing.probe_decode import compare_steps, is_another_text
from partitioner.errors import CaptureError, LayoutError, PlanError
from partitioner.program.plan import Plan
from partitioner.program.program import Program, Value
from partitioner.program.progress import timed
from partitioner.program.stages import StageTable
from partitioner.proof.layouts import check_entries
from partitioner.proof.recurrences import why_pieces_differ
from partitioner.proof.rows import check_rows
from partitioner.proof.schedules import prove_stages
from runtime.program.host_default import host_default

__all__ = ["compile_generation", "compile_steps", "split_weights"]

_BY_STEPS = "its code for whole texts is traced for some lengths only"
_BY_PIECES = (
    "single tokens run by the model's code for several, as prompts and whole texts do: its code for single tokens "
    "computes something else"
)


def split_weights(traced: Program, plan: Plan, entry: str, stages: StageTable | None = None) -> Program:
    """A copy whose weights are divided as the plan has it for this entry.

    stages: how it is cut, where that is known.
    """
    found = run_passes(traced.copy(plan.replica_mesh), splitting(traced, plan, entry))
    found.stages = stages
    found.keeps_stored = plan.weights == "stored"
    return found


@timed("programs with a cache")
@states_found_once()
def compile_generation(
    traced: Program,
    split: Program,
    plan: Plan,
    step: Callable[[], Program] | None,
    piece: Callable[[], Program] | None,
) -> tuple[Program, Program]:
    """The programs for prompts and for single tokens of a model. split: `traced`, as it is divided for whole texts.

    step, piece: as `partitioner.compile.partition.compile_program` has them. Raises `PlanError` where the model's
    tokens depend on each other by more than causal attention, and its own use of a cache cannot be had either.
    """
    if not traced.has_head:
        raise PlanError(f"{traced.name} cannot generate: it has no head, so that its result is no logits")
    continuing = explicit_positions(traced)
    reason = _BY_STEPS if traced.tokens_as_rows else why_tokens_mix(continuing) or why_rows_mix(continuing)
    if reason is None:
        is_another = continuing is not traced  # another graph than that of the whole text
        if is_another:
            bound_inputs(continuing)
        prefill, decode = _entries(continuing, plan, text=None if is_another else split, stages=split.stages)
        for program in _distinct(prefill, decode):
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
    for program in _distinct(prefill, decode):
        if note is not None and _BY_PIECES not in program.notes:
            program.notes.append(note)
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
            for program in _distinct(prefill, decode):
                program.notes.append(note)
    return prefill, decode


def _as_rows(step: Program) -> Program:
    """A program for one token, for several at once: they are rows of its batch."""
    found = step.copy()
    batch = found.symbols["batch"]
    found.add_input("last", Value((batch,), torch.int64), "required")
    found.limits = {**found.limits, "sequence": (1, None)}
    found.tokens_as_rows = True
    return found


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
    for program in _distinct(prefill, one_by_pieces):
        program.notes.append(note)
    return prefill, one_by_pieces


def _are_its_texts(pieces: Program, whole: Program | None) -> bool:
    """Whether pieces of any lengths, single tokens among them, are one recurrence, and do not differ from `whole`."""
    least, _ = pieces.limits.get("sequence", (1, None))
    if whole is None or least > 1 or why_pieces_differ(pieces, pieces) is not None:
        return False
    return not is_another_text(whole, run_passes(pieces.copy(), [choose("kv-cache")]))


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
    split = text if text is not None and for_text == for_prefill else split_weights(traced, plan, "prefill", stages)
    for_prompts = run_passes(split.copy(), prefill)
    prove_stages(for_prompts)
    if (for_decode, decode) == (for_prefill, prefill):
        return for_prompts, for_prompts
    if for_decode != for_prefill:
        split = text if text is not None and for_text == for_decode else split_weights(traced, plan, "decode", stages)
    for_tokens = run_passes(split.copy(), decode)
    prove_stages(for_tokens)
    if for_prompts.batch_axes != for_tokens.batch_axes:  # something in one of them needs all sequences
        notes = [*for_prompts.notes, *for_tokens.notes]
        for_prompts, for_tokens = _entries(traced, plan, text=text, stages=stages, one_batch=True)
        why = [note for note in notes if "cannot have sequences of their own" in note]
        for program in _distinct(for_prompts, for_tokens):
            program.notes += why
    check_entries(for_prompts, for_tokens)
    return for_prompts, for_tokens


def _distinct(prefill: Program, decode: Program) -> tuple[Program, ...]:
    """One where both are the same."""
    return (prefill,) if prefill is decode else (prefill, decode)
