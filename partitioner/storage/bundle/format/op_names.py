"""Which ops a graph in a bundle may call, each by a name that stands for the same thing in every version.

    "torch.add"          a function or method of `partitioner.program.torch_calls`'s tables; methods as "tensor.reshape"
    "aten.slice.Tensor"  an overload of one of the packets in `ATEN`, never one that writes to its arguments
    "op.attention"       an op of runtime.ops
    "int.add"            arithmetic on integers
    "plugin.NAME"        an op that an installed package declares under the entry points "partitioner.ops"

A name is looked up in a table, never imported. All of these compute tensors from tensors; none opens a file, and none
calls what it is given.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any

import torch
from torch import fx

from partitioner.errors import BundleError
from partitioner.program.torch_calls import FUNCTIONS, METHODS
from runtime.ops.attention import attention
from runtime.ops.cached_attention import cached_attention, last_token
from runtime.ops.collectives import landed
from runtime.ops.communicating import COMMUNICATING
from runtime.ops.embedding import vocab_parallel_embedding
from runtime.ops.expert_exchange import localise_experts
from runtime.ops.experts import expert_combine, expert_dispatch, grouped_linear, limit_experts
from runtime.ops.kernels.stored.stored_linear import stored_grouped_linear, stored_linear, stored_weight
from runtime.ops.local import once, reorder, shard
from runtime.ops.mask import attention_mask
from runtime.ops.rows.share_rows import own_last_token, take_rows
from runtime.ops.state import (
    cache_append,
    gated_delta_rule,
    gated_linear_attention,
    position_mask,
    rows_at,
    selective_scan,
    state_read,
    state_write,
)
from runtime.ops.state.latent_attention import latent_attention

__all__ = ["GROUP", "name_of", "op_named"]

GROUP = "partitioner.ops"
"""The entry points under which a package declares ops of its own: functions of tensors."""

ATEN = frozenset(
    """
    __and__ __or__ __xor__ _fused_rms_norm _log_softmax _softmax _to_copy _unsafe_index _unsafe_view abs acos acosh
    add addbmm addcdiv addcmul addmm addmv adjoint alias all amax amin angle any arange argmax argmin argsort asin
    asinh atan atan2 atanh avg_pool1d avg_pool2d baddbmm bitwise_and bitwise_left_shift bitwise_not bitwise_or
    bitwise_right_shift bitwise_xor bmm broadcast_tensors broadcast_to bucketize cat ceil celu chunk clamp clamp_max
    clamp_min clone complex concat concatenate constant_pad_nd contiguous conv1d conv2d convolution copy copysign
    cos cosh cummax cummin cumprod cumsum detach diag_embed diagonal diff div divide dot einsum elu embedding empty
    empty_like eq erf erfc erfinv exp exp2 expand expand_as expm1 eye fft_fft fft_fft2 fft_fftn fft_ifft fft_ifft2
    fft_ifftn fft_irfft fft_rfft fill flatten flip floor floor_divide fmod full full_like gather ge gelu glu
    group_norm gt hardsigmoid hardswish hardtanh im2col imag index index_add index_copy index_fill index_put
    index_select isfinite isinf isnan item layer_norm le leaky_relu lerp lift_fresh_copy linalg_vector_norm linear
    linspace log log10 log1p log2 log_sigmoid log_softmax logaddexp logcumsumexp logical_and logical_not logical_or
    logical_xor logsumexp lt mH mT masked_fill masked_scatter matmul matrix_H max max_pool2d maximum mean min
    minimum mish mm movedim mul multiply mv nan_to_num narrow native_group_norm native_layer_norm ne neg negative
    new_empty new_full new_ones new_zeros norm numpy_T one_hot ones ones_like outer pad permute pixel_shuffle polar
    positive pow prod real reciprocal reflection_pad1d relu relu6 remainder repeat repeat_interleave reshape
    reshape_as rms_norm roll round rsqrt rsub scalar_tensor scaled_dot_product_attention scatter scatter_add
    scatter_reduce searchsorted select select_scatter selu sgn sigmoid sign silu sin sinh slice slice_scatter
    softmax softplus sort split split_with_sizes sqrt square squeeze stack std sub subtract sum swapaxes sym_size t
    tan tanh tile to topk transpose tril triu true_divide trunc type_as unbind unflatten unfold unsqueeze
    upsample_nearest1d upsample_nearest2d var view view_as view_as_complex view_as_real where xlogy zeros zeros_like
    """.split()  # noqa: SIM905 - a list of one per line is no easier to read
)

_OWN = (
    attention, attention_mask, cache_append, cached_attention, expert_combine, expert_dispatch, gated_delta_rule,
    gated_linear_attention, grouped_linear, landed, last_token, latent_attention, limit_experts, localise_experts, once,
    own_last_token,
    position_mask, reorder, rows_at, selective_scan, shard, state_read, state_write, stored_grouped_linear,
    stored_linear, stored_weight, take_rows, vocab_parallel_embedding,
    *COMMUNICATING,
)  # fmt: skip
_INTEGER = (
    "add", "sub", "mul", "mod", "floordiv", "neg", "pow", "truediv", "getitem", "eq", "ne", "lt", "le", "gt", "ge",
)  # fmt: skip


def _named(functions: dict[Any, Callable[..., Any]]) -> dict[str, Any]:
    return {f"torch.{overload.overloadpacket.__name__}": function for overload, function in functions.items()}


_CALLS: dict[str, Callable[..., Any]] = {
    **_named(FUNCTIONS),
    **{f"op.{op.__name__}": op for op in _OWN},
    **{f"int.{name}": getattr(operator, name) for name in _INTEGER},
    "int.min": torch.sym_min,
    "int.max": torch.sym_max,
}
_NAMES = {op: name for name, op in _CALLS.items()}
_METHODS = {f"tensor.{method}": method for method in METHODS.values()}


def name_of(node: fx.Node) -> str:
    """The name of what `node` calls. Raises BundleError where a bundle cannot hold it."""
    target = node.target
    if node.op == "call_method" and f"tensor.{target}" in _METHODS:
        return f"tensor.{target}"
    if isinstance(target, torch._ops.OpOverload):
        name = str(target)
        if target.namespace == "aten" and target.overloadpacket.__name__ in ATEN and not target._schema.is_mutable:
            return name
    elif callable(target) and target in _NAMES:
        return _NAMES[target]
    else:
        for name in dict.fromkeys(point.name for point in entry_points(group=GROUP)):
            if _plugin_op(name) is target:
                return f"plugin.{name}"
    raise BundleError(
        f"a bundle cannot hold {target} (node {node.name!r}, in {node.meta.get('path') or 'the graph'}): it is none of "
        f"the ops that a bundle may call; an op of your own can be declared as an entry point of the group {GROUP!r}"
    )


def op_named(name: str) -> tuple[str, Any]:
    """The kind of node and the target that `name` stands for; KeyError where it stands for nothing."""
    if name in _METHODS:
        return "call_method", _METHODS[name]
    if name in _CALLS:
        return "call_function", _CALLS[name]
    kind, _, rest = name.partition(".")
    if kind == "plugin":
        return "call_function", _plugin_op(rest)
    packet, _, overload = rest.partition(".")
    if kind != "aten" or packet not in ATEN or not overload.isidentifier():
        raise KeyError(name)
    found = getattr(getattr(torch.ops.aten, packet), overload, None)
    if not isinstance(found, torch._ops.OpOverload) or found._schema.is_mutable:
        raise KeyError(name)
    return "call_function", found


@functools.cache
def _plugin_op(name: str) -> Any:
    """What an installed package declares by that name; only that is imported."""
    points = list(entry_points(group=GROUP, name=name))
    if len(points) != 1:
        how = "several packages that are installed declare" if points else "no package that is installed declares"
        raise BundleError(
            f"the op {name[:100]!r} is needed, and {how} it as an entry point of the group "
            f"{GROUP!r}: install the plugin that the bundle was made with"
        )
    try:
        return points[0].load()
    except Exception as error:
        raise BundleError(
            f"the op {name!r} ({points[0].value}) cannot be loaded: {type(error).__name__}: {error}"
        ) from error
