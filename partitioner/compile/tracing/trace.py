"""Traces: a model as one canonical program, before any pass.

    trace          whole texts
    trace_step     some tokens at a time, with what the model remembers of those before as states
    trace_piece    several at a time, of a model that remembers a state per sequence

Where a model's code for whole texts cannot be traced for all lengths (it loops over tokens in Python, say), and what it
remembers is a state per sequence, whole texts are run by its code for single tokens, several at once.
"""

from __future__ import annotations

from dataclasses import replace

import sympy
from torch import nn
from transformers import PreTrainedModel

from partitioner.analysis.tokens.tokens_as_rows import why_rows_meet
from partitioner.capture import capture, capture_piece, capture_step
from partitioner.compile.pass_manager.choose_passes import choose
from partitioner.compile.pass_manager.run_passes import run_passes
from partitioner.compile.tracing.canonicalize import canonicalize
from partitioner.compile.tracing.input_bounds import bound_inputs
from partitioner.compile.tracing.probe_decode import TOKENS, compare_steps
from partitioner.errors import CaptureError, PlanError
from partitioner.program.pause_collector import collector_paused
from partitioner.program.program import Program, Value
from partitioner.program.progress import timed
from partitioner.sharding.mesh import Mesh
from runtime.program.host_default import host_default

__all__ = ["trace", "trace_piece", "trace_step"]


@collector_paused()
@host_default
def trace(model: PreTrainedModel, *, max_length: int | None = None, fixed_length: int | None = None) -> Program:
    """The model as one canonical program, before any pass; it can be compiled for several plans."""
    if not isinstance(model, PreTrainedModel):
        raise CaptureError(
            f"cannot capture a {type(model).__name__}: required is a model of transformers (a PreTrainedModel with its "
            "config), such as AutoModelForCausalLM.from_pretrained(...) yields" + _within(model)
        )
    for name, given in (("max_length", max_length), ("fixed_length", fixed_length)):
        if given is not None and (not isinstance(given, int) or isinstance(given, bool) or given < 1):
            raise CaptureError(f"{name} must be a whole number of tokens, at least 1; got {given!r}")
    with timed("trace"):
        try:
            traced = capture(model, mesh=Mesh.of(), max_length=max_length, fixed_length=fixed_length)
        except CaptureError as error:
            if fixed_length is not None:
                raise
            return _texts_by_steps(model, max_length, error)
        canonicalize(traced)
        bound_inputs(traced)
    return traced


def _texts_by_steps(model: PreTrainedModel, max_length: int | None, reason: CaptureError) -> Program:
    """Whole texts by the model's code for single tokens, where that for several cannot be traced for all lengths and
    what is remembered is a state per sequence. Raises `reason` where that cannot be had, or says something else.
    """
    try:
        step = trace_step(model, max_length=max_length)
        few = trace(model, max_length=max_length, fixed_length=TOKENS)
        recurrent = any(not state.per_token for state in step.states.values())
        if not recurrent or why_rows_meet(step) is not None or "sequence" in step.symbols:
            raise reason
        if (note := compare_steps(few, run_passes(step.copy(), [choose("kv-cache")]))) is not None:
            step.notes.append(note)
    except (CaptureError, PlanError) as error:
        raise reason from error
    step.notes.append("whole texts run by the model's code for single tokens, several at once")
    sequence = step.symbols["sequence"] = sympy.Symbol("sequence", integer=True, positive=True)
    per_token = {"input_ids", "position_ids"}
    step.inputs = tuple(
        replace(
            given,
            value=Value((given.value.shape[0], sequence), given.value.dtype)
            if given.name in per_token
            else given.value,
            default="ones" if given.name == "active" else given.default,
        )
        for given in step.inputs
    )
    step.limits = {name: limit for name, limit in step.limits.items() if name != "sequence"}
    step.tokens_as_rows = True
    return step


def _within(wrapper: object) -> str:
    """What a wrapper (compiled, parallel, with adapters) is wrapped around."""
    for path, module in wrapper.named_modules() if isinstance(wrapper, nn.Module) else ():
        if isinstance(module, PreTrainedModel):
            return f"; it is wrapped around one, a {type(module).__name__}: give that, its .{path}"
    return ""


@collector_paused()
@host_default
def trace_step(model: PreTrainedModel, *, max_length: int | None = None) -> Program:
    """The model as one program that takes some tokens at a time, with what it remembers of those before as states."""
    with timed("trace with a cache"):
        traced = capture_step(model, mesh=Mesh.of(), max_length=max_length)
        canonicalize(traced)
        bound_inputs(traced)
    return traced


@collector_paused()
@host_default
def trace_piece(model: PreTrainedModel, *, max_length: int | None = None) -> Program:
    """The same for several tokens at a time, of a model that remembers a state per sequence."""
    traced = capture_piece(model, mesh=Mesh.of(), max_length=max_length)
    canonicalize(traced)
    bound_inputs(traced)
    return traced
