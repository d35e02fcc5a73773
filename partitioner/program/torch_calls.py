"""Lower: the ops of an emitted graph as plain torch calls, which Python reaches faster than `torch.ops.aten`.

    aten.linear.default(x, w)        ->  torch.nn.functional.linear(x, w)
    aten.reshape.default(x, shape)   ->  x.reshape(shape)
    aten.slice.Tensor(x, 3, 0, 32)   ->  torch.narrow(x, 3, 0, 32)      where the sizes are known
    once(y, 1)                       ->  y

An OpOverload looks its arguments up in a schema on every call, about 1 us of the 2 to 3 that a small op takes on CPU.
Each call in the tables takes its arguments in the order and under the names of the op's schema and dispatches to that
very overload, so nothing is computed differently; what is in no table stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.nn import functional

from partitioner.program.node_arguments import arguments
from partitioner.program.program import Value
from partitioner.sharding.layout import Layout
from runtime.ops.local import once

aten = torch.ops.aten

__all__ = ["FUNCTIONS", "METHODS", "lower", "lowered_call"]

FUNCTIONS: dict[Any, Callable[..., Any]] = {
    # element by element, two operands
    aten.add.Tensor: torch.add,
    aten.sub.Tensor: torch.sub,
    aten.rsub.Scalar: torch.rsub,
    aten.mul.Tensor: torch.mul,
    aten.div.Tensor: torch.div,
    aten.div.Tensor_mode: torch.div,
    aten.pow.Tensor_Scalar: torch.pow,
    aten.pow.Tensor_Tensor: torch.pow,
    aten.maximum.default: torch.maximum,
    aten.minimum.default: torch.minimum,
    aten.eq.Tensor: torch.eq,
    aten.eq.Scalar: torch.eq,
    aten.ne.Tensor: torch.ne,
    aten.ne.Scalar: torch.ne,
    aten.lt.Tensor: torch.lt,
    aten.lt.Scalar: torch.lt,
    aten.le.Tensor: torch.le,
    aten.le.Scalar: torch.le,
    aten.gt.Tensor: torch.gt,
    aten.gt.Scalar: torch.gt,
    aten.ge.Tensor: torch.ge,
    aten.ge.Scalar: torch.ge,
    aten.logical_and.default: torch.logical_and,
    aten.logical_or.default: torch.logical_or,
    aten.bitwise_and.Tensor: torch.bitwise_and,
    aten.bitwise_or.Tensor: torch.bitwise_or,
    aten.where.self: torch.where,
    aten.masked_fill.Scalar: torch.masked_fill,
    aten.masked_fill.Tensor: torch.masked_fill,
    aten.addcmul.default: torch.addcmul,
    aten.lerp.Tensor: torch.lerp,
    # element by element, one operand
    aten.neg.default: torch.neg,
    aten.abs.default: torch.abs,
    aten.square.default: torch.square,
    aten.sqrt.default: torch.sqrt,
    aten.rsqrt.default: torch.rsqrt,
    aten.reciprocal.default: torch.reciprocal,
    aten.exp.default: torch.exp,
    aten.log.default: torch.log,
    aten.cos.default: torch.cos,
    aten.sin.default: torch.sin,
    aten.tanh.default: torch.tanh,
    aten.erf.default: torch.erf,
    aten.sigmoid.default: torch.sigmoid,
    aten.relu.default: torch.relu,
    aten.clamp.default: torch.clamp,
    aten.clamp_min.default: torch.clamp_min,
    aten.clamp_max.default: torch.clamp_max,
    aten.logical_not.default: torch.logical_not,
    aten.bitwise_not.default: torch.bitwise_not,
    aten.silu.default: functional.silu,
    aten.gelu.default: functional.gelu,
    aten.softplus.default: functional.softplus,
    # along dims
    aten.sum.dim_IntList: torch.sum,
    aten.mean.dim: torch.mean,
    aten.amax.default: torch.amax,
    aten.amin.default: torch.amin,
    aten.argmax.default: torch.argmax,
    aten.cumsum.default: torch.cumsum,
    aten.softmax.int: torch.softmax,
    aten.log_softmax.int: torch.log_softmax,
    aten.topk.default: torch.topk,
    aten.tril.default: torch.tril,
    aten.triu.default: torch.triu,
    aten.layer_norm.default: torch.layer_norm,
    aten.rms_norm.default: torch.rms_norm,
    aten.group_norm.default: torch.group_norm,
    # contractions
    aten.linear.default: functional.linear,
    aten.matmul.default: torch.matmul,
    aten.mm.default: torch.mm,
    aten.bmm.default: torch.bmm,
    aten.addmm.default: torch.addmm,
    aten.baddbmm.default: torch.baddbmm,
    aten.conv1d.default: torch.conv1d,
    aten.conv2d.default: torch.conv2d,
    aten.scaled_dot_product_attention.default: functional.scaled_dot_product_attention,
    # indexed
    aten.embedding.default: torch.embedding,
    aten.gather.default: torch.gather,
    aten.scatter.src: torch.scatter,
    aten.scatter.value: torch.scatter,
    aten.index_select.default: torch.index_select,
    aten.index_add.default: torch.index_add,
    # moves
    aten.cat.default: torch.cat,
    aten.stack.default: torch.stack,
    aten.transpose.int: torch.transpose,
    aten.permute.default: torch.permute,
    aten.unsqueeze.default: torch.unsqueeze,
    aten.squeeze.default: torch.squeeze,
    aten.squeeze.dim: torch.squeeze,
    aten.t.default: torch.t,
    aten.flatten.using_ints: torch.flatten,
    aten.select.int: torch.select,
    aten.narrow.default: torch.narrow,
    aten.split_with_sizes.default: torch.split_with_sizes,
    aten.chunk.default: torch.chunk,
    aten.unbind.int: torch.unbind,
    aten.flip.default: torch.flip,
    aten.roll.default: torch.roll,
    aten.clone.default: torch.clone,
    aten.constant_pad_nd.default: torch.constant_pad_nd,
    aten.repeat_interleave.self_int: torch.repeat_interleave,
}
METHODS: dict[Any, str] = {
    aten.reshape.default: "reshape",
    aten.view.default: "view",
    aten.expand.default: "expand",
    aten.repeat.default: "repeat",
    aten.contiguous.default: "contiguous",
    aten.to.dtype: "to",
    aten.sym_size.int: "size",
}

_CALLS: dict[Any, tuple[str, Any]] = {
    **{op: ("call_function", function) for op, function in FUNCTIONS.items()},
    **{op: ("call_method", method) for op, method in METHODS.items()},
}

_TO_POSITIONAL = 4
"""self, dtype, non_blocking, copy"""


def lower(node: fx.Node) -> fx.Node:
    """What takes the place of `node`: itself with another call, or the operand that it would only hand on."""
    source = node.args[0] if node.args else None
    if node.target is once and node.args[1:] == (1,):
        assert isinstance(source, fx.Node)
        return source
    if not _is_tensor(source) or "self" in node.kwargs:
        return node
    if node.target is aten.slice.Tensor:
        _narrow(node)
        return node
    if node.target is aten.to.dtype and len(node.args) > _TO_POSITIONAL:
        # a method takes what an op takes in place by name only
        node.kwargs = {**node.kwargs, "memory_format": node.args[_TO_POSITIONAL]}
        node.args = node.args[:_TO_POSITIONAL]
    call = lowered_call(node.target, node.args, node.kwargs)
    if call is not None:
        node.op, node.target = call
    return node


def lowered_call(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[str, Any] | None:
    """The op and the target that do the same with the same arguments, if there are any: most of what `lower` does."""
    call = _CALLS.get(target)
    if call is None or not args or "self" in kwargs or not _is_tensor(args[0]):
        return None
    if target is aten.to.dtype and len(args) > _TO_POSITIONAL:
        return None
    return call


def _is_tensor(argument: Any) -> bool:
    """A number as the first operand would reach another overload."""
    if isinstance(argument, (list, tuple)):
        return bool(argument) and all(map(_is_tensor, argument))
    return isinstance(argument, fx.Node) and isinstance(argument.meta.get("val"), Value)


def _narrow(node: fx.Node) -> None:
    a = arguments(node)
    source, dim, start, end = a["self"], a["dim"], a["start"] or 0, a["end"]
    layout: Layout | None = source.meta.get("layout")
    size = source.meta["val"].shape[dim]
    # a split dim is shorter on a rank than in the value's shape
    if a["step"] != 1 or not isinstance(size, int) or (layout is not None and layout.dims[dim] is not None):
        return
    end = size if end is None else end
    if isinstance(start, int) and isinstance(end, int) and 0 <= start <= size and end >= start:
        node.target, node.args, node.kwargs = torch.narrow, (source, dim, start, min(end, size) - start), {}
