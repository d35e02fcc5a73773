"""Typical, epsilon and eta sampling leave what transformers' own processors leave."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import EpsilonLogitsWarper, EtaLogitsWarper, TypicalLogitsWarper

from partitioner.sharding.index_set import IndexSet
from runtime.sampling.cutoffs import cut_off
from runtime.sampling.sampling_options import Sampling
from runtime.sampling.token_edits import TokenEdits
from runtime.sampling.vocabulary_shards import Share
from tests.runtime.sampling.test_sampler import draw, even
from tests.runtime.sampling.transformers_sampling import processed

OFF: dict[str, Any] = {"typical_p": None, "epsilon": None, "eta": None}


def logits(rows: int = 6, vocabulary: int = 40) -> torch.Tensor:
    found = torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found *= torch.linspace(0.2, 5, rows)[:, None]
    found[:, 7] = -torch.inf  # what a filter before has left out
    return found


@pytest.mark.parametrize("value", [0.05, 0.3, 0.9, 0.999])
def test_as_transformers(value: float) -> None:
    given, ids = logits(), torch.zeros(6, 1, dtype=torch.int64)
    for name, warper in (
        ("typical_p", TypicalLogitsWarper(mass=value)),
        ("epsilon", EpsilonLogitsWarper(epsilon=value)),
        ("eta", EtaLogitsWarper(epsilon=value)),
    ):
        found, expected = cut_off(given, **{**OFF, name: value}), warper(ids, given)
        assert torch.equal(found.isfinite(), expected.isfinite()), name
        assert not torch.equal(found, given) or name == "typical_p"


@pytest.mark.parametrize(
    "options",
    [
        {"typical_p": 0.4},
        {"typical_p": 0.4, "top_k": 0},
        {"epsilon_cutoff": 0.05, "top_k": 9, "temperature": 1.7},
        {"eta_cutoff": 0.1, "top_k": None, "top_p": 0.8},
        {"typical_p": 0.7, "epsilon_cutoff": 0.01, "eta_cutoff": 0.02, "top_k": 0, "temperature": 0.6},
    ],
)
def test_drawn_from_what_is_left(options: dict[str, Any]) -> None:
    sampling = Sampling(do_sample=True, seed=5, **options)
    given = logits()
    expected = processed(given.float(), sampling).double().log_softmax(dim=1)
    for step in range(12):
        tokens, said = draw(given, sampling, 2, even(40, 2), request_ids=torch.arange(6), step=step)
        left = expected.gather(1, tokens[:, None])[:, 0]
        assert torch.allclose(said, left, atol=1e-5)


def test_edits_on_a_share() -> None:
    share = Share(IndexSet.range(4, 8), IndexSet.range(4, 8), vocab_size=12, device=torch.device("cpu"))
    own = torch.ones(2, 4)
    edits = TokenEdits(banned=(5, 11), pairs=((0, 4), (1, 7), (1, 2)))
    assert edits.applied(own, share).isfinite().tolist() == [[False, False, True, True], [True, False, True, False]]
    forced = TokenEdits(forced=(6, 9), banned=(9,)).applied(own, share)
    assert forced.isfinite().tolist() == [[False, False, True, False]] * 2
    assert bool((own == 1).all())  # the model's own logits stay
