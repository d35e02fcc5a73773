"""The time of one decoded token: the difference between generating many tokens and few; and the memory's speed."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from benchmarks.support.several import synchronize

__all__ = ["LENGTHS", "ROUNDS", "SMALL_LENGTHS", "Lengths", "measured_speed", "prompts", "seconds"]


class Lengths(NamedTuple):
    """Tokens of a prompt, and how many new ones are few and many."""

    prompt: int
    few: int
    many: int


LENGTHS, SMALL_LENGTHS, ROUNDS = Lengths(128, 16, 144), Lengths(8, 2, 10), 3


def measured_speed(device: torch.device | str = "cuda") -> float:
    """Bytes per second of reading."""
    device = torch.device(device)
    block = torch.ones(2**31 if device.type == "cuda" else 2**24, dtype=torch.bfloat16, device=device)
    best = float("inf")
    for _ in range(10):
        synchronize(device)
        start = time.perf_counter()
        block.sum()
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return block.nbytes / best


def prompts(batch: int, length: int = LENGTHS.prompt, vocabulary: int = 128256, device: str = "cuda") -> torch.Tensor:
    """[batch, length], the same on every device of a kind."""
    drawn = torch.Generator(device).manual_seed(0)
    return torch.randint(0, vocabulary, (batch, length), device=device, generator=drawn)


def seconds(generate: Callable[[int], object], count: int, device: torch.device | str = "cuda") -> float:
    device = torch.device(device)
    synchronize(device)
    start = time.perf_counter()
    generate(count)
    synchronize(device)
    return time.perf_counter() - start
