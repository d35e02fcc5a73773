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
