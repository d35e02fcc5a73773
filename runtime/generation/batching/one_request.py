"""One request over a `BatchLoop`: its rows are sequences that come together, and are told a step at a time.

    for step in one_request(loop, request): ...       one token per sequence, None where it has ended

Where ranks of dp have sequences of their own, a request is so dealt to them, row by row.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

from runtime.generation.batching.batch_loop import BatchLoop, Told
from runtime.generation.generation_request import GenerationRequest, Step

__all__ = ["one_request"]


def one_request(
    loop: BatchLoop, request: GenerationRequest, *, given: Sequence[Sequence[int]] | None
) -> Generator[Step]:
    """On all ranks of a world alike. Raises what one of the rows meets; the others are given up with it.

    given: by row, a text whose tokens are taken in the place of chosen ones.
    """
    rows = range(len(request.prompts))
    # a step of the request before may still be under way, and is about rows of these numbers
    number_of = [next(loop.numbers) for _ in rows]
    told: dict[int, list[Told]] = {number: [] for number in number_of}
    try:
        # those with the most to do first: each goes to the rank that has least to do (Graham, 1969)
        for row in sorted(rows, key=lambda row: (-len(request.prompts[row]), row)):
            loop.add(number_of[row], request.of_rows([row]), given=None if given is None else given[row])
        step, each = 0, list(told.values())
        while any(not some or not some[-1].is_over for some in each) or any(len(some) > step for some in each):
            while any(len(some) <= step and not (some and some[-1].is_over) for some in each):
                for one in loop.step():
                    if one.error is not None:
                        raise one.error
                    told[one.number].append(one)
            if all(len(some) <= step for some in each):
                return
            yield _step([some[step] if len(some) > step else None for some in each], scored=request.settings.logprobs)
            step += 1
    finally:
        for number in number_of:
            loop.cancel(number)


def _step(told: list[Told | None], *, scored: bool) -> Step:
    tokens = tuple(None if one is None else one.token for one in told)
    logprobs = tuple(None if one is None else one.logprob for one in told)
    return Step(tokens, logprobs if scored else None)
