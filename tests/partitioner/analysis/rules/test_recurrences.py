"""The rules of recurrences, tried on numbers: heads, channels and sequences by themselves, tokens and keys not."""

import pytest
import torch
from torch import Tensor

from partitioner.proof.try_rule import check_rule
from runtime.ops.state import gated_delta_rule, gated_linear_attention, selective_scan


def draw(*shape: int) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


Q, K, V, DECAY, STATE = draw(2, 7, 3, 5), draw(2, 7, 3, 5), draw(2, 7, 3, 4), -draw(2, 7, 3), draw(2, 3, 5, 4)
X, A, RATES = draw(2, 3, 7), -draw(3, 5), draw(2, 5, 7)


@pytest.mark.parametrize("state", [STATE, None], ids=["behind others", "from the start"])
def test_of_heads(state: Tensor | None) -> None:
    for rule in (
        check_rule(gated_linear_attention, Q, K, V, DECAY, state),
        check_rule(gated_delta_rule, Q, K, V, DECAY, -DECAY, state),
        check_rule(gated_delta_rule, Q, K, V, -K, -DECAY, state),
    ):
        assert rule.whole == {"s", "k"}
        assert rule.outputs == (("b", "s", "h", "v"), ("b", "h", "k", "v"))


@pytest.mark.parametrize("state", [draw(2, 3, 5), None], ids=["behind others", "from the start"])
def test_of_channels(state: Tensor | None) -> None:
    rule = check_rule(selective_scan, X, X, A, RATES, RATES, state)
    assert rule.whole == {"s", "n"}
    assert rule.outputs == (("b", "d", "s"), ("b", "d", "n"))
