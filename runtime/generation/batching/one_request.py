"""One request over a `BatchLoop`: its rows are sequences that come together, and are told a step at a time.

    for step in one_request(loop, request): ...       one token per sequence, None where it has ended

Where ranks of dp have sequences of their own, a request is so dealt to them, row by row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from runtime.generation.batching.batch_loop import BatchLoop, Told
from runtime.generation.generation_request import GenerationRequest, Step

__all__ = ["one_request"]


def one_request(
    loop: BatchLoop, request: GenerationRequest, *, given: Sequence[Sequence[int]] | None = None
) -> Iterator[Step]:
    """On all ranks of a world alike. Raises what one of the rows meets; the others are given up with it.

    given: by row, a text whose tokens are taken in the place of chosen ones.
    """
    rows = range(len(request.prompts))
    told: list[list[Told]] = [[] for _ in rows]
    try:
        # those with the most to do first: each goes to the rank that has least to do (Graham, 1969)
        for row in sorted(rows, key=lambda row: (-len(request.prompts[row]), row)):
            loop.add(row, request.of_rows([row]), given=None if given is None else given[row])
        step = 0
        while any(not each or not each[-1].is_over for each in told) or any(len(each) > step for each in told):
            while any(len(each) <= step and not (each and each[-1].is_over) for each in told):
                for one in loop.step():
                    if one.error is not None:
                        raise one.error
                    told[one.number].append(one)
            if all(len(each) <= step for each in told):
                return
            yield _step([each[step] if len(each) > step else None for each in told], scored=request.settings.logprobs)
            step += 1
    finally:
        for row in rows:
            loop.cancel(row)


def _step(told: list[Told | None], *, scored: bool) -> Step:
    tokens = tuple(None if one is None else one.token for one in told)
    logprobs = tuple(None if one is None else one.logprob for one in told)
    return Step(tokens, logprobs if scored else None)
