"""Why a weight is whole: the report gives the cause, not what the analysis happened to notice."""

from __future__ import annotations

import pytest
from torch import Tensor, nn
from torch.nn import functional

from tests.support.layers import layered, partitioned
from tests.support.partitioned import EXACT


class OneKeyHead(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(hidden, 24), nn.Linear(hidden, 4), nn.Linear(hidden, 4)
        self.o = nn.Linear(24, hidden)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (6, 4)).transpose(1, 2)
        k, v = self.k(x), self.v(x)
        k = (k + k.flip(-1)).unsqueeze(1)  # mixes the indices of the head, as a rotary embedding does
        found = functional.scaled_dot_product_attention(
            q, k.expand(-1, 6, -1, -1), v.unsqueeze(1).expand(-1, 6, -1, -1), is_causal=True
        )
        return self.o(found.transpose(1, 2).flatten(2))


class MergedWeights(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.low, self.high = nn.Linear(hidden, 4, bias=False), nn.Linear(4, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.high.weight @ self.low.weight).relu()


class NormThenDown(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(hidden, 18), nn.Linear(18, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).softmax(-1))


def reasons(layer: type[nn.Module], tp: int = 2, **plan: object) -> dict[str, str]:
    parts, error = partitioned(layered(layer, count=3), tp, **plan)
    assert error < EXACT
    return {row.pattern.removeprefix("layers.*.").removesuffix(".weight"): row.reason for row in parts.report.whole}


@pytest.mark.parametrize("tp", [2, 3])
def test_one_key_head_is_needed_by_every_rank(tp: int) -> None:
    found = reasons(OneKeyHead, tp)
    assert set(found) == {"k", "v"}
    assert set(found.values()) == {"all of it is needed by every rank's part of layers.0.o.weight"}


def test_weights_that_meet_only_each_other() -> None:
    found = reasons(MergedWeights)
    cause = "could neither start nor end a split: it meets other weights and constants there, no activation"
    assert found["high"].endswith(cause)
    assert found["low"].endswith(cause)


def test_what_feeds_a_whole_weight() -> None:
    found = reasons(NormThenDown, keep_whole=("layers.*.down",))
    assert found["up"] == "softmax in layers.0 needs the whole row"
    assert found["down"] == "kept whole by the plan (layers.*.down)"
