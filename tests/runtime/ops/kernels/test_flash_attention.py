"""Which pieces of prompts cuDNN's kernel is prepared for: it takes a tenth of a second for every pair of sizes."""

import pytest
import torch

from runtime.ops.kernels import flash_attention
from runtime.ops.kernels.flash_attention import _pays_cudnn
from runtime.ops.kernels.triton_needs import replayed


@pytest.fixture(autouse=True)
def _hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash_attention, "_has_cudnn", lambda device: True)
    monkeypatch.setattr(flash_attention, "missing_for_triton", lambda: "")


def pays(size: int, past: int, *, heads: int = 16, width: int = 128) -> bool:
    q, k = (torch.empty(1, heads, tokens, width, device="meta") for tokens in (size, past + size))
    return _pays_cudnn(q, k)


@pytest.mark.parametrize(
    ("size", "past", "once", "again"),
    [
        (2048, 2048, False, True),  # the second half of 4,096 tokens on one of two GPUs
        (2050, 2050, False, True),
        (512, 512, False, False),
        (8192, 8192, True, True),  # such sizes come again, captured or not
        (8190, 8190, False, True),
    ],
)
def test_what_is_captured_comes_again(size: int, past: int, once: bool, again: bool) -> None:
    assert pays(size, past) == once
    with replayed():
        assert pays(size, past) == again
    assert pays(size, past) == once


def test_wide_heads_are_not_for_cudnn() -> None:
    with replayed():
        assert not pays(8192, 8192, width=256)
