"""The seams refuse what they do not understand, and stand only while a capture runs."""

import contextlib

import pytest
import torch
from torch import nn
from transformers.modeling_utils import AttentionInterface

from partitioner.capture.inputs.probe import Probe
from partitioner.capture.trace.transformers_hooks import installed
from partitioner.errors import CaptureError


def test_only_while_installed() -> None:
    before = dict(AttentionInterface._global_mapping)
    assert "eager" not in before
    with installed(Probe()):
        for name in ("eager", "sdpa"):
            assert AttentionInterface._global_mapping[name] is not before.get(name)
    assert AttentionInterface._global_mapping == before
    with contextlib.suppress(KeyError), installed(Probe()):
        raise KeyError
    assert AttentionInterface._global_mapping == before


@pytest.mark.parametrize(
    ("keywords", "complaint"),
    [
        ({"temperature": 2.0}, r"attention of Linear: it is called with temperature=2.0"),
        ({"landmarks": torch.zeros(3)}, r"it is called with landmarks=a tensor of shape \(3,\)"),
        ({"dropout": 0.1}, r"dropout 0.1 in evaluation"),
        ({"sliding_window": 4, "is_causal": True}, r"a sliding window of 4 and no mask"),
    ],
)
def test_unknown_keywords_are_never_ignored(keywords: dict[str, object], complaint: str) -> None:
    x = torch.zeros(1, 2, 3, 4)
    with installed(Probe()), pytest.raises(CaptureError, match=complaint):
        AttentionInterface._global_mapping["eager"](nn.Linear(1, 1), x, x, x, None, **keywords)


@pytest.mark.parametrize(
    ("query", "key", "value", "complaint"),
    [
        ((3, 8), (2, 8), (2, 8), r"attention of Linear: required are query heads that are a multiple .* has 3 and 2;"),
        ((4, 8), (2, 8), (3, 8), r"it has 4 and 2 and 3"),
        ((4, 8), (2, 6), (2, 8), r"required are keys as wide as queries; they have 6 and 8 numbers per head"),
        ((4, 8), (2, 8), (1, 6), None),
    ],
)
def test_heads_that_do_not_go_together_are_refused(
    query: tuple[int, int], key: tuple[int, int], value: tuple[int, int], complaint: str | None
) -> None:
    q, k, v = (torch.zeros(1, heads, 3, width, device="meta") for heads, width in (query, key, value))
    with installed(Probe()):
        attend = AttentionInterface._global_mapping["eager"]
        if complaint is None:
            assert attend(nn.Linear(1, 1), q, k, v, None)[0].shape == (1, 3, 4, 6)
            return
        with pytest.raises(CaptureError, match=complaint):
            attend(nn.Linear(1, 1), q, k, v, None)
