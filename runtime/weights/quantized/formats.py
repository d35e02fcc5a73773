"""The formats of quantised tensors, one row each: which blocks of which parts are read, and what they stand for.

    format            parts: role [shape]                                                      code
    fp8               codes [.., N, K]  scales [.., N/r, K/c] or one                           float8
    mxfp4             codes [.., N, K/32, 16]  scales [.., N, K/32], exponents                 float4 (e2m1), two a byte
    awq               codes [K, N/8]  zeros [K/g, N/8]  scales [K/g, N]                        4 bits, eight a word
    gptq, gptq_v2     codes [K/8, N]  zeros [K/g, N/8]  scales [K/g, N]                        4 bits, eight a word
    packed            codes [N, K/8]  scales [N, K/g]  zeros [N/8, K/g] or none                4 bits, eight a word
    held-float8         codes [.., N, K]  scales [R, G]                                        float8
    held-float4         codes [.., N, K/2]  scales [R, G]                                      float4, two a byte
    held-int4           codes [.., N, K/2]  scales, zeros [R, G] or none                       4 bits, two a byte

fp8: arXiv:2412.19437, section 3.3. mxfp4: OCP Microscaling Formats (MX) 1.0. awq: arXiv:2306.00978, packed
by AutoAWQ. gptq: arXiv:2210.17323, packed by AutoGPTQ; its zeros are stored less one, word by word, those of
gptq_v2 as they are.
packed: compressed-tensors, "pack-quantized". held-..: what a rank holds as stored
(`runtime.ops.kernels.stored.stored_linear`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.ops.kernels.stored.codes import exponents, nibbles, numbers
from runtime.program.shards import Block, extents
from runtime.weights.quantized.packed import Packed, Raw

__all__ = ["FORMATS", "Format", "expand"]

_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word the codes of eight outputs are."""

_ONES = 0x11111111
"""One in each of the eight codes of a word."""

Read = Callable[[Packed, Raw, Block], Tensor]


@dataclass(frozen=True)
class Format:
    """codes: of a block, one element each. scales, zeros: of a block of the grid; None: no zeros. code: "float8",
    "float4" or "int4", what a code stands for before it is scaled. turned: whether inputs are rows in the files.
    """

    codes: Read
    scales: Read
    zeros: Read | None
    code: str
    turned: bool = False


def expand(packed: Packed, raw: Raw, box: Block, dtype: torch.dtype) -> Tensor:
    """A block of a quantised tensor as numbers."""
    form = FORMATS[packed.format]
    grid = packed.scales_of(box)
    # as wide as the product: the exponents of mxfp4 are float32, and bfloat16 times float32 is float32
    wide = torch.promote_types(packed.computed_in, dtype) if form.code == "float4" else packed.computed_in
    found = numbers(form.codes(packed, raw, box), form.code, wide)
    if form.zeros is not None:
        found = found - packed.spread(form.zeros(packed, raw, grid), box).to(wide)
    scales = packed.spread(form.scales(packed, raw, grid), box)
    return (found * scales.to(wide)).to(dtype)


def _plain(packed: Packed, raw: Raw, box: Block) -> Tensor:
    return raw("codes", box)


def _scales(packed: Packed, raw: Raw, grid: Block) -> Tensor:
    found = raw("scales", grid)
    if found.dtype == torch.uint8:
        return exponents(found)
    return found.float() if found.dtype == torch.float8_e8m0fnu else found


def _float4(packed: Packed, raw: Raw, box: Block) -> Tensor:
    *outer, (start, stop) = box
    size = packed.block[1]
    found = raw("codes", (*outer, (start // size, -(-stop // size)), (0, size // 2))).flatten(-2)
    first = start % size
    return nibbles(found, 0, 2 * found.shape[-1]).narrow(-1, first, stop - start)


def _words(ends: tuple[int, int]) -> tuple[int, int]:
    """Those that hold the codes from one to another, eight in each."""
    return ends[0] // 8, -(-ends[1] // 8)


def _awq_codes(packed: Packed, raw: Raw, box: Block) -> Tensor:
    rows, cols = box
    return nibbles(raw("codes", (cols, _words(rows))), *rows, _AWQ_ORDER).T


def _awq_zeros(packed: Packed, raw: Raw, grid: Block) -> Tensor:
    rows, groups = grid
    return nibbles(raw("zeros", (groups, _words(rows))), *rows, _AWQ_ORDER).T


def _turned_scales(packed: Packed, raw: Raw, grid: Block) -> Tensor:
    return raw("scales", grid[::-1]).T


def _gptq_codes(packed: Packed, raw: Raw, box: Block) -> Tensor:
    rows, cols = box
    return nibbles(raw("codes", (_words(cols), rows)).T, *cols)


def _gptq_zeros(packed: Packed, raw: Raw, grid: Block, *, less: int) -> Tensor:
    """`less`: what was taken from each zero, of whole words: a zero of 0 has borrowed from the next one in its word."""
    rows, groups = grid
    words = raw("zeros", (groups, _words(rows))).long() + less * _ONES
    return nibbles(torch.where(words >= 2**31, words - 2**32, words).to(torch.int32), *rows).T


def _packed_codes(packed: Packed, raw: Raw, box: Block) -> Tensor:
    rows, cols = box
    return nibbles(raw("codes", (rows, _words(cols))), *cols)


def _packed_zeros(packed: Packed, raw: Raw, grid: Block) -> Tensor:
    rows, groups = grid
    if "zeros" not in packed.parts:  # codes from -8 to 7
        return torch.full((rows[1] - rows[0], groups[1] - groups[0]), 8, dtype=torch.uint8)
    return nibbles(raw("zeros", (_words(rows), groups)).T, *rows).T


def _held_codes(packed: Packed, raw: Raw, box: Block) -> Tensor:
    *outer, (start, stop) = box
    return nibbles(raw("codes", (*outer, (start // 2, -(-stop // 2)))), start, stop)


def _held_zeros(packed: Packed, raw: Raw, grid: Block) -> Tensor:
    return raw("zeros", grid) if "zeros" in packed.parts else torch.full(extents(grid), 8, dtype=torch.uint8)


FORMATS: dict[str, Format] = {
    "fp8": Format(_plain, _scales, None, "float8"),
    "mxfp4": Format(_float4, _scales, None, "float4"),
    "awq": Format(_awq_codes, _turned_scales, _awq_zeros, "int4", turned=True),
    "gptq": Format(_gptq_codes, _turned_scales, functools.partial(_gptq_zeros, less=1), "int4", turned=True),
    "gptq_v2": Format(_gptq_codes, _turned_scales, functools.partial(_gptq_zeros, less=0), "int4", turned=True),
    "packed": Format(_packed_codes, _scales, _packed_zeros, "int4"),
    "held-float8": Format(_plain, _scales, None, "float8"),
    "held-float4": Format(_held_codes, _scales, None, "float4"),
    "held-int4": Format(_held_codes, _scales, _held_zeros, "int4"),
}
