"""Products of few rows on a CPU: as many tokens as a step of decode or an expert has, times a matrix read from memory.

    linear(x, w, bias)                torch's `linear`: x [.., K], w [N, K], bias [N] or None  ->  [.., N]
    takes(x, w, bias)                 whether the kernel is given these here
    multiplied(x, w, bias, out=..)    x [R, K] w^T + bias, of what it takes

torch's product of few rows reads a matrix more slowly than memory would allow: it copies parts of it first, which many
rows make up for. The kernel (`few_rows.cpp`) multiplies each part with all rows as it lies there, and asks for the next
part meanwhile. Sums are of float32, in 8 lanes or in parts of 512 numbers; those of bfloat16 are rounded once. A result
depends neither on the number of threads nor on what stands beside its row.

It is given float32 of at most MOST_ROWS rows, and bfloat16, on CPUs with AVX2, where no gradient is wanted; all else is
torch's, and so is everything where there is no C++ compiler (`missing`).
"""

from __future__ import annotations

import ctypes
import functools
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter, functional

from runtime.ops.kernels.native.build_native import CannotBuild, load

__all__ = ["MOST_ROWS", "linear", "may_take", "missing", "multiplied", "takes"]

MOST_ROWS = {torch.float32: 512, torch.bfloat16: 1 << 60}
"""Beyond, torch's product is as fast. Measured on Zen 3 with matrices of 128 x 128 to 4096 x 4096, times as fast as
torch's: float32 1.05 to 1.3 at 1 row, 1.6 to 3 at 4, 1.5 to 2.5 at 16, 1.1 to 1.6 at 64, 1.0 to 1.2 at 256; bfloat16,
for which torch has no fast product there, 1.1 to 1.6 at 1 row, 3.5 to 4 at 4, 5.5 to 8 at more."""
LEAST_PRODUCTS, LEAST_OF_ONE_ROW = 1 << 18, 1 << 20
"""Multiplications: the kernel is called from Python, which takes longer than to call torch by what these gain."""
_PER_THREAD = 1 << 22
"""What is worth a thread of its own, a tenth of a millisecond: numbers of the matrix times rows and 8 more, as many as
could be multiplied while it is read."""
_DTYPES = (torch.float32, torch.bfloat16)
_FLAGS = ("-mavx2", "-mfma", "-ffp-contract=fast")
_log = logging.getLogger("partitioner")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, by the kernel where it takes these."""
    if not takes(x, weight, bias):
        return functional.linear(x, weight, bias)
    x = x.contiguous()
    columns, inner = weight.shape
    out = x.new_empty((*x.shape[:-1], columns))
    _run(x, inner, weight, bias, out, columns, x.numel() // inner)
    return out


def may_take(weight: Tensor) -> bool:
    """Whether there are inputs for which it takes such a matrix [N, K], whose rows may lie apart."""
    return weight.dtype in _DTYPES and weight.is_cpu and weight.dim() == 2 and weight.stride(1) == 1


def takes(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """x: [.., K]; weight: [N, K], whose rows may lie apart; bias: [N]."""
    if x.dtype != weight.dtype or not may_take(weight):
        return False
    inner = weight.shape[1]
    numbers = x.numel()
    least = LEAST_PRODUCTS if numbers > inner else LEAST_OF_ONE_ROW
    if not 0 < numbers <= MOST_ROWS[x.dtype] * inner or numbers * weight.shape[0] < least or x.shape[-1] != inner:
        return False
    # what is traced, or stands for something else, is no plain tensor
    plain = type(x) is Tensor and type(weight) in (Tensor, Parameter) and x.is_cpu
    if not plain or torch.compiler.is_compiling():
        return False
    if bias is not None and (bias.dtype != x.dtype or bias.shape != weight.shape[:1] or not bias.is_cpu):
        return False
    if torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in (x, weight, bias)):
        return False
    return not missing()


def multiplied(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, out: Tensor) -> None:
    """To `out`; its rows, as those of x, may lie apart."""
    x = x if x.stride(1) == 1 else x.contiguous()
    _run(x, x.stride(0), weight, bias, out, out.stride(0), len(x))


def _run(
    x: Tensor, x_stride: int, weight: Tensor, bias: Tensor | None, out: Tensor, out_stride: int, rows: int
) -> None:  # fmt: skip
    columns, inner = weight.shape
    bias = None if bias is None else bias.contiguous()
    threads = 1 + (rows + 8) * columns * inner // _PER_THREAD
    threads = 1 if threads == 1 else min(torch.get_num_threads(), threads)
    made = _kernel()(
        x.data_ptr(), rows, x_stride, weight.data_ptr(), columns, weight.stride(0),
        None if bias is None else bias.data_ptr(), out.data_ptr(), out_stride, inner,
        x.dtype == torch.bfloat16, threads, _parallel() if threads > 1 else None,
    )  # fmt: skip
    if made != 0:
        raise MemoryError(f"no memory to transpose {rows} rows of {inner} numbers")


@functools.cache
def missing() -> str:
    """Why torch makes these products on this machine; "": the kernel does."""
    capability = torch.backends.cpu.get_cpu_capability()
    if capability != "AVX2":  # torch's products by AVX-512 have not been measured against
        why = f"it is for CPUs with AVX2 (torch finds {capability})"
    else:
        try:
            _kernel()
            _parallel()
            return ""
        except (CannotBuild, OSError, AttributeError) as error:
            why = str(error)
    _log.info("products of few rows are torch's, not those of a kernel that reads weights faster: %s", why)
    return why


@functools.cache
def _kernel() -> Any:
    native = load([Path(__file__).with_name("few_rows.cpp")], timeout_s=60.0, flags=_FLAGS)
    if native.seconds:
        _log.info("compiled a kernel for products of few rows in %.1f s", native.seconds)
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    function = native.library.few_rows
    function.restype = ctypes.c_int
    function.argtypes = [
        pointer, number, number, pointer, number, number, pointer, pointer, number, number, ctypes.c_int,
        ctypes.c_int, pointer,
    ]  # fmt: skip
    return function


@functools.cache
def _parallel() -> int | None:
    """What runs a function on torch's own threads: OpenMP's entry, of the library that torch was linked with."""
    torch_library = ctypes.CDLL(str(Path(torch.__file__).with_name("lib") / "libtorch_cpu.so"))
    return ctypes.cast(torch_library.GOMP_parallel, ctypes.c_void_p).value
