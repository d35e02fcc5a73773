"""Where a prompt is cut into chunks that follow each other through the stages.

    a chunk      n tokens behind s others cost n + n (s + n / 2) / pairs_per_token, and so many tokens besides
    in all       stages take as long as all chunks, and (stages - 1) times as long as the dearest one
    how many     so many that this is shortest: the root of (stages - 1) x cost of all / what each costs besides
    how long     equally dear ones, so that later ones have fewer tokens, as they see more

On a GPU chunks are multiples of 256 tokens, short ones of 64, and the dearest one is one of few: nearly as good, as
what is shortest is flat there, and prompts of other lengths begin with the same chunks, for which kernels are prepared
already.
"""

from __future__ import annotations

import itertools
import math

__all__ = ["chunk_ends"]

_BESIDES = {"cuda": 200}
"""What a chunk costs besides its tokens, in tokens: weights are read, kernels are begun, and their last ones wait."""
_BESIDES_ELSEWHERE = 5
_FEWEST_TOKENS = 64
"""Of a chunk, where it is not the prompt that is short."""
_LONG = 1024
_MULTIPLES = 64, 256
"""Of chunks that are shorter than that and of others: a GPU's products and attention do as many rows at a time."""


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
    count = _count(tokens, stages=stages, pairs_per_token=pairs_per_token, rows=rows, groups=groups, device=device)
    count = max(1, min(count, tokens // _FEWEST_TOKENS), -(-tokens // longest))
    if pairs_per_token and device in _BESIDES:
        found = _in_multiples(tokens, count, longest=longest, pairs_per_token=pairs_per_token)
    else:
        found = _equally_dear(tokens, count, longest=longest, pairs_per_token=pairs_per_token)
    if multiple_of == 1 or longest < multiple_of:
        return found
    rounded = (end - end % multiple_of for end in found[:-1])
    found = sorted({end for end in rounded if end} | {tokens})
    return _no_longer_than(found, longest if longest >= tokens else longest - longest % multiple_of)


def _count(tokens: int, *, stages: int, pairs_per_token: int, rows: int, groups: int, device: str) -> int:
    """How many chunks of each group's prompts are best."""
    besides = _BESIDES.get(device, _BESIDES_ELSEWHERE)
    cost = rows * _cost(0, tokens, pairs_per_token)
    return round(math.sqrt((stages - 1) * cost / besides) / groups)


def _cost(start: int, tokens: int, pairs_per_token: int) -> float:
    """Of a chunk behind `start` tokens, in tokens that see nothing."""
    return tokens + (tokens * (start + tokens / 2) / pairs_per_token if pairs_per_token else 0)


def _tokens_for(cost: float, start: int, pairs_per_token: int) -> float:
    """How many tokens behind `start` others have this cost."""
    if not pairs_per_token:
        return cost
    each = pairs_per_token + start
    return math.sqrt(each**2 + 2 * cost * pairs_per_token) - each


def _in_multiples(tokens: int, count: int, *, longest: int, pairs_per_token: int) -> list[int]:
    cost = 2 ** (round(2 * math.log2(_cost(0, tokens, pairs_per_token) / count)) / 2)
    multiple = min(_MULTIPLES[tokens >= count * _LONG], longest)
    ends = [0]
    while ends[-1] < tokens:
        size = min(int(_tokens_for(cost, ends[-1], pairs_per_token)), longest)
        ends.append(min(ends[-1] + max(multiple, size - size % multiple), tokens))
    return ends[1:]


def _equally_dear(tokens: int, count: int, *, longest: int, pairs_per_token: int) -> list[int]:
    while True:
        cost = _cost(0, tokens, pairs_per_token) / count
        inner = (max(1, round(_tokens_for(cost * i, 0, pairs_per_token))) for i in range(1, count))
        ends = sorted({*inner, tokens})
        if max(b - a for a, b in itertools.pairwise([0, *ends])) <= longest:
            return ends
        count += 1


def _no_longer_than(ends: list[int], longest: int) -> list[int]:
    """With more ends, where what lies between two is longer."""
    pairs = itertools.pairwise([0, *ends])
    return [min(at + longest, end) for start, end in pairs for at in range(start, end, longest)]
