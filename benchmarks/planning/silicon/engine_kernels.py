"""Kernels that engines ran in the measured rows and the tables have not: as their sources have them, nothing fitted.

    contiguous    vLLM 0.12 on Hopper: experts of checkpoints with blockwise float8, however few tokens a step has

vLLM 0.12 multiplies them by DeepGEMM's grouped product in its contiguous form wherever scales may be powers of two,
which it takes for all GPUs that DeepGEMM runs on (`utils/deep_gemm.py`, `is_deep_gemm_e8m0_used`; `fused_moe/
triton_deep_gemm_moe.py`), unless experts are split over 8 ranks of tp and more (`quantization/fp8.py`). 0.18 prefers
other kernels on Hopper (`fused_moe/oracle/fp8.py`). Each expert's rows begin at a multiple of `ROWS`, and as the host
does not know how many each has, the step is as large as it might be: tokens x chosen + experts x (`ROWS` - 1)
(`compute_aligned_M`). Tiles that no token came to skip their products, but not their loads (`is_computation_valid` in
DeepGEMM's `sm90_fp8_gemm_1d2d.cuh`). So a step takes as long with four tokens as with forty.

A tile of 128 x 128 takes `STEP_S` for each 128 numbers of the sum, and `END_S` besides: the published speeds of that
kernel on H800, 1297 TFLOPS at [32768, 7168] x [4096, 7168] and 1099 at [32768, 2048] x [7168, 2048] (README of
DeepGEMM, first release), solved for the two.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from partitioner.planning.kernels import Grouped, Kernels
from partitioner.planning.pricing.kernel_times import LAUNCH_S

__all__ = ["ContiguousExperts"]

ROWS = 128
PROCESSORS = 132
STEP_S, END_S = 0.396e-6, 1.72e-6
KERNELS = 9
"""Beside the two products: rows counted, places filled, two that scatter, the gate, two that make float8, the sum."""
INNER_BYTES = 9
"""Of each number inside an expert: the gate reads two of 2 bytes and writes one, which float8 is made of."""


@dataclass(frozen=True)
class ContiguousExperts(Kernels):
    """As `Kernels`, but for experts. See the module's docstring."""

    @classmethod
    def of(cls, known: Kernels) -> ContiguousExperts:
        return cls(**vars(known))

    def experts(self, given: Grouped, *, table: str = "") -> float:
        if not given.rows * given.experts:
            return 0.0
        tiles = math.ceil((given.rows + given.experts * (ROWS - 1)) / ROWS)
        products = _product(tiles, 2 * given.inner, given.hidden) + _product(tiles, given.hidden, given.inner)
        return products + self.other(INNER_BYTES * tiles * ROWS * given.inner) + KERNELS * LAUNCH_S


def _product(tiles: int, columns: float, summed: float) -> float:
    """Seconds of `tiles` tiles of rows by all columns: each processor takes one after the other."""
    rounds = math.ceil(tiles * math.ceil(columns / ROWS) / PROCESSORS)
    return rounds * (math.ceil(summed / ROWS) * STEP_S + END_S)
