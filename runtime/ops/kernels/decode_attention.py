"""Attention of one new token per row, whose key and value are added to a cache by the same kernel.

    q [B, H, 1, D]   k [B, G, 1, D]   v [B, G, 1, Dv]   positions [B, 1]   keys [>= B, G, slots, D]   values [.., Dv]
    result [B, H, 1, Dv], and the log-sum-exp of the scores [B, H] where asked for

Position p lies in slot p % slots. With a `table` [B, blocks of a row], keys are [G, blocks, block size, D] and values
alike: position p lies in block table[b, p // block size], and is read where it lies. The kernel reads the positions
itself: it stops at each row's length, and one captured call serves all lengths. For torch.compile it is one operator
(`registered`), which knows its cache by a number: so that the compiled step does not know how long the cache is.

Keys or values with scales are codes of float8 (uint8) as `float8_rows` has them, with [.., n] scales of a row's blocks.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from runtime.ops.kernels.decode.few_rows import can_launch_early
from runtime.ops.kernels.decode.latent_decode import latent_decode
from runtime.ops.kernels.triton_needs import can_run, next_power_of_2

__all__ = [
    "Attending",
    "Rotation",
    "can_decode",
    "can_rotate",
    "decode_attention",
    "one_or_several",
    "one_token",
    "one_token_of_latents",
    "registered",
]

_TILE, _LEAST_TILE = 64, 16
"""Keys at a time: fewer where a program could not hold them."""
_WARPS, _STAGES = 4, 2
"""With more stages a program takes so much of a processor's memory that it does not start beside the kernel before it:
3 us more for a few hundred keys on an H200."""
_HELD = 64 << 10
"""Bytes of keys and values that threads have room for."""
_SHARED = 227 << 10
"""Bytes of a program's shared memory, where nothing is known of the device."""
_MOST_SPLITS, _PER_PROCESSOR, _PER_PROCESSOR_FLOAT8 = 64, 3, 2
"""How many parts there are at most, and programs for each processor: all parts wait for the last one. Over float8, one
has half the bytes under way, and more to do with them.
"""
_MERGED, _MOST_MERGED = 8192, 16
"""Numbers of parts that are read at a time when they are put together, and of how many parts: what the kernel takes to
be compiled grows with them, and is minutes where heads are few and narrow."""
_FEW_MERGED = (1, 4)
_WIDEST = 256
_LOG2_E = 1.4426950408889634
_MOST_COUNTERS = 65536


Rotation = tuple[Tensor, Tensor, int]
"""cos, sin [B or 1, 1, 1, D] and half: q and k are still to become x * cos + roll(x, -half) * sin."""


def can_rotate(q: Tensor, cos: Tensor, sin: Tensor, half: int) -> bool:
    """Whether the kernel rotates one token's queries and keys itself."""
    of_token = (1, 1, q.shape[-1])
    fits = cos.shape == sin.shape and cos.shape[1:] == of_token and cos.shape[0] in (1, q.shape[0])
    return fits and q.shape[2] == 1 and cos.stride(-1) == sin.stride(-1) == 1 and half % q.shape[-1] != 0


def can_decode(keys: Tensor, values: Tensor, dtype: torch.dtype) -> bool:
    """Whether the kernel takes a cache like this, for queries of `dtype`."""
    narrow = max(keys.shape[-1], values.shape[-1]) <= _WIDEST and min(keys.shape) > 0
    return narrow and can_run(keys, dtype)


@functools.cache
def _counters(device: torch.device) -> Tensor:
    return torch.zeros(_MOST_COUNTERS, dtype=torch.int32, device=device)


def _tile_and_stages(
    width: int, value_width: int, group: int, dtype: torch.dtype, scales: tuple[int, int], device: torch.device
) -> tuple[int, int]:
    """Keys at a time and how many such times are under way, of padded widths. scales: of a key and a value, if any."""
    is_exact = dtype == torch.float32
    # what a product of float32 takes lies with each thread, and a row of several scales is made float32 before it
    held = (width + value_width) * (8 if is_exact else 4 if max(scales) > 1 else 2)
    tile = _TILE
    while tile > _LEAST_TILE and tile * held > _HELD:
        tile //= 2
    of_key, of_value = (dtype.itemsize if not count else 1 if count == 1 else 5 for count in scales)
    others = 4 * tile * max(width, value_width) + 4 * group * (width + value_width)
    stages = _STAGES
    while stages > 1 and (stages - 1) * tile * (width * of_key + value_width * of_value) + others > _shared(device):
        stages -= 1
    return tile, stages


@functools.cache
def _shared(device: torch.device) -> int:
    """Bytes of shared memory that a program may have."""
    if device.type != "cuda":
        return _SHARED
    found: int = torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]
    return found


def _splits(pairs: int, slots: int, tile: int, device: torch.device, *, each: int) -> int:
    """So many parts that processors have `each` about, however long rows are; of short rows, one for each tile."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return max(1, min(each * processors // pairs, _MOST_SPLITS, next_power_of_2(-(-slots // tile))))


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    keys: Tensor,
    values: Tensor,
    sinks: Tensor | None = None,
    *,
    scale: float,
    window: int | None = None,
    chunk: int | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    table: Tensor | None = None,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
    rotation: Rotation | None = None,
    ahead: bool = False,
    is_own: Tensor | None = None,
) -> Any:
    """See the module's docstring.

    ahead: whether `positions`, `table` and what is cached were written before the step that runs now began, and not by
    one of its kernels: then a captured call reads them while the kernel before it still runs.

    is_own: [B, 1], where ranks share out the tokens of a row: whether this one keeps the new one; `positions` are how
    many of the row's it has kept before, and slots do not wrap. The result is its part, float32 [B, H, 1, Dv + 1]: what
    it attends to, and the log-sum-exp, -inf where it has no token of the row. No sinks, which go into the whole.
    """
    from runtime.ops.kernels.decode.key_value_kernel import decode  # Triton comes with torch for GPUs only

    batch, heads, _, width = q.shape
    kv_heads, slots = keys.shape[1], keys.shape[2]
    # of a row's own slots: how far apart rows lie, and heads; of blocks: how far apart these lie
    row_dim, head_dim, block = 0, 1, 0
    if table is not None:
        kv_heads, block = keys.shape[0], keys.shape[2]
        slots, row_dim, head_dim = table.shape[1] * block, 1, 0
    group, value_width = heads // kv_heads, values.shape[-1]
    num_key_scales, key_strides = _scales(key_scales, row_dim, head_dim)
    num_value_scales, value_strides = _scales(value_scales, row_dim, head_dim)
    padded, value_padded, group_padded = (max(16, next_power_of_2(size)) for size in (width, value_width, group))
    tile, stages = _tile_and_stages(
        padded, value_padded, group_padded, q.dtype, (num_key_scales, num_value_scales), q.device
    )
    each = _PER_PROCESSOR if key_scales is None else _PER_PROCESSOR_FLOAT8
    splits = _splits(batch * kv_heads, slots, tile, q.device, each=each)
    if is_own is not None:
        assert (sinks, window, chunk, return_lse) == (None, None, None, False)
        out = lse = torch.empty(batch, heads, 1, value_width + 1, dtype=torch.float32, device=q.device)
    else:
        out = q.new_empty(batch, heads, 1, value_width)
        lse = torch.empty(batch, heads, dtype=torch.float32, device=q.device) if return_lse else out
    parts = torch.empty(batch * heads * splits * (value_width + 2), dtype=torch.float32, device=q.device)
    ends = batch * heads * splits * value_width
    tops, sums = parts[ends : ends + batch * heads * splits], parts[ends + batch * heads * splits :]
    capped = softcap is not None
    cos, sin, half = (q, q, 0) if rotation is None else rotation
    early = can_launch_early(q.device)
    merged = max(1, min(_MOST_MERGED, _MERGED // (next_power_of_2(group) * value_padded)))
    # few numbers: the kernel is compiled for each, in seconds where they are large
    merged = next((few for few in _FEW_MERGED if splits <= few <= merged), merged)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    decode[(batch * kv_heads, splits)](
        q, k, v, positions.contiguous(), keys, values,
        out if key_scales is None else key_scales, out if value_scales is None else value_scales,
        out if sinks is None else sinks.contiguous(), cos, sin, out, lse, parts, tops, sums, _counters(q.device),
        positions if table is None else table, positions if is_own is None else is_own.contiguous(),
        scale if capped else scale * _LOG2_E, softcap or 1.0, window or 0, chunk or 1, slots,
        int(ahead and early and torch.cuda.is_current_stream_capturing()),
        *(x.stride(dim) for x in (q, k, v) for dim in (0, 1)),
        0 if table is None else table.stride(0),
        keys.stride(row_dim), keys.stride(head_dim), values.stride(row_dim), values.stride(head_dim),
        *key_strides, *value_strides,
        *(0 if x.shape[0] == 1 else x.stride(0) for x in (cos, sin)),
        HALF=half % width, EARLY=early,
        KV_HEADS=kv_heads, GROUP=group, GROUP_PADDED=group_padded,
        D=width, D_PADDED=padded, DV=value_width, DV_PADDED=value_padded,
        TILE=tile, GROUP_MERGED=next_power_of_2(group), MERGED=merged,
        WINDOWED=window is not None, CHUNKED=chunk is not None, CAPPED=capped,
        SINKS=sinks is not None, LSE=return_lse or is_own is not None, EXACT=q.dtype == torch.float32, BLOCK=block,
        KEY_SCALES=num_key_scales, VALUE_SCALES=num_value_scales, FOLDED=q.dtype != torch.float16,
        SHARED=is_own is not None, PTX=q.is_cuda,
        num_warps=_WARPS, num_stages=stages,
        **({"launch_pdl": True} if early else {}),
    )  # fmt: skip
    return (out, lse) if return_lse else out


def _scales(scales: Tensor | None, row_dim: int, head_dim: int) -> tuple[int, tuple[int, int]]:
    """How many there are of a row's numbers, and how far apart rows and heads lie."""
    return (0, (0, 0)) if scales is None else (scales.shape[-1], (scales.stride(row_dim), scales.stride(head_dim)))


# -- over the buffers of a cache ---------------------------------------------------------------------------------------

Held = Callable[[str], tuple[Tensor, Tensor | None]]
"""Of a state's name, what the kernel reads of it: numbers, or codes and their scales."""
_GIVEN = ("scale", "window", "chunk", "softcap")


def one_token(
    held: Held, table: Callable[[], Tensor | None], state: str, options: dict[str, Any], q: Tensor, k: Tensor,
    v: Tensor, positions: Tensor, sinks: Tensor | None, rotation: Rotation | None = None, ahead: bool = False,
) -> Tensor:  # fmt: skip
    """`cached_attention` of one token of each row; options: its keywords. table: of the run, if rows lie in blocks."""
    (keys, of_keys), (values, of_values) = held(f"{state}.key"), held(f"{state}.value")
    given: dict[str, Any] = {name: options[name] for name in _GIVEN}
    given |= {"key_scales": of_keys, "value_scales": of_values, "table": table()}
    given |= {"rotation": rotation, "ahead": ahead}
    found: Tensor = decode_attention(q, k, v, positions, keys, values, sinks, **given)
    return found


def one_token_of_latents(
    held: Held, table: Callable[[], Tensor | None], name: str, options: dict[str, Any], q: Tensor, row: Tensor,
    latent: Tensor, positions: Tensor, sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """The same of `latent_attention`, as `over_cache` asks for it. name: of what is cached."""
    rows, scales = held(name)
    given: dict[str, Any] = {each: options[each] for each in _GIVEN}
    given |= {"latent": latent.shape[-1], "scales": scales, "table": table()}
    found: Tensor = latent_decode(q, row, positions, rows, sinks, **given)
    return found


def one_or_several(
    one: Callable[..., Tensor] | None, several: Callable[..., Tensor], can_add: Callable[[], bool]
) -> Callable[..., Tensor]:
    """An attention over a cache: `one` of a token for each row where there is one that can add them, or `several`.

    Its `rotates(q, *rotation)` says whether it takes a `rotation` that is still to be done. ahead: as
    `decode_attention` has it.
    """

    def attend(
        q: Tensor, k: Tensor, v: Tensor, positions: Tensor, mask: Tensor | None = None, sinks: Tensor | None = None,
        rotation: Rotation | None = None, ahead: bool = False,
    ) -> Tensor:  # fmt: skip
        if one is not None and q.shape[2] == 1 and can_add():
            return one(q, k, v, positions, sinks, rotation, ahead)
        assert rotation is None
        return several(q, k, v, mask, sinks)

    if one is not None:
        attend.rotates = lambda q, *by: can_add() and can_rotate(q, *by)  # type: ignore[attr-defined]
    return attend


# -- one operator for torch.compile ------------------------------------------------------------------------------------


class Attending:
    """What one attention of a model does with its cache, whichever cache that is when it runs."""

    def __init__(
        self, run: Callable[..., Tensor], value_width: int | None = None, *, dtype: torch.dtype | None = None
    ) -> None:
        """What it yields is as wide as `value_width`; None: as the values are. `dtype`: None: as the query is."""
        self.run, self.value_width, self.dtype = run, value_width, dtype
        self.number = next(_numbers)
        _attending[self.number] = self

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, sinks: Tensor | None, rotation: Rotation | None,
        *, ahead: bool,
    ) -> Tensor:  # fmt: skip
        # what takes neither is told of neither
        named = {"rotation": rotation} if rotation is not None else {}
        return self.run(q, k, v, positions, sinks, **named, **({"ahead": True} if ahead else {}))


_numbers = itertools.count()
_attending: weakref.WeakValueDictionary[int, Attending] = weakref.WeakValueDictionary()
"""By number: an operator's arguments are tensors and numbers."""


@torch.library.custom_op("partitioner::decode_attention", mutates_args=())
def _decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    sinks: Tensor | None,
    number: int,
    value_width: int,
    dtype: torch.dtype | None,
    cos: Tensor | None,
    sin: Tensor | None,
    half: int,
    ahead: bool,
) -> Tensor:
    rotation = None if cos is None or sin is None else (cos, sin, half)
    return _attending[number](q, k, v, positions, sinks, rotation, ahead=ahead)


@_decode_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    sinks: Tensor | None,
    number: int,
    value_width: int,
    dtype: torch.dtype | None,
    cos: Tensor | None,
    sin: Tensor | None,
    half: int,
    ahead: bool,
) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1], 1, value_width, dtype=dtype)


def registered(attending: Attending) -> Callable[..., Tensor]:
    """A function that torch.compile takes for one operator."""

    def run(
        q: Tensor, k: Tensor, v: Tensor, positions: Tensor, sinks: Tensor | None, rotation: Rotation | None = None,
        ahead: bool = False,
    ) -> Tensor:  # fmt: skip
        if not torch.compiler.is_compiling():  # an operator's wrappers take the host longer than the launch
            return attending(q, k, v, positions, sinks, rotation, ahead=ahead)
        # by `attending`, which is kept alive as long as what calls it
        number, dtype = attending.number, attending.dtype
        width = v.shape[-1] if attending.value_width is None else attending.value_width
        cos, sin, half = (None, None, 0) if rotation is None else rotation
        found: Tensor = _decode_attention(q, k, v, positions, sinks, number, width, dtype, cos, sin, half, ahead)
        return found

    return run
