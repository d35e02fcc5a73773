"""Sums by rows: who brings which rows where, and that two meetings are enough, whoever is late; the kernel itself.

Ranks are threads here, each of which does in order what its stream does on a GPU.
"""

import importlib.util
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from runtime.communication.channels import OwnRows
from runtime.communication.group_collectives import Group
from runtime.communication.peer_memory.mapped_memory import Geometry
from runtime.communication.peer_memory.rows import sum_rows
from runtime.communication.peer_memory.rows.sum_rows import RowSums


class Kernel:
    """What is launched as a kernel of Triton's is."""

    def __init__(self, run: Callable[..., None]) -> None:
        self._run = run

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **options: self._run(grid, *args, **options)


def sum_norm(
    grid: tuple[int, ...], x: Tensor, area: Tensor, residual: Tensor, weight: Tensor, total: Tensor, normed: Tensor,
    width: int, piece: int, eps: float, *, RANK: int, RANKS: int, ADDS: bool, WEIGHTED: bool, **others: int,  # noqa: N803
) -> None:  # fmt: skip
    assert grid == (len(x), 1, 1)
    part = slice(0, x.numel())
    found = torch.zeros_like(x)
    for rank in range(RANKS):
        found += x if rank == RANK else area[rank * piece :][part].view(x.shape)
    if ADDS:
        found += residual
    total.copy_(found)
    found = found * torch.rsqrt(found.square().mean(-1, keepdim=True) + eps) * (weight if WEIGHTED else 1)
    normed.copy_(found)
    area[RANK * piece :][part].view(x.shape).copy_(found)


def forgetful(grid: tuple[int, ...], x: Tensor, area: Tensor, *given: Any, **options: Any) -> None:
    """The others find nothing."""
    sum_norm(grid, x, area.clone(), *given, **options)


class Ranks:
    """Threads whose steps are delayed at random, and by `late_s` where rank 1 is about to sum."""

    def __init__(
        self,
        count: int,
        monkeypatch: pytest.MonkeyPatch,
        *,
        meets: bool = True,
        kernel: Any = sum_norm,
        late_s: float = 0,
    ) -> None:
        barrier = threading.Barrier(count)

        def meet(*given: Any, **options: Any) -> None:
            time.sleep(random.random() / 2000)
            if meets:
                barrier.wait(timeout=20)

        def late(*given: Any, **options: Any) -> None:
            time.sleep(late_s if options["RANK"] == 1 else random.random() / 2000)
            kernel(*given, **options)

        name = "runtime.communication.peer_memory.rows.sum_rows_kernel"
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(meet=Kernel(meet), sum_norm=Kernel(late)))
        monkeypatch.setattr("runtime.communication.peer_memory.rows.sum_rows_kernel", sys.modules[name], raising=False)
        monkeypatch.setattr(sum_rows, "ROW_BYTES", 4096)
        start = Geometry(count).start_of_rows
        memories = [torch.zeros(start + 4096, dtype=torch.uint8) for _ in range(count)]

        def buffer(rank: int, sizes: tuple[int, ...], dtype: torch.dtype, at: int) -> Tensor:
            assert dtype == torch.uint8
            return memories[rank][at : at + sizes[0]]

        handle = SimpleNamespace(buffer_ptrs=[memory.data_ptr() for memory in memories], get_buffer=buffer)
        side_stream = SimpleNamespace(begin=lambda run: run(), finish=lambda end: None)
        nobody: Any = None
        self.ends = [
            RowSums(
                Group(nobody, tuple(range(count)), rank, True), memory, handle, torch.zeros(count), (0, 0, 0),
                side_stream,  # type: ignore[arg-type]
            )
            for rank, memory in enumerate(memories)
        ]  # fmt: skip

    def each(self, run: Callable[[RowSums, int], Any]) -> list[Any]:
        found: list[Any] = [None] * len(self.ends)

        def one(rank: int) -> None:
            found[rank] = run(self.ends[rank], rank)

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(len(self.ends))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found


def many(ranks: Ranks, shape: tuple[int, ...], calls: int) -> bool:
    """Whether `calls` in a row, each on the total of the one before, yield what torch says, to 1e-12."""
    count = len(ranks.ends)
    generator = torch.Generator().manual_seed(0)
    brought = torch.randn(calls, count, *shape, dtype=torch.float64, generator=generator)
    residual, weight = torch.randn(shape, dtype=torch.float64), torch.randn(shape[-1], dtype=torch.float64)

    def run(end: RowSums, rank: int) -> list[tuple[OwnRows, Tensor]]:
        found: list[tuple[OwnRows, Tensor]] = []
        total: Tensor | OwnRows = residual
        for x in brought:
            found.append(end.begin(x[rank], total, weight, 1e-6)())
            total = found[-1][0]
        return found

    total, is_right = residual, True
    results = ranks.each(run)
    for call, x in enumerate(brought):
        total = total + x.sum(0)
        normed = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + 1e-6) * weight
        for rank, of_rank in enumerate(results):
            rows = total.view(-1, shape[-1])[OwnRows.share(total[..., 0].numel(), count, rank)]
            own, all_normed = of_rank[call]
            is_right &= torch.allclose(own.rows, rows, rtol=1e-12, atol=1e-12) and own.shape == shape
            is_right &= torch.allclose(all_normed, normed, rtol=1e-12, atol=1e-12)
    return is_right


@pytest.mark.parametrize(
    ("count", "shape"),
    [
        (2, (1, 16, 8)),
        (2, (1, 101, 8)),  # uneven, and in several rounds
        (3, (2, 7, 16)),
        (4, (1, 5, 8)),  # the last rank has none
    ],
)
def test_many_in_a_row_say_what_torch_says(count: int, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    assert many(Ranks(count, monkeypatch), shape, calls=12)


def test_a_rank_that_is_late_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert many(Ranks(2, monkeypatch, late_s=0.02), (1, 16, 8), calls=3)
    # negative controls: nobody meets; what is normed does not come where others fetch it
    assert not many(Ranks(2, monkeypatch, late_s=0.02, meets=False), (1, 16, 8), calls=3)
    assert not many(Ranks(2, monkeypatch, kernel=forgetful), (1, 16, 8), calls=3)


def test_what_is_taken_is_known_to_all(monkeypatch: pytest.MonkeyPatch) -> None:
    end = Ranks(2, monkeypatch).ends[0]
    monkeypatch.setattr(sum_rows, "LEAST_BYTES", 1024)
    x = torch.zeros(1, 64, 8, dtype=torch.bfloat16)
    assert end.takes(x, torch.zeros(8, dtype=torch.bfloat16))
    assert end.takes(x, None)
    assert not end.takes(x[:, :63], None)  # too few
    assert not end.takes(x.double(), None)
    assert not end.takes(x, torch.zeros(8))
    assert not end.takes(x.view(1, 1, 512).expand(1, 9, 512).repeat(1, 1, 3), None)  # a row that has no room


INTERPRETED = """
import torch
from runtime.communication.peer_memory.rows.sum_rows_kernel import sum_norm
def check(ranks, rank, rows, width, adds, weighs, dtype, close):
    piece = rows * width + 16
    x, residual = torch.randn(2, rows, width).to(dtype)
    area, weight = torch.randn(ranks * piece).to(dtype), torch.randn(width).to(dtype)
    total, normed = torch.empty_like(x), torch.empty_like(x)
    parts = [area[r * piece:][: rows * width].view(rows, width).double() for r in range(ranks)]
    parts[rank] = x.double()
    wanted = sum(parts) + (residual.double() if adds else 0)
    sum_norm[(rows,)](x, area, residual, weight, total, normed, width, piece, 1e-5, RANK=rank, RANKS=ranks, ADDS=adds,
                      WEIGHTED=weighs, BLOCK=1 << (width - 1).bit_length())
    torch.testing.assert_close(total.double(), wanted, rtol=close, atol=close)
    exact = total.double()
    exact = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + 1e-5) * (weight.double() if weighs else 1)
    torch.testing.assert_close(normed.double(), exact, rtol=close, atol=close)
    assert torch.equal(area[rank * piece:][: rows * width].view(rows, width), normed)
for dtype, close in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
    check(2, 0, 3, 100, True, True, dtype, close)
    check(2, 1, 3, 128, False, True, dtype, close)
    check(4, 2, 2, 65, True, False, dtype, close)
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_the_kernel_says_what_torch_says_in_tritons_interpreter() -> None:
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
