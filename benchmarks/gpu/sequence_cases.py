"""What `benchmarks.gpu.sequences` compares with, and how it has a long text in a cache without running it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional

from benchmarks.support.several import DeviceTurns
from runtime.generation.steps import Steps
from runtime.ops.attention import attention
from runtime.ops.rows.sequence_attention import attend_over_ranks
from runtime.ops.rows.share_rows import take_rows
from runtime.ops.rows.token_order import TokenOrder
from runtime.ops.rows.ulysses import by_heads

__all__ = ["SharedOut", "drawn_prompts", "limited", "torch_context_parallel"]


class SharedOut:
    """Causal attention of one layer over random tokens, of which this rank has its own, zig-zag; and over all."""

    def __init__(
        self, communicator: Any, channels: dict[str, Any], heads: tuple[int, int, int], tokens: int, dtype: torch.dtype
    ) -> None:
        """heads: query heads, kv heads, and how wide."""
        (query, kv, width), device = heads, communicator.device
        self.tokens, self.scale, self._channels = tokens, width**-0.5, channels
        self._ranks, self._number = communicator.mesh.world_size, communicator.rank
        random = torch.Generator(device).manual_seed(0)
        # token by token, as linears and rotations leave them
        self.whole = [
            torch.randn(1, tokens, count, width, device=device, dtype=dtype, generator=random).transpose(1, 2)
            for count in (query, kv, kv)
        ]
        self._mine = [self._own(x).transpose(1, 2).contiguous().transpose(1, 2) for x in self.whole]

    def _own(self, x: Tensor) -> Tensor:
        return take_rows(x, self._number, parts=self._ranks, axes=("sp",), dim=2, kind="sequence", order="zigzag")

    def by(self, way: str) -> Tensor:
        factors = {"neighbours": self._ranks // 2} if way == "ring-ulysses" else {}
        return attend_over_ranks(
            self._channels[way], *self._mine, self.tokens, None, None, how=way, parts=self._ranks,
            scale=self.scale, causal=True, **factors,
        )  # fmt: skip

    def alone(self) -> Tensor:
        return attention(*self.whole, scale=self.scale, causal=True)

    def exchanged(self) -> Tensor:
        """By ulysses, without attention: queries in the place of its results."""
        order = TokenOrder.of(self.tokens, self._ranks)
        return by_heads(
            self._channels["ulysses"], *self._mine, lambda q, *others: q,
            queries=order, mask=None, sinks=None, kv_map=None,
        )  # fmt: skip

    def require_alike(self, ways: Iterable[str]) -> float:
        """How far the ways are off, of the largest number."""
        wanted = self._own(self.alone())
        off = max(float((self.by(way) - wanted).abs().max() / wanted.abs().max()) for way in ways)
        assert off < (1e-4 if wanted.dtype == torch.float32 else 2e-2), off
        return off


def torch_context_parallel(turns: DeviceTurns, whole: list[Tensor], scale: float, rounds: int) -> tuple[float, str]:
    """Seconds of torch's context parallelism on q, k and v of all tokens, causal; and what it took them as.

    Its buffers are dealt out, zig-zag, before the clock starts. Grouped heads where it takes them, or copies.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel
    from torch.nn.attention import SDPBackend, sdpa_kernel

    mesh = init_device_mesh("cuda", (dist.get_world_size(),), mesh_dim_names=("cp",))
    why = ""
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        for grouped in (True, False):
            q, k, v = (each.clone(memory_format=torch.contiguous_format) for each in whole)
            if not grouped:
                k, v = (each.repeat_interleave(q.shape[1] // each.shape[1], 1) for each in (k, v))
            try:
                with (
                    sdpa_kernel(backend),
                    context_parallel(mesh, buffers=[q, k, v], buffer_seq_dims=[2, 2, 2], no_restore_buffers={q, k, v}),
                ):

                    def call(q: Tensor = q, k: Tensor = k, v: Tensor = v, grouped: bool = grouped) -> Tensor:
                        return functional.scaled_dot_product_attention(
                            q, k, v, is_causal=True, scale=scale, enable_gqa=grouped
                        )

                    times = turns.medians({"torch": call}, rounds=rounds)
            except (RuntimeError, ValueError, TypeError, NotImplementedError, AssertionError) as error:
                why = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
                continue
            return times["torch"], f"{backend.name.lower()}, kv heads {'shared' if grouped else 'copied'}"
    return 0.0, why


@contextmanager
def drawn_prompts() -> Iterator[None]:
    """All pieces of a prompt but the last are told to the cache, whose keys and values are drawn, and are not run."""
    original = Steps.prefill

    def prefill(self: Steps, pieces: Iterable[Any]) -> Tensor:
        *before, last = pieces
        for buffer in self.cache.buffers.values():
            buffer.normal_()
        for piece in before:
            self.cache.begin(self._inputs(piece, decode=False)[0])
        return original(self, [last])

    Steps.prefill = prefill  # type: ignore[method-assign]
    try:
        yield
    finally:
        Steps.prefill = original  # type: ignore[method-assign]


def limited(turns: DeviceTurns, run_split: Callable[[], object], run_alone: Callable[[], object]) -> list[str]:
    """Ranks run a prompt, then again under a limit of a tenth more than that took; then one GPU under that limit.

    Each of the two builds its engine, and drops it. Memory that others write into is not torch's allocator's, and is
    not in the limit.
    """
    device = turns.device
    torch.cuda.reset_peak_memory_stats(device)
    run_split()
    most = turns.slowest([float(torch.cuda.max_memory_reserved(device))])[0]
    total = torch.cuda.get_device_properties(device).total_memory
    limit = int(1.1 * most)
    said = [f"ranks had {most / 2**30:.1f} GiB at their peak; the limit is {limit / 2**30:.1f} GiB on each GPU"]
    for name, run in (("ranks", run_split), ("1 GPU", run_alone)):
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(limit / total, device)
        try:
            run()
            said.append(f"{name}: runs")
        except torch.OutOfMemoryError as error:
            said.append(f"{name}: {str(error).partition('.')[0]}")
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, device)
        turns.meet()
    return said
