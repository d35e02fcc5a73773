"""Random numbers as a function of what they are for: no state, so no rank, batch or order can change them.

    random_bits(seed, a[..], b[..], ..)   64 bits for every (seed, a, b, ..); the counters broadcast
    gumbel(bits[..], c[..])               standard Gumbel noise (float64) for every (seed, a, b, .., c)

Counter-based generation follows Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011). The mixer is
SplitMix64's (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014): with one counter
this is that generator. Each further counter starts a new stream from the bits so far, as its `split` does; for equal
leading counters, streams of different last counters never meet, because every stage is a bijection.

Everything up to the 64 bits is integer arithmetic modulo 2^64 (two's complement wraps alike on CPU and CUDA), so the
bits are the same everywhere; the two logarithms may differ in the last digit between kinds of device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["as_signed", "gumbel", "mix", "random_bits"]


def as_signed(word: int) -> int:
    """The 64-bit `word` as torch's int64 holds it."""
    return word - (1 << 64) if word >> 63 else word


_GAMMA = as_signed(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, odd
_FIRST = as_signed(0xBF58476D1CE4E5B9)
_SECOND = as_signed(0x94D049BB133111EB)


def mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser: a bijection of 64 bits in which every bit of the input moves half of the output's."""
    x = (x ^ _shift_right(x, 30)) * _FIRST
    x = (x ^ _shift_right(x, 27)) * _SECOND
    return x ^ _shift_right(x, 31)


def random_bits(seed: int | Sequence[int] | Tensor, *counters: Tensor) -> Tensor:
    """64 random bits (int64) for every combination of counters[..] (int64, broadcast against each other).

    seed: one for each of the counters' last dim, where there are several; as a tensor, by `as_signed`.
    """
    if isinstance(seed, Tensor):
        bits = seed
    elif isinstance(seed, int):  # a CPU scalar, which torch combines with tensors of any device
        bits = torch.tensor(as_signed(seed))
    else:
        bits = torch.tensor([as_signed(each) for each in seed]).to(counters[0].device)
    for counter in counters:
        bits = _next(bits, counter)
    return bits


def gumbel(bits: Tensor, counter: Tensor) -> Tensor:
    """Standard Gumbel noise, float64, with `counter` as the last one after those that `bits` come from.

    In two halves, so that what a whole row has in common is hashed once per row, on the CPU if it is known there.
    """
    # 52 bits and a fixed last one: the middles of 2^52 equal parts of (0, 1), exact in float64. With 53 free bits the
    # last middle would round to 1, and its token would always win
    odd = _shift_right(_next(bits, counter), 11) | 1
    uniform = odd.double() * 2.0**-53
    return -torch.log(-torch.log(uniform))


def _next(bits: Tensor, counter: Tensor) -> Tensor:
    return mix(torch.add(bits + _GAMMA, counter, alpha=_GAMMA))


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Shift in zeros; int64's own shift repeats the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
