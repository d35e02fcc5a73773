"""Where a prompt is cut into chunks that follow each other through the stages.

    a chunk      n tokens behind s others cost n + n (s + n / 2) / pairs_per_token, and so many tokens besides
    in all       stages take as long as all chunks, and (stages - 1) times as long as the dearest one
    how many     so many that this is shortest: the root of (stages - 1) x cost of all / what each costs besides
    how long     equally dear ones, so that later ones have fewer tokens, as they see more

GPUs have powers of two from 1,024 tokens on, eight chunks for each stage or more, each no dearer than an equal part:
other prompts are cut at the same places, for which kernels are prepared already. With `EVEN_ON_GPUS` the above holds
there too.
"""

from __future__ import annotations

import itertools
import math

from runtime.pipeline.schedule import PIECES_PER_STAGE

__all__ = ["chunk_ends"]

EVEN_ON_GPUS = False
"""Off, as it has not been measured. Then chunks are multiples of 256 tokens, short ones of 64, and the dearest one is
one of few costs: prompts of other lengths begin with the same chunks. `flash_attention.COMES_AGAIN` is to be 256 then.
"""
_BESIDES, _BESIDES_ON_GPUS = 5, 200
"""What a chunk costs besides its tokens, in tokens: weights are read, kernels are begun, and their last ones wait."""
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
    many = {"stages": stages, "rows": rows, "groups": groups}
    cut = {"longest": longest, "pairs_per_token": pairs_per_token}
    if device != "cuda":
        found = _equally_dear(tokens, _best_count(tokens, _BESIDES, **many, **cut), **cut)
    elif EVEN_ON_GPUS and pairs_per_token:
        found = _in_multiples(tokens, _best_count(tokens, _BESIDES_ON_GPUS, **many, **cut), **cut)
    else:
        found = _equally_dear(tokens, _within(tokens, -(-PIECES_PER_STAGE * stages // groups), longest), **cut)
        if pairs_per_token and min(end - start for start, end in itertools.pairwise([0, *found])) >= _LONG:
            found = _in_powers_of_two(tokens, _cost(0, tokens, pairs_per_token) / len(found), **cut)
    if multiple_of == 1 or longest < multiple_of:
        return found
    rounded = (end - end % multiple_of for end in found[:-1])
    found = sorted({end for end in rounded if end} | {tokens})
    return _no_longer_than(found, longest if longest >= tokens else longest - longest % multiple_of)


def _best_count(
    tokens: int, besides: int, *, stages: int, rows: int, groups: int, longest: int, pairs_per_token: int
) -> int:
    """How many chunks each group's prompts have. besides: what each costs besides its tokens."""
    cost = rows * _cost(0, tokens, pairs_per_token)
    return _within(tokens, round(math.sqrt((stages - 1) * cost / besides) / groups), longest)


def _within(tokens: int, count: int, longest: int) -> int:
    return max(1, min(count, tokens // _FEWEST_TOKENS), -(-tokens // longest))


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


def _in_powers_of_two(tokens: int, most: float, *, longest: int, pairs_per_token: int) -> list[int]:
    """Chunks that cost at most so much each, or are the shortest that there are."""
    ends = [0]
    size = 1 << (longest.bit_length() - 1)
    while ends[-1] < tokens:
        while size > _LONG and _cost(ends[-1], min(size, tokens - ends[-1]), pairs_per_token) > most:
            size //= 2
        ends.append(min(ends[-1] + size, tokens))
    return ends[1:]


def _equally_dear(tokens: int, count: int, *, longest: int, pairs_per_token: int) -> list[int]:
    """So many, or more where they would be longer than allowed: then as many of the longest as it takes come first."""
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
