"""Survivors against transformers' own processors."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from runtime.sampling.candidates import Filters, rank_candidates, softmax_mass, survivors
from runtime.sampling.sampling_options import Sampling
from tests.runtime.sampling.transformers_sampling import processed

# few values, so that many tie
LOGIT = st.sampled_from([-math.inf, *(i / 2 for i in range(-8, 9))])


def filtered(logits: torch.Tensor, sampling: Sampling, num: int | None = None) -> tuple[list[set[int]], list[bool]]:
    """The tokens that survive among the `num` most probable of each row, and whether that is certain."""
    tokens = torch.arange(logits.shape[1]).expand_as(logits)
    ranked, tokens = rank_candidates(logits, tokens)
    num = num or logits.shape[1]
    floor = ranked[:, num - 1] if num < logits.shape[1] else torch.full_like(ranked[:, 0], -math.inf)
    mass = softmax_mass(logits, logits.amax(dim=1), sampling.temperature)
    filters = Filters.alike(len(logits), logits.device, temperature=sampling.temperature, **sampling.filters)
    kept, certain = survivors(ranked[:, :num], floor, mass, filters)
    return [set(row[:n].tolist()) for row, n in zip(tokens, kept.tolist(), strict=True)], certain.tolist()


def edge_is_clear(logits: torch.Tensor, sampling: Sampling) -> bool:
    """Whether no probability decides by its last digits: there float64 sums in another order may differ."""
    for top_p in (1.0, sampling.top_p):
        scores = processed(logits, Sampling(do_sample=True, temperature=sampling.temperature, top_k=sampling.top_k))
        if top_p is not None and top_p < 1:
            masses = scores.sort(dim=1).values.softmax(dim=1).cumsum(dim=1)
            if bool(((masses - (1 - top_p)).abs() < 1e-9).any()):
                return False
    if sampling.min_p:
        ratios = ((logits - logits.amax()) / sampling.temperature).exp()
        return not bool(((ratios - sampling.min_p).abs() < 1e-9).any())
    return True


samplings = st.builds(
    Sampling,
    do_sample=st.just(True),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 3, 5, 100]),
    top_p=st.sampled_from([0.0, 1e-6, 0.31, 0.87, 1.0]),
    min_p=st.sampled_from([None, 0.0, 0.07, 0.4, 1.0]),
)


@settings(max_examples=400)
@given(st.lists(LOGIT, min_size=1, max_size=12), samplings, st.integers(1, 12))
def test_the_same_tokens_survive_as_in_transformers(values: list[float], sampling: Sampling, num: int) -> None:
    logits = torch.tensor([values], dtype=torch.float64)
    assume(any(value is not None for value in sampling.filters.values()))
    assume(logits.isfinite().any())

    assume(edge_is_clear(logits, sampling))
    expected = set(processed(logits, sampling)[0].isfinite().nonzero()[:, 0].tolist())
    kept, certain = filtered(logits, sampling)
    assert kept == [expected]
    assert certain == [True]
    fewer, certain = filtered(logits, sampling, min(num, len(values)))
    assert fewer == [expected] or certain == [False]


def test_mass_that_is_reached_exactly_needs_no_more() -> None:
    logits = torch.zeros(1, 4, dtype=torch.float64)
    sampling = Sampling(do_sample=True, top_k=0, top_p=0.5)
    assert (
        filtered(logits, sampling)[0]
        == [{2, 3}]
        == [set(processed(logits, sampling)[0].isfinite().nonzero()[:, 0].tolist())]
    )


@pytest.mark.parametrize(
    ("options", "certain"),
    [
        ({"top_k": 2}, True),
        ({"top_k": 3}, False),  # 1.0 ties with what may not be there
        ({"top_k": 0, "top_p": 0.5}, True),
        ({"top_k": 0, "top_p": 0.99}, False),
        ({"top_k": 0, "min_p": 0.5}, True),
        ({"top_k": 0, "min_p": 0.01}, False),
        ({"top_k": 2, "top_p": 0.99}, True),
    ],
)
def test_too_few_candidates_are_noticed(options: dict[str, float], certain: bool) -> None:
    logits = torch.tensor([[4.0, 3.5, 1.0, 1.0, 0.5]], dtype=torch.float64)
    assert filtered(logits, Sampling(do_sample=True, **options), 3)[1] == [certain]
