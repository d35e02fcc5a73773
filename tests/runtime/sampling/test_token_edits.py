"""Logits that are raised, forced and banned, on vocabularies that are split; and OpenAI's penalties as rules."""

import pytest
import torch

from partitioner import InputError
from partitioner.sharding.index_set import IndexSet
from runtime.generation.token_rules import TokenRules, Watcher
from runtime.sampling.token_edits import TokenEdits
from runtime.sampling.vocabulary_shards import Share, shares

VOCABULARY = 11
OWNED = (IndexSet.range(0, 4), IndexSet.range(4, 9), IndexSet.range(9, 11))


def whole(edits: TokenEdits, logits: torch.Tensor) -> torch.Tensor:
    """What the ranks have together."""
    parts = []
    for held, share in zip(OWNED, shares(OWNED, VOCABULARY), strict=True):
        mine = Share(held, share, vocab_size=VOCABULARY, device=torch.device("cpu"))
        ((start, stop),) = held.intervals
        parts.append(edits.applied(mine.of(logits[:, start:stop]), mine))
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_added_numbers_reach_the_rank_that_has_the_token(dtype: torch.dtype) -> None:
    logits = torch.randn(3, VOCABULARY, dtype=dtype)
    edits = TokenEdits(added=((0, 3, 2.5), (0, 4, -1.25), (2, 10, 100.0), (2, 0, -3.0)), pairs=((1, 5),))
    expected = logits.to(torch.promote_types(dtype, torch.float32)).clone()
    for row, token, amount in edits.added:
        expected[row, token] += amount
    expected[1, 5] = -torch.inf
    assert torch.equal(whole(edits, logits), expected)
    assert not torch.equal(expected, logits.to(expected.dtype)), "negative control"


def test_penalties_count_what_was_written_and_not_the_prompt() -> None:
    rules = TokenRules(presence_penalty=0.5, frequency_penalty=0.25, logit_bias=((7, 2.0), (3, 1.0)))
    watcher = Watcher(rules, width=4, eos_token_id=(), max_new_tokens=10, vocab_size=VOCABULARY)
    prompt = [7, 7, 1, 2]
    first = watcher.edits([prompt], 1)
    assert first is not None
    assert first.added == ((0, 3, 1.0), (0, 7, 2.0))
    later = watcher.edits([[*prompt, 7, 1, 7]], 4)
    assert later is not None
    assert later.added == ((0, 1, -0.75), (0, 3, 1.0), (0, 7, 1.0))


def test_a_bias_for_no_token_is_refused() -> None:
    with pytest.raises(InputError, match="logit_bias has the id 11"):
        TokenRules(logit_bias=((11, 1.0),)).check(VOCABULARY)
