"""The inputs of a run on its device, by the names that a rank's program has for them."""

from __future__ import annotations

import functools
import itertools
from array import array
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from partitioner.errors import InputError
from runtime.execution.prompts.piece import Piece
from runtime.kv_cache.batch import Batch
from runtime.program.rank_program import RankProgram

__all__ = ["filled_up", "inputs_of", "on_device"]


def on_device(numbers: Sequence[Any], device: torch.device) -> Tensor:
    """As a tensor, for which the host does not wait until the device has done what it was told before."""
    given = torch.tensor(numbers)
    return given.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else given


def _columns(tokens: Sequence[int], positions: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """[B, 1] each; on a CPU, where each token waits for it, with as few ops as can be."""
    if device.type != "cpu":
        return on_device([[token] for token in tokens], device), on_device([[at] for at in positions], device)
    both = torch.frombuffer(array("q", [*tokens, *positions]), dtype=torch.int64)
    ids, at = both.view(2, len(tokens), 1).unbind()
    return ids, at


@functools.lru_cache(64)
def _zeros(count: int) -> Tensor:
    """Which tokens are the last of so many single ones, on a CPU: no graph writes to its inputs."""
    return torch.zeros(count, dtype=torch.int64, device="cpu")


def filled_up(piece: Piece, size: int) -> list[list[int]]:
    """Its rows with `size` tokens each, the last one repeated."""
    return [row + row[-1:] * (size - len(row)) for row in piece.tokens]


def inputs_of(
    piece: Piece, program: RankProgram, device: torch.device, *, least: int, least_slots: int
) -> tuple[Batch, list[Tensor]]:
    """A run of `piece` as a cache is told of it, and the inputs of its program in their order.

    least: how many tokens each row is filled up to, if not more. least_slots: how many slots there are at least. Raises
    `InputError` where the program wants what a text does not say.
    """
    counts = [len(row) for row in piece.tokens]
    size = max(*counts, least)
    last = [count - 1 for count in counts]
    is_single = size == 1 and not piece.packed
    if piece.packed:
        rows = zip(piece.starts, counts, strict=True)
        ids = on_device([[token for row in piece.tokens for token in row]], device)
        positions = on_device([[at for start, count in rows for at in range(start, start + count)]], device)
        ends = zip(itertools.accumulate(counts), piece.completes, strict=True)
        last = [end - 1 for end, is_told in ends if is_told] or [sum(counts) - 1]
    elif is_single:
        ids, positions = _columns([token for (token,) in piece.tokens], piece.starts, device)
    else:
        ids = on_device(filled_up(piece, size), device)
        offsets = torch.arange(size, device=device).minimum(on_device(last, device)[:, None])
        positions = on_device(piece.starts, device)[:, None] + offsets
    batch = Batch(positions, tuple(piece.starts), tuple(counts), piece.active, piece.packed)
    known: dict[str, Callable[[], Tensor]] = {
        "input_ids": lambda: ids,
        "position_ids": lambda: positions,
        "last": lambda: _zeros(len(last)) if is_single and device.type == "cpu" else on_device(last, device),
        "active": lambda: on_device(piece.active, device),
        "slots": lambda: torch.arange(max(batch.end + 1, least_slots), device=device),
    }
    for wanted in program.inputs:
        if wanted.name not in known:
            raise InputError(f"generation knows nothing to give the input {wanted.name!r} of this model")
    return batch, [known[wanted.name]() for wanted in program.inputs]
