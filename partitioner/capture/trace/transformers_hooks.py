"""What transformers' official hooks call while the fake model is traced: ops with the meaning of what they replace.

`AttentionInterface`, `AttentionMaskInterface` and `ExpertsInterface` let anyone register an implementation by name.
For the length of a capture ours stand under the names that models branch on: "sdpa", the default of most models, and
"eager". So a model's own code takes the branch that it takes for its user, and still calls ours. Code that calls
torch's `scaled_dot_product_attention` itself is given the same op. What was there is put back.
The ops below have shapes but no kernels: after the trace each is rewritten to a function of `runtime.ops`.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.integrations.moe import ExpertsInterface
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from partitioner.errors import CaptureError

__all__ = [
    "APPEND", "ATTENTION", "COMBINE", "DISPATCH", "GROUPED_LINEAR", "IMPLEMENTATIONS", "MASK", "ONE_CAPTURE_AT_A_TIME",
    "READ", "Masks", "installed",
]  # fmt: skip

_NAMESPACE = "partitioner_capture"
_SCHEMAS = {
    "attention": "(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? bias, Tensor? sinks, float scale, bool causal,"
    " float? softcap) -> Tensor",
    "mask": "(SymInt batch, SymInt q_length, SymInt kv_length, Tensor? padding, int kind, ScalarType dtype) -> Tensor",
    "dispatch": "(Tensor hidden, Tensor index, int num_experts) -> (Tensor, Tensor, Tensor)",
    "grouped_linear": "(Tensor rows, Tensor weight, Tensor counts, Tensor? bias, bool transposed) -> Tensor",
    "combine": "(Tensor rows, Tensor order, Tensor gates) -> Tensor",
    "append": "(Tensor x, Tensor slots, int state) -> Tensor",
    "read": "(Tensor batch, int[] shape, ScalarType dtype, int state) -> Tensor",
}
_library: Any = torch.library.Library(_NAMESPACE, "DEF")  # type: ignore[no-untyped-call]
for _name, _schema in _SCHEMAS.items():
    _library.define(_name + _schema)


def _attention_shape(
    q: Tensor, k: Tensor, v: Tensor, mask: Any, bias: Any, sinks: Any, scale: float, causal: bool, softcap: Any
) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1], q.shape[2], v.shape[3])


def _mask_shape(batch: int, q_length: int, kv_length: int, padding: Any, kind: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(batch, 1, q_length, kv_length, dtype=dtype)


def _dispatch_shape(hidden: Tensor, index: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    rows = index.shape[0] * index.shape[1]
    return hidden.new_empty(rows, hidden.shape[1]), index.new_empty(rows), index.new_empty(num_experts)


def _grouped_linear_shape(rows: Tensor, weight: Tensor, counts: Tensor, bias: Any, transposed: bool) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[2 if transposed else 1])


def _combine_shape(rows: Tensor, order: Tensor, gates: Tensor) -> Tensor:
    return rows.new_empty(gates.shape[0], rows.shape[1])


def _append_shape(x: Tensor, slots: Tensor, state: int) -> Tensor:
    return x.new_empty(*x.shape[:-2], slots.shape[0], x.shape[-1])


def _read_shape(batch: Tensor, shape: list[int], dtype: torch.dtype, state: int) -> Tensor:
    return batch.new_empty(batch.shape[0], *shape, dtype=dtype)


_register: Any = torch.library.register_fake
_SHAPES = {
    "attention": _attention_shape,
    "mask": _mask_shape,
    "dispatch": _dispatch_shape,
    "grouped_linear": _grouped_linear_shape,
    "combine": _combine_shape,
    "append": _append_shape,
    "read": _read_shape,
}
for _name, _shape in _SHAPES.items():
    _register(f"{_NAMESPACE}::{_name}", _shape)

_ops = getattr(torch.ops, _NAMESPACE)
ATTENTION = _ops.attention.default
MASK = _ops.mask.default
DISPATCH = _ops.dispatch.default
GROUPED_LINEAR = _ops.grouped_linear.default
COMBINE = _ops.combine.default
APPEND = _ops.append.default
"""x [.., S, D] is added to what a cache holds of earlier tokens: [.., T, D], one row per slot."""
READ = _ops.read.default
"""What a layer remembers of all tokens before, [B, *shape]."""


class Masks(Protocol):
    """Who answers the calls to the mask seam: the probe at first, then the trace."""

    def __call__(self, **call: Any) -> Tensor | None: ...


IMPLEMENTATIONS = ("sdpa", "eager")
"""The attention implementations whose branch in a model's code can be captured."""
ONE_CAPTURE_AT_A_TIME = threading.RLock()
_MISSING = object()


@contextlib.contextmanager
def installed(masks: Masks) -> Iterator[None]:
    """Within this context attention, masks and experts are ours; afterwards what was there before."""
    ours: list[tuple[dict[str, Any], str, Callable[..., Any]]] = [(ExpertsInterface._global_mapping, "eager", _experts)]
    for name in IMPLEMENTATIONS:
        ours += [
            (AttentionInterface._global_mapping, name, _attention),
            (AttentionMaskInterface._global_mapping, name, masks),
        ]
    with ONE_CAPTURE_AT_A_TIME:
        before = [mapping.get(name, _MISSING) for mapping, name, _ in ours]
        try:
            for mapping, name, function in ours:
                mapping[name] = function
            with _DirectCalls():
                yield
        finally:
            for (mapping, name, _), function in zip(ours, before, strict=True):
                if function is _MISSING:
                    mapping.pop(name, None)
                else:
                    mapping[name] = function


class _DirectCalls(TorchFunctionMode):
    """Attention that a model asks torch for by itself becomes the same op."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.scaled_dot_product_attention:
            found = _direct(*args, **(kwargs or {}))
            if found is not None:
                return found
        return func(*args, **(kwargs or {}))


def _direct(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """None where the call broadcasts more than the op does."""
    alike = query.dim() == key.dim() == value.dim() == 4 and (attn_mask is None or attn_mask.dim() == 4)
    if not alike or dropout_p or key.shape[1] != value.shape[1]:
        return None
    if not enable_gqa and key.shape[1] not in (1, query.shape[1]):  # one for all heads is broadcast
        return None
    if _why_no_attention(query, key, value):
        return None  # which torch says
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    out: Tensor = ATTENTION(query, key, value, _additive(attn_mask, query), None, None, scale, bool(is_causal), None)
    return out


def _additive(mask: Tensor | None, query: Tensor) -> Tensor | None:
    if mask is None or mask.dtype != torch.bool:
        return mask
    smallest = torch.finfo(query.dtype).min
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, smallest)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    position_bias: Tensor | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    for name, given in others.items():
        if given is not None and given is not False and _matters(module, name):
            raise CaptureError(
                f"cannot capture the attention of {type(module).__name__}: "
                f"it is called with {name}={_describe(given)}, "
                "which capture does not know; it knows scaling, softcap, sinks, position_bias and the mask"
            )
    if dropout:
        raise CaptureError(f"cannot capture the attention of {type(module).__name__}: dropout {dropout} in evaluation")
    if why := _why_no_attention(query, key, value):
        raise CaptureError(f"cannot capture the attention of {type(module).__name__}: {why}; see its configuration")
    attention_mask = _additive(attention_mask, query)
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    # the model's mask is all there is to know, except where the model leaves causality to the implementation
    causal = attention_mask is None and bool(vars(module).get("is_causal", False) if is_causal is None else is_causal)
    if attention_mask is None and sliding_window is not None and causal:
        raise CaptureError(
            f"cannot capture the attention of {type(module).__name__}: a sliding window of {sliding_window} and no mask"
        )
    sinks = s_aux if sinks is None else sinks
    out = ATTENTION(query, key, value, attention_mask, position_bias, sinks, scale, causal, softcap)
    return out.transpose(1, 2).contiguous(), None


def _why_no_attention(query: Tensor, key: Tensor, value: Tensor) -> str:
    """Why these are not queries of keys and values; "" where they are. The op has a shape for all, and no kernel."""
    heads, kv_heads = query.shape[1], (key.shape[1], value.shape[1])
    if any(heads % each for each in kv_heads):
        found = " and ".join(map(str, sorted(set(kv_heads))))
        return f"required are query heads that are a multiple of those of keys and values; it has {heads} and {found}"
    if query.shape[-1] != key.shape[-1]:
        return f"required are keys as wide as queries; they have {key.shape[-1]} and {query.shape[-1]} numbers per head"
    return ""


def _matters(module: nn.Module, name: str) -> bool:
    """Whether the model's own attention reads the keyword; by transformers' convention that function stands beside
    the module.
    """
    eager = vars(sys.modules[type(module).__module__]).get("eager_attention_forward")
    return eager is None or name in inspect.signature(eager).parameters


def _describe(given: Any) -> str:
    return f"a tensor of shape {tuple(given.shape)}" if isinstance(given, Tensor) else repr(given)


def _experts(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    transposed = self.is_transposed
    rows, order, counts = DISPATCH(hidden_states, top_k_index, self.num_experts)
    first = "gate_up_proj" if self.has_gate else "up_proj"
    for projection in (first, "down_proj"):
        bias = getattr(self, f"{projection}_bias") if self.has_bias else None
        rows = GROUPED_LINEAR(rows, getattr(self, projection), counts, bias, transposed)
        if projection == first:
            rows = self._apply_gate(rows) if self.has_gate else self.act_fn(rows)
    if vars(self).get("has_post_expert_norm", False):  # newer than the oldest transformers we support
        rows = self.post_expert_norm(rows)
    combined: Tensor = COMBINE(rows, order, top_k_weights).to(hidden_states.dtype)
    return combined
