"""Recognise the kind of an attention mask from its mask function, by asking it about positions.

transformers describes a mask by a pure function `mask_function(batch, head, query, key) -> bool`. Asked along the
first column and the last row of a very long sequence it gives away its window or chunk; asked around all the edges of
that guess, it confirms it. A function that reads tensors of the batch (blocks, packing) cannot answer beyond them and
is not recognised.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.ops.attention import allowed

__all__ = ["MaskKind", "recognize"]

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
LONGEST = 1 << 20
"""Positions up to which a mask is explored; a window beyond it has no effect on any model there is."""


@dataclass(frozen=True)
class MaskKind:
    """What each query may see, in the words of `runtime.ops.attention.allowed`."""

    causal: bool
    window: int | None = None
    chunk: int | None = None


def recognize(function: MaskFunction, *, batch: int) -> MaskKind | None:
    """The kind of `function`, or None where it is none of those we know."""
    try:
        kind = _guess(function)
        return kind if kind is not None and _confirmed(function, kind, batch) else None
    except (IndexError, RuntimeError):
        return None


def _ask(function: MaskFunction, queries: Tensor, keys: Tensor, batch: int = 0) -> Tensor:
    rows = torch.full((1, 1, 1, 1), batch)
    seen = function(
        rows, torch.zeros(1, 1, 1, 1, dtype=torch.long), queries[None, None, :, None], keys[None, None, None, :]
    )
    return seen.expand(1, 1, len(queries), len(keys))[0, 0]


def _guess(function: MaskFunction) -> MaskKind | None:
    start, line = torch.zeros(1, dtype=torch.long), torch.arange(LONGEST)
    causal = not bool(_ask(function, start, torch.ones(1, dtype=torch.long)).item()) and not bool(
        _ask(function, torch.tensor([LONGEST // 2]), torch.tensor([LONGEST // 2 + 1])).item()
    )
    reach = int(_ask(function, line, start).sum().item())  # how many queries see the first key
    if reach == 0:
        return None
    if reach == LONGEST:
        return MaskKind(causal)
    if reach == 1 and not causal:
        return None
    # beyond the reach of key 0: does key 1 still see the next query (a window slides) or not (a chunk ends)?
    slides = bool(_ask(function, torch.tensor([reach]), torch.ones(1, dtype=torch.long)).item())
    return MaskKind(causal, window=reach) if slides or reach == 1 else MaskKind(causal, chunk=reach)


def _confirmed(function: MaskFunction, kind: MaskKind, batch: int) -> bool:
    limit = kind.window or kind.chunk or 1
    edges = {i * limit + j for i in (0, 1, 2, 3, 7) for j in range(-3, 4)} | set(range(64))
    edges |= {LONGEST - 1 - i for i in range(64)} | {i * LONGEST // 17 for i in range(17)}
    positions = torch.tensor(sorted(i for i in edges if 0 <= i < LONGEST))
    # whole lines as well: a hole between the edges is seen from the last query and from the first key
    line, first, last = torch.arange(LONGEST), torch.zeros(1, dtype=torch.long), torch.tensor([LONGEST - 1])
    for queries, keys in ((last, line), (line, first)):
        expected = allowed(queries[:, None], keys, causal=kind.causal, window=kind.window, chunk=kind.chunk)
        if not torch.equal(_ask(function, queries, keys), expected):
            return False
    expected = allowed(positions[:, None], positions, causal=kind.causal, window=kind.window, chunk=kind.chunk)
    return all(torch.equal(_ask(function, positions, positions, b), expected) for b in {0, batch - 1})
