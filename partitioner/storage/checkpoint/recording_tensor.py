"""Stand-ins for a checkpoint's tensors: without data, they note the moves that are made with them.

transformers converts what a checkpoint stores (one tensor per expert, fused or interleaved projections, other names) to
what its modules hold, by code of its own that changes from version to version. That code runs here as it is, on
stand-ins: to it they are tensors on the CPU. What it does to them is read off the ops that arrive, so that no table of
conversions has to be kept. What an op computes, or writes into, lies in no file any more: its stand-in says so, and is
refused where a weight of the model turns out to be it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from partitioner.errors import WeightError
from partitioner.storage.checkpoint.strided_windows import Moved, concatenate, narrow, permute, reshape, whole

__all__ = ["Equal", "RecordingTensor"]

aten = torch.ops.aten

Equal = Callable[["RecordingTensor", "RecordingTensor"], bool]
"""Whether two stand-ins stand for the same values: transformers asks before it ties weights that both are stored."""


class RecordingTensor(Tensor):
    """See the module's docstring.

    moved: where the elements lie. stored: the dtype in the file; that of the tensor is what it is cast to. computed:
    what was computed of them or written into them, empty where they are as stored; one list for all views of a tensor.
    """

    moved: Moved
    stored: torch.dtype
    same: Equal
    computed: list[str]

    @staticmethod
    def __new__(
        cls, moved: Moved, dtype: torch.dtype, stored: torch.dtype, same: Equal, computed: list[str] | None = None
    ) -> RecordingTensor:
        made = Tensor._make_wrapper_subclass(cls, moved.shape, dtype=dtype, device=torch.device("cpu"))
        made.moved, made.stored, made.same = moved, stored, same
        made.computed = [] if computed is None else computed
        return made

    @classmethod
    def of(cls, name: str, shape: tuple[int, ...], dtype: torch.dtype, same: Equal) -> RecordingTensor:
        return cls(whole(name, shape), dtype, dtype, same)

    def __repr__(self) -> str:  # type: ignore[override]
        names = list(dict.fromkeys(window.tensor for window in self.moved.windows))
        said = ", ".join(names[:3]) + ("..." if len(names) > 3 else "")
        return f"RecordingTensor({list(self.shape)}, {self.dtype}, of {said})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        move = MOVES.get(func.overloadpacket)
        return _compute(func, args, kwargs) if move is None else move(*args, **kwargs)


def _compute(func: Any, args: Any, kwargs: Any) -> Any:
    """Anything but a move: the result has a shape and a dtype, and lies nowhere."""
    given = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, RecordingTensor)]
    why = f"{func.overloadpacket} computes it"
    empty = tree_map(lambda x: _on_meta(x), (args, kwargs))
    try:
        result = func(*empty[0], **empty[1])
    except Exception as error:
        raise WeightError(
            f"the checkpoint's weights are converted by {func.overloadpacket}, which needs the values of {given[0]}: "
            "load the model by from_pretrained and partition that"
        ) from error
    if func._schema.is_mutable:
        written = args[0]
        if isinstance(written, RecordingTensor):
            written.computed.append(f"{func.overloadpacket} writes into it")
        return written
    return tree_map(
        lambda x: (
            RecordingTensor(Moved(tuple(x.shape), ()), x.dtype, x.dtype, given[0].same, [why])
            if isinstance(x, Tensor)
            else x
        ),
        result,
    )


def _on_meta(x: Any) -> Any:
    if isinstance(x, Tensor):
        return torch.empty(x.shape, dtype=x.dtype, device="meta")
    return torch.device("meta") if isinstance(x, torch.device) else x


def _like(of: RecordingTensor, moved: Moved) -> RecordingTensor:
    """A view: what is written into it is written into the other too."""
    return RecordingTensor(moved, of.dtype, of.stored, of.same, of.computed)


def _same(x: RecordingTensor, **_: Any) -> RecordingTensor:
    return _like(x, x.moved)


def _copy(x: RecordingTensor, **_: Any) -> RecordingTensor:
    return RecordingTensor(x.moved, x.dtype, x.stored, x.same, list(x.computed))


def _cast(x: RecordingTensor, *, dtype: torch.dtype | None = None, **_: Any) -> RecordingTensor:
    dtype = dtype or x.dtype
    computed = list(x.computed)
    if dtype != x.dtype and x.dtype != x.stored:
        computed.append(f"it is cast twice, from {x.stored} by {x.dtype} to {dtype}")
    return RecordingTensor(x.moved, dtype, x.stored, x.same, computed)


def _view(x: RecordingTensor, size: Sequence[int]) -> RecordingTensor:
    known = 1
    for extent in size:
        known *= extent if extent >= 0 else 1
    return _like(x, reshape(x.moved, [x.numel() // known if extent < 0 else extent for extent in size]))


def _permute(x: RecordingTensor, dims: Sequence[int]) -> RecordingTensor:
    return _like(x, permute(x.moved, [dim % x.ndim for dim in dims]))


def _transpose(x: RecordingTensor, first: int, second: int) -> RecordingTensor:
    dims = list(range(x.ndim))
    dims[first], dims[second] = dims[second], dims[first]
    return _permute(x, dims)


def _t(x: RecordingTensor) -> RecordingTensor:
    return _permute(x, range(x.ndim)[::-1])


def _slice(
    x: RecordingTensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> RecordingTensor:
    dim %= x.ndim
    low, high, _ = slice(start, end).indices(x.shape[dim])
    return _like(x, narrow(x.moved, dim, low, max(low, high), step=step))


def _select(x: RecordingTensor, dim: int, index: int) -> RecordingTensor:
    dim, index = dim % x.ndim, index % x.shape[dim]
    return _squeeze(_slice(x, dim, index, index + 1), dim)


def _squeeze(x: RecordingTensor, dim: int | Sequence[int] | None = None) -> RecordingTensor:
    dims = range(x.ndim) if dim is None else [d % x.ndim for d in ([dim] if isinstance(dim, int) else dim)]
    return _view(x, [n for at, n in enumerate(x.shape) if n != 1 or at not in dims])


def _unsqueeze(x: RecordingTensor, dim: int) -> RecordingTensor:
    dim %= x.ndim + 1
    return _view(x, [*x.shape[:dim], 1, *x.shape[dim:]])


def _split_with_sizes(x: RecordingTensor, sizes: Sequence[int], dim: int = 0) -> list[RecordingTensor]:
    found, start = [], 0
    for size in sizes:
        found.append(_slice(x, dim, start, start + size))
        start += size
    return found


def _split(x: RecordingTensor, size: int, dim: int = 0) -> list[RecordingTensor]:
    total = x.shape[dim]
    return _split_with_sizes(x, [min(size, total - start) for start in range(0, total, size)], dim)


def _unbind(x: RecordingTensor, dim: int = 0) -> list[RecordingTensor]:
    return [_select(x, dim, index) for index in range(x.shape[dim])]


def _cat(parts: Sequence[RecordingTensor], dim: int = 0) -> RecordingTensor:
    if len({(type(part), part.dtype) for part in parts}) > 1 or len({part.stored for part in parts}) > 1:
        return _compute(aten.cat.default, (list(parts), dim), {})  # type: ignore[no-any-return]
    first = parts[0]
    moved = concatenate([part.moved for part in parts], dim % first.ndim)
    return RecordingTensor(
        moved, first.dtype, first.stored, first.same, [why for part in parts for why in part.computed]
    )


def _stack(parts: Sequence[RecordingTensor], dim: int = 0) -> RecordingTensor:
    return _cat([_unsqueeze(part, dim) for part in parts], dim)


def _pad(x: RecordingTensor, pad: Sequence[int], value: float = 0) -> RecordingTensor:
    # a head's bias is padded to the rows of its weight, usually by none
    padded: RecordingTensor = _compute(aten.constant_pad_nd.default, (x, pad, value), {}) if any(pad) else _copy(x)
    return padded


def _equal(x: RecordingTensor, y: RecordingTensor) -> bool:
    if not isinstance(x, RecordingTensor) or not isinstance(y, RecordingTensor) or x.computed or y.computed:
        return bool(_compute(aten.equal.default, (x, y), {}))
    return x.shape == y.shape and x.dtype == y.dtype and (x.moved == y.moved or x.same(x, y))


MOVES: dict[Any, Callable[..., Any]] = {
    aten.alias: _same,
    aten.clone: _copy,
    aten.detach: _same,
    aten._to_copy: _cast,
    aten.view: _view,
    aten._unsafe_view: _view,
    aten._reshape_alias: lambda x, size, stride: _view(x, size),
    aten.permute: _permute,
    aten.transpose: _transpose,
    aten.t: _t,
    aten.slice: _slice,
    aten.select: _select,
    aten.squeeze: _squeeze,
    aten.unsqueeze: _unsqueeze,
    aten.split: _split,
    aten.split_with_sizes: _split_with_sizes,
    aten.unbind: _unbind,
    aten.cat: _cat,
    aten.stack: _stack,
    aten.constant_pad_nd: _pad,
    aten.equal: _equal,
}
"""By op: what it does to where the elements lie."""
