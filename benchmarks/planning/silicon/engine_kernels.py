"""Kernels that engines ran in the measured rows and the grids have not: nothing fitted on rows.

    contiguous    vLLM 0.12 on Hopper: experts of checkpoints with blockwise float8, however few tokens a step has
    own           other experts: by the engine's own tables of that very shape, where the grids have the fastest kernels
                  of all engines. vLLM 0.19 needs 1.5 ms for 8192 tokens of MiniMax M2.5 over 8 ranks, where the
                  fastest needs 0.9

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

import functools
import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from partitioner.planning.kernels import Grouped, Kernels
from partitioner.planning.pricing.batching import Curve
from partitioner.planning.pricing.kernel_times import LAUNCH_S

__all__ = ["ContiguousExperts", "TableExperts", "expert_times"]

ROWS = 128
PROCESSORS = 132
FEW = 256
"""Tokens: of fewer, tables of some versions have the time to launch kernels in them, and engines' steps are captured:
TensorRT-LLM 1.3.0rc10 takes 137 us for a token of DeepSeek-V3 over 8 ranks, rc20 41.
"""
ROUTING = "power_law_1.01"
SIZES = ("moe_tp_size", "hidden_size", "inter_size", "topk", "num_experts", "moe_ep_size")
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


@dataclass(frozen=True)
class TableExperts(Kernels):
    """As `Kernels`, but experts take what the engine's own tables say of their sizes, where they do.

    times: by parts of an expert, hidden, inner, chosen, experts and ep: seconds by tokens. sizes: of the rank's plan,
    in the same order without hidden and inner.
    """

    times: Mapping[tuple[int, ...], Curve] = field(default_factory=dict)
    sizes: tuple[int, int, int, int] = (1, 1, 1, 1)

    @classmethod
    def of(cls, known: Kernels, times: Mapping[tuple[int, ...], Curve], sizes: tuple[int, int, int, int]) -> Kernels:
        return cls(**vars(known), times=times, sizes=sizes)

    def experts(self, given: Grouped, *, table: str = "") -> float:
        parts, chosen, count, ep = self.sizes
        known = self.times.get((parts, round(given.hidden), round(given.inner * parts), chosen, count, ep))
        if known is None or not given.rows * given.experts:
            return Kernels.experts(self, given, table=table)
        return known.at(given.rows * ep / chosen)


@functools.cache
def expert_times(folder: Path, device: str, engine: str, dtype: str) -> Mapping[tuple[int, ...], Curve]:
    """Of an engine's oldest version with a table, which is newer than all rows are; of `FEW` tokens, of the fastest.
    Routing as in the grids. folder: an unpacked wheel.
    """
    import pyarrow.parquet as pq  # type: ignore[import-not-found]

    known = [path for path in folder.rglob("moe_perf.parquet") if path.parts[-5:-2] == (device, "moe", engine)]
    known.sort(key=lambda path: [int(part) for part in re.findall(r"\d+", path.parent.name)])
    found: dict[tuple[int, ...], dict[int, float]] = defaultdict(dict)
    for path in known:
        for row in pq.read_table(path).to_pylist():
            sizes, tokens, seconds = tuple(row[name] for name in SIZES), row["num_tokens"], row["latency"] * 1e-3
            told = row["moe_dtype"] == dtype and row["distribution"] == ROUTING
            if told and (path == known[0] or tokens < FEW):
                found[sizes][tokens] = min(seconds, found[sizes].get(tokens, math.inf))
    return {sizes: Curve(*zip(*sorted(points.items()), strict=True)) for sizes, points in found.items()}
