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
    if size == 1 and device.type == "cpu" and not piece.packed:
        return _single_on_host(piece, program, least_slots)
    last = [count - 1 for count in counts]
    if piece.packed:
        rows = zip(piece.starts, counts, strict=True)
        ids = on_device([[token for row in piece.tokens for token in row]], device)
        positions = on_device([[at for start, count in rows for at in range(start, start + count)]], device)
        ends = zip(itertools.accumulate(counts), piece.completes, strict=True)
        last = [end - 1 for end, is_told in ends if is_told] or [sum(counts) - 1]
    elif size == 1:
        ids, positions = on_device(piece.tokens, device), on_device([[at] for at in piece.starts], device)
    else:
        ids = on_device(filled_up(piece, size), device)
        offsets = torch.arange(size, device=device).minimum(on_device(last, device)[:, None])
        positions = on_device(piece.starts, device)[:, None] + offsets
    batch = Batch(positions, tuple(piece.starts), tuple(counts), piece.active, piece.packed)
    known: dict[str, Callable[[], Tensor]] = {
        "input_ids": lambda: ids,
        "position_ids": lambda: positions,
        "last": lambda: on_device(last, device),
        "active": lambda: on_device(piece.active, device),
        "slots": lambda: torch.arange(max(batch.end + 1, least_slots), device=device),
    }
    return batch, [_known(known, wanted.name)() for wanted in program.inputs]


def _single_on_host(piece: Piece, program: RankProgram, least_slots: int) -> tuple[Batch, list[Tensor]]:
    """The same of a token of each row, on a CPU, where the next one waits for it: with as few ops as can be."""
    starts, count = piece.starts, len(piece.starts)
    both = torch.frombuffer(array("q", [*itertools.chain(*piece.tokens), *starts]), dtype=torch.int64)
    ids, positions = both.view(2, count, 1).unbind()
    batch = Batch(positions, tuple(starts), (1,) * count, piece.active)
    values = []
    for wanted in program.inputs:
        match wanted.name:
            case "input_ids":
                values.append(ids)
            case "position_ids":
                values.append(positions)
            case "last":
                values.append(_zeros(count))
            case name:
                known = {
                    "active": lambda: torch.tensor(piece.active, device="cpu"),
                    "slots": lambda: torch.arange(max(batch.end + 1, least_slots), device="cpu"),
                }
                values.append(_known(known, name)())
    return batch, values


def _known(known: dict[str, Callable[[], Tensor]], name: str) -> Callable[[], Tensor]:
    if name not in known:
        raise InputError(f"generation knows nothing to give the input {name!r} of this model")
    return known[name]
