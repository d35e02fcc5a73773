"""Trace the fake model with `torch.export`, batch and sequence symbolic.

Non-strict export runs the model's Python on fake tensors and records the ops (torch.export, "non-strict mode").
"""

from __future__ import annotations

import contextlib
import io
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from transformers import PreTrainedModel
from transformers.masking_utils import eager_mask

from partitioner.capture.layers.share_layers import NotSharedError, SharedLayers
from partitioner.capture.overheads.shapes_once import shapes_found_once
from partitioner.capture.overheads.size_arithmetic import asked_once
from partitioner.capture.overheads.source_lines import innermost_lines
from partitioner.capture.overheads.unread import unread_left_out
from partitioner.capture.trace.recognise_masks import MaskKind
from partitioner.capture.trace.transformers_hooks import MASK, installed
from partitioner.errors import CaptureError

__all__ = ["WRAPPER", "export", "export_sharing", "export_step", "result_of"]

WRAPPER = "model"
"""The attribute under which the traced module holds the model: the first part of every name in the export."""


class _Traced(nn.Module):
    """The model with positional inputs and one output: its logits, or the last hidden state where it has no head."""

    def __init__(self, model: PreTrainedModel, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, *tensors: Tensor) -> Tensor:
        return result_of(self.model, self.model(**dict(zip(self.names, tensors, strict=True))))


def result_of(model: PreTrainedModel, output: Any) -> Tensor:
    """The logits of a model's output, or the last hidden state where it has no head."""
    if not isinstance(output, Mapping):  # a ModelOutput is one
        raise CaptureError(
            f"cannot capture {type(model).__name__}: its forward returns a {type(output).__name__}; required is an "
            "output of transformers, such as CausalLMOutput(logits=...), or a dict with logits or last_hidden_state"
        )
    for name in ("logits", "last_hidden_state"):
        value = output.get(name)
        if isinstance(value, Tensor):
            return value
    raise CaptureError(
        f"cannot capture {type(model).__name__}: its output has neither logits nor last_hidden_state; "
        f"it has {', '.join(output.keys())}"
    )


class _Masks:
    """The mask seam during the trace: the k-th mask has the kind that the probe found for the k-th."""

    def __init__(self, kinds: list[MaskKind | None]) -> None:
        self.kinds = kinds
        self.asked = 0

    def next_is_known(self) -> bool:
        return self.asked < len(self.kinds) and self.kinds[self.asked] is not None

    def __call__(self, **call: Any) -> Tensor | None:
        known, index, self.asked = self.next_is_known(), self.asked, self.asked + 1
        if not known:
            return _written_out(call)
        padding = call.get("attention_mask")
        mask: Tensor = MASK(call["batch_size"], call["q_length"], call["kv_length"], padding, index, call["dtype"])
        return mask


def _written_out(call: dict[str, Any]) -> Tensor | None:
    mask: Tensor | None = eager_mask(**{**call, "allow_is_bidirectional_skip": False})
    return mask


def export_sharing(
    fake_model: PreTrainedModel,
    example: Mapping[str, Tensor],
    kinds: list[MaskKind | None],
    shared: SharedLayers,
    *,
    static: bool,
) -> ExportedProgram:
    """The same with one node for each layer that `shared` knows already; raises `NotSharedError` where that fails,
    whatever the reason.
    """
    masks = _Masks(kinds)
    shared.count_masks = lambda: masks.asked
    try:
        with shared.wrapped(), contextlib.redirect_stderr(io.StringIO()):
            exported = _exported(fake_model, example, masks, static=static)
    except Exception as error:
        raise NotSharedError(_short(error)) from error
    if masks.asked < len(kinds):
        raise NotSharedError(f"{len(kinds)} masks in a plain run, {masks.asked} in the trace")
    return exported


def _short(error: Exception) -> str:
    said = " ".join(str(error).split())[:200]
    return said if isinstance(error, NotSharedError) else f"{type(error).__name__}: {said}"


def export(
    fake_model: PreTrainedModel, example: Mapping[str, Tensor], kinds: list[MaskKind | None], *, static: bool
) -> ExportedProgram:
    masks = _Masks(kinds)
    said = io.StringIO()  # on failure torch prints the graph so far, thousands of lines
    try:
        with contextlib.redirect_stderr(said):
            exported = _exported(fake_model, example, masks, static=static)
    except CaptureError:
        raise
    except Exception as error:
        advice = _advice(fake_model, example, kinds, error, static=static)
        raise CaptureError(_explain(fake_model, error, advice)) from error
    sys.stderr.write(said.getvalue())
    if masks.asked < len(kinds):
        raise CaptureError(
            f"cannot capture {type(fake_model).__name__}: it asked for {len(kinds)} masks in a plain run and for "
            f"{masks.asked} in the trace, so which is which is unknown"
        )
    return exported


def _exported(
    fake_model: PreTrainedModel, example: Mapping[str, Tensor], masks: _Masks, *, static: bool
) -> ExportedProgram:
    dims = {0: Dim.DYNAMIC} if static else {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    return run_export(_Traced(fake_model, tuple(example)), example, masks, dict.fromkeys(example, dims))


def export_step(
    stepping: nn.Module,
    fake_model: PreTrainedModel,
    example: Mapping[str, Tensor],
    kinds: list[MaskKind | None],
    dims: Mapping[str, Mapping[int, Any]],
    *,
    shared: SharedLayers | None,
) -> ExportedProgram:
    """`stepping` holds the fake model as `model`, takes the examples in order, returns a tuple; `dims`: symbolic."""
    masks = _Masks(kinds)
    if shared is not None:
        shared.count_masks = lambda: masks.asked
    try:
        with (
            contextlib.redirect_stderr(io.StringIO()),
            contextlib.nullcontext() if shared is None else shared.wrapped(),
        ):
            exported = run_export(stepping, example, masks, dims)
    except Exception as error:
        if shared is not None:
            raise NotSharedError(_short(error)) from error
        if isinstance(error, CaptureError):
            raise
        reason = " ".join(str(error).split())[:500]
        raise CaptureError(
            f"{type(fake_model).__name__}{_where(fake_model, error)} cannot be traced with a cache: "
            f"torch.export failed with {type(error).__name__}: {reason}"
        ) from error
    if masks.asked != len(kinds):
        if shared is not None:
            raise NotSharedError(f"{len(kinds)} masks in a plain run, {masks.asked} in the trace")
        raise CaptureError(
            f"{type(fake_model).__name__} asked for {len(kinds)} masks in a plain run, {masks.asked} in the trace"
        )
    return exported


@contextlib.contextmanager
def _own_states() -> Iterator[None]:
    """A model may keep what it remembers in attributes of its modules, which torch warns about and puts back."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"The tensor attributes? .* (was|were) assigned during export")
        yield


def run_export(
    traced: nn.Module, example: Mapping[str, Tensor], masks: _Masks, dims: Mapping[str, Mapping[int, Any]]
) -> ExportedProgram:
    with (
        _own_states(),
        installed(masks),
        torch.no_grad(),
        innermost_lines(),
        asked_once(),
        shapes_found_once(),
        unread_left_out(traced, masks.next_is_known),
    ):
        return torch.export.export(
            traced,
            # a failed export leaves marks on its inputs
            tuple(tensor.clone() for tensor in example.values()),
            dynamic_shapes=(tuple(dict(dims[name]) for name in example),),
            strict=False,
        )


_SHORT = 5
"""A length that models take; not as many as the example has texts, which a model may take for a number of choices."""


def _works_static(fake_model: PreTrainedModel, example: Mapping[str, Tensor], kinds: list[MaskKind | None]) -> bool:
    """Whether one length can be traced where all cannot: tried, rather than guessed from the words of an error."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            _exported(fake_model, example, _Masks(kinds), static=True)
    except Exception:
        return False
    return True


def _works_padded(fake_model: PreTrainedModel, example: Mapping[str, Tensor], kinds: list[MaskKind | None]) -> bool:
    """Whether a padding token is all that is missing."""
    config = fake_model.config.get_text_config()
    if not hasattr(config, "pad_token_id") or config.pad_token_id is not None:
        return False
    config.pad_token_id = 0
    try:
        return _works_static(fake_model, example, kinds)
    finally:
        config.pad_token_id = None


def _advice(
    fake_model: PreTrainedModel,
    example: Mapping[str, Tensor],
    kinds: list[MaskKind | None],
    error: Exception,
    *,
    static: bool,
) -> str:
    if not static and _works_static(fake_model, example, kinds):
        return "partition(..., fixed_length=N) compiles it for prompts of exactly N tokens, if that is enough"
    if "data-dependent" in str(error):
        return "the model decides something in Python on a value that only real weights have; no length helps"
    if _works_padded(fake_model, example, kinds):
        return (
            "it works with a padding token, which its configuration does not name: set model.config.pad_token_id, or "
            "pad_token_id in config.json"
        )
    length = next(iter(example.values())).shape[1]
    if _works_static(fake_model, {name: tensor[:, :_SHORT] for name, tensor in example.items()}, kinds):
        return (
            f"it was traced with texts of {length} tokens, which is more than it takes: "
            f"partition(..., fixed_length=N) with a smaller N compiles it for exactly N tokens"
        )
    return (
        f"the error is not about lengths: it is the same for texts of exactly {length}, and of exactly {_SHORT} tokens"
    )


def _explain(fake_model: PreTrainedModel, error: Exception, advice: str) -> str:
    reason = " ".join(str(error).split())[:1500]
    where = _where(fake_model, error)
    return (
        f"cannot capture {type(fake_model).__name__}{where}: torch.export failed with {type(error).__name__}: "
        f"{reason}\n{advice}"
    )


def _where(fake_model: PreTrainedModel, error: Exception) -> str:
    """The innermost module of the model that was running, and its line."""
    paths = {id(module): path for path, module in fake_model.named_modules()}
    found = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        running = frame.f_locals.get("self")
        if isinstance(running, nn.Module) and paths.get(id(running)):
            found = f", at {paths[id(running)]} ({Path(frame.f_code.co_filename).name}:{line})"
    return found
