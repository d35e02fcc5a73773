"""Where a prompt is cut into chunks that follow each other through the stages.

    a chunk      n tokens behind s others cost n + n (s + n / 2) / pairs_per_token, and so many tokens besides
    in all       stages take as long as all chunks, and (stages - 1) times as long as the dearest one
    how dear     so that this is shortest: the root of cost of all x what each costs besides / (stages - 1)
    how long     equally dear ones, so that later ones have fewer tokens, as they see more

GPUs have powers of two, none dearer than that. A GPU does so many rows of a product or of attention at a time that
other numbers leave part of it idle: 1,792 tokens take as long as 2,048 on an H200. Where half a chunk would keep its
host longer than itself, it is not halved. Other prompts are cut at the same places, for which kernels are prepared.
"""

from __future__ import annotations

import itertools
import math

__all__ = ["chunk_ends"]

_BESIDES, _BESIDES_ON_GPUS = 20, 250
"""What a chunk costs besides its tokens, in tokens: weights are read, kernels are begun, and their last ones wait. On a
CPU, products of few rows are done at a lower rate: a prompt of 1,024 tokens over two stages came 1.72 times sooner than
on one with 20, 1.48 times with 5."""
_OF_DEAREST = 0.75
"""What a power of two costs, in the mean, of the dearest one that is allowed."""
_FEWEST_TOKENS = 64
"""Of a chunk on a CPU, where it is not the prompt that is short."""
_LAUNCHED = 1400
"""The cost of a piece that takes a GPU as long as its host: of an H200 that runs an 8B decoder node by node, 0.85 ms a
layer. Larger ones have more to do in a layer."""


def chunk_ends(
    tokens: int,
    *,
    stages: int,
    longest: int,
    pairs_per_token: int,
    rows: int = 1,
    groups: int = 1,
    device: str = "cpu",
    multiple_of: int = 1,
) -> list[int]:
    """The last tokens' ends, in order; see the module's docstring.

    stages: that each chunk goes through. longest: the most tokens of a chunk. pairs_per_token: how many pairs of a
    query and a key cost what a token costs elsewhere, 0: nobody knows. rows: of all prompts, in so many groups that go
    one after the other. device: the type of the stages'. multiple_of: ranks that share out tokens get as many each, but
    for the last chunk.
    """
    many = {"stages": stages, "rows": rows, "groups": groups}
    cut = {"longest": longest, "pairs_per_token": pairs_per_token}
    found = _in_powers_of_two(tokens, **many, **cut) if device == "cuda" else _equally_dear(tokens, **many, **cut)
    if multiple_of == 1 or longest < multiple_of:
        return found
    rounded = (end - end % multiple_of for end in found[:-1])
    found = sorted({end for end in rounded if end} | {tokens})
    return _no_longer_than(found, longest if longest >= tokens else longest - longest % multiple_of)


def _cost(start: int, tokens: int, pairs_per_token: int) -> float:
    """Of a chunk behind `start` tokens, in tokens that see nothing."""
    return tokens + (tokens * (start + tokens / 2) / pairs_per_token if pairs_per_token else 0)


def _tokens_for(cost: float, start: int, pairs_per_token: int) -> float:
    """How many tokens behind `start` others have this cost."""
    if not pairs_per_token:
        return cost
    each = pairs_per_token + start
    return math.sqrt(each**2 + 2 * cost * pairs_per_token) - each


def _in_powers_of_two(
    tokens: int, *, stages: int, rows: int, groups: int, longest: int, pairs_per_token: int
) -> list[int]:
    """No chunk is dearer than pays, unless half of it would be too short."""
    in_all = rows * _cost(0, tokens, pairs_per_token)
    most = math.sqrt(in_all * _BESIDES_ON_GPUS / _OF_DEAREST / (stages - 1)) if stages > 1 else in_all
    start, ends = 0, list[int]()

    def costs(size: int) -> float:
        """Of a piece of these rows that begins here."""
        return rows / groups * _cost(start, min(size, tokens - start), pairs_per_token)

    size = 1 << (longest.bit_length() - 1)
    if costs(size) < _LAUNCHED:
        size = longest
    while start < tokens:
        while costs(size) > most and costs(size // 2) >= _LAUNCHED:
            size //= 2
        start = min(start + size, tokens)
        ends.append(start)
    return ends


def _equally_dear(tokens: int, *, stages: int, rows: int, groups: int, longest: int, pairs_per_token: int) -> list[int]:
    """As many as pay, or more where they would be longer than allowed: first as many of the longest as it takes."""
    in_all = rows * _cost(0, tokens, pairs_per_token)
    paid = round(math.sqrt((stages - 1) * in_all / _BESIDES) / groups)
    count = max(1, min(paid, tokens // _FEWEST_TOKENS), -(-tokens // longest))
    start, ends = 0, list[int]()
    while True:
        left = max(1, count - len(ends), -(-(tokens - start) // longest))
        cost = _cost(start, tokens - start, pairs_per_token) / left
        if _tokens_for(cost, start, pairs_per_token) <= longest:
            break
        start += longest
        ends.append(start)
    inner = (start + max(1, round(_tokens_for(cost * i, start, pairs_per_token))) for i in range(1, left))
    return _no_longer_than(sorted({*ends, *inner, tokens}), longest)


def _no_longer_than(ends: list[int], longest: int) -> list[int]:
    """With more ends, where what lies between two is longer."""
    pairs = itertools.pairwise([0, *ends])
    return [min(at + longest, end) for start, end in pairs for at in range(start, end, longest)]
