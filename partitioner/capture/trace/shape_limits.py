"""For which batch sizes and sequence lengths the trace holds: the sizes at which every decision of the trace comes
out the same.

While it traces, torch records each comparison of sizes that was made ("guards"). Export refuses those that pin a size
to a number, but not those like `padded(s) // 64 == 1`, which hold for 1 to 64 only. So the guards are asked, size by
size. Two kinds do not count:

    made inside an op, and not an equality   is this tensor contiguous, do these strides tie: the op stands either way
    fails only where both neighbours hold    `if padding > 0`: at the sizes between, what it guards does nothing
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import sympy
import torch

from partitioner.errors import CaptureError

__all__ = ["check_together", "decisions", "interval"]

_TORCH = Path(torch.__file__).parent
_LIKE_A_MODEL = (_TORCH / "nn", _TORCH / "functional.py")
"""Parts of torch whose Python decides as a model's does."""

_DENSE = 4096
_POINTS = sorted(
    {*range(2, 10), *(2**i + j for i in range(4, 21) for j in (-1, 0, 1)), 37, 97, 211, 1000, 10007, 10**6 + 3}
)
"""Sizes to try first: around powers of two, because chunks are; primes, because they divide by nothing."""


def decisions(guards: Iterable[Any]) -> list[sympy.Basic]:
    """The expressions of those of a ShapeEnv's guards on which the graph depends."""
    found: dict[sympy.Basic, None] = {}
    for guard in guards:
        frame = guard.sloc.framework_loc
        file = Path(frame.filename) if hasattr(frame, "filename") else None
        inside = file is not None and file.is_relative_to(_TORCH) and not any(map(file.is_relative_to, _LIKE_A_MODEL))
        if not inside or isinstance(guard.expr, sympy.Eq):
            found[guard.expr] = None
    return list(found)


def interval(
    guards: Iterable[sympy.Basic], symbol: sympy.Symbol, hint: int, others: dict[sympy.Symbol, int]
) -> tuple[int, int | None]:
    """The sizes around `hint` (inclusive; None: without end) at which all guards hold, the other symbols at `others`.

    Size 1 counts as allowed where 2 is: torch takes every traced size to be at least 2, and so says nothing about 1.
    """
    values = {other: sympy.Integer(value) for other, value in others.items()}
    doubtful = []
    for guard in dict.fromkeys(guards):
        at_others = guard.xreplace(values)
        if at_others.free_symbols == {symbol} and not all(_holds(at_others, symbol, n) for n in _POINTS):
            doubtful.append(at_others)

    def good(size: int) -> bool:
        return all(_holds(guard, symbol, size) for guard in doubtful)

    if not doubtful:
        return 1, None
    low = _last_good(good, hint, [n for n in reversed(_POINTS) if n < hint], step=-1)
    high = _last_good(good, hint, [n for n in _POINTS if n > hint], step=1)
    return (1 if low == 2 else low), (None if high == _POINTS[-1] else high)


def check_together(guards: Iterable[sympy.Basic], symbols: dict[str, sympy.Symbol], *, name: str) -> None:
    """Raises where a decision depends on how many slots there are to how many tokens, if there is one to spare."""
    if not {"slots", "sequence"} <= symbols.keys():
        return
    slots, sequence = symbols["slots"], symbols["sequence"]
    both = [guard for guard in dict.fromkeys(guards) if {slots, sequence} <= guard.free_symbols]
    for guard in both:
        for size in _POINTS:
            for spare in (1, 2, size, 1000):
                at = guard.xreplace({slots: sympy.Integer(size + spare), sequence: sympy.Integer(size)})
                if at.free_symbols <= {symbols.get("batch")} and at == sympy.false:
                    raise CaptureError(f"{name} decides by how many tokens came before: {guard}")


def _holds(guard: sympy.Basic, symbol: sympy.Symbol, size: int) -> bool:
    try:
        if guard.xreplace({symbol: sympy.Integer(size)}) == sympy.true:
            return True
        neighbours = [guard.xreplace({symbol: sympy.Integer(n)}) == sympy.true for n in (size - 1, size + 1)]
        return all(neighbours) and not isinstance(guard, sympy.Eq)
    except (ValueError, ZeroDivisionError):
        return False  # a comparison that has no answer at this size was not made at this size


def _last_good(good: Callable[[int], bool], start: int, points: list[int], *, step: int) -> int:
    last = start
    for point in points:
        if not good(point):
            between = range(last + step, point, step)
            if len(between) <= _DENSE:
                return next((size - step for size in between if not good(size)), point - step)
            return between[bisect.bisect_left(between, True, key=lambda size: not good(size)) - 1]
        last = point
    return last
