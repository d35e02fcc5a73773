"""Generation against the model's own code: one forward pass over prompt and new tokens, without a cache.

If each new token is the likeliest after all before it, and its log-probability is the model's, then a loop over the
model alone would have said the same: by induction, its text would have been the same up to there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from partitioner import Parts
from runtime.generation.generation_request import Generated
from tests.support import reference
from tests.support.partitioned import tokens, traced

LENGTHS = (1, 5, 11, 30)


def prompts(name: str, lengths: Sequence[int] = LENGTHS) -> list[list[int]]:
    return [tokens(name, length, batch=1)[0].tolist() for length in lengths]


def error(name: str, parts: Parts[Any], texts: Sequence[Sequence[int]], *, new: int = 8, **options: Any) -> float:
    """The largest difference of a log-probability from the model's; inf where a token is not its likeliest."""
    found = parts.generate(texts, max_new_tokens=new, eos_token_id=[], logprobs=True, **options)
    assert isinstance(found, Generated)
    worst = 0.0
    for row, text in enumerate(texts):
        said = found.sequences[row, -new:]
        ids = torch.cat([torch.tensor(text), said])[None]
        logits = reference.forward(traced(name)[0], lifted=True, input_ids=ids)[0, len(text) - 1 : -1]
        expected = torch.log_softmax(logits.double(), dim=-1).gather(1, said[:, None])[:, 0]
        if not torch.equal(logits.argmax(-1), said):
            return float("inf")
        worst = max(worst, (found.logprobs[row] - expected).abs().max().item())
    return worst
