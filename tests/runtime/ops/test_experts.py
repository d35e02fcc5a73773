"""Dispatch, one linear per expert and combine, against a loop over tokens."""

import pytest
import torch

from runtime.ops.experts import expert_combine, expert_dispatch, grouped_linear

TOKENS, EXPERTS, TOP, HIDDEN, OUT = 7, 5, 2, 4, 3


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_equals_a_loop_over_tokens(transposed: bool, biased: bool) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, dtype=torch.float64)
    index = torch.stack([torch.randperm(EXPERTS - 1)[:TOP] for _ in range(TOKENS)])  # the last expert gets none
    gates = torch.rand(TOKENS, TOP, dtype=torch.float64)
    weight = torch.randn(EXPERTS, OUT, HIDDEN, dtype=torch.float64)
    bias = torch.randn(EXPERTS, OUT, dtype=torch.float64) if biased else None
    rows, order, counts = expert_dispatch(hidden, index, EXPERTS)
    assert counts.tolist() == [int((index == e).sum()) for e in range(EXPERTS)]
    given = weight.transpose(1, 2).contiguous() if transposed else weight
    got = expert_combine(grouped_linear(rows, given, counts, bias, transposed=transposed), order, gates)
    for t in range(TOKENS):
        terms = [
            gates[t, k] * (weight[e] @ hidden[t] + (0 if bias is None else bias[e])) for k, e in enumerate(index[t])
        ]
        torch.testing.assert_close(got[t], torch.stack(terms).sum(0), rtol=1e-12, atol=1e-12)


def test_no_expert_gives_nothing() -> None:
    hidden, index = torch.randn(2, HIDDEN), torch.tensor([[0, EXPERTS], [EXPERTS + 3, 1]])
    rows, order, counts = expert_dispatch(hidden, index, EXPERTS)
    assert counts.tolist() == [1, 1, 0, 0, 0]
    weight, bias = torch.randn(EXPERTS, OUT, HIDDEN), torch.randn(EXPERTS, OUT)
    got = expert_combine(grouped_linear(rows, weight, counts, bias), order, torch.ones(2, 2))
    torch.testing.assert_close(got, torch.stack([weight[0] @ hidden[0] + bias[0], weight[1] @ hidden[1] + bias[1]]))


def test_no_tokens() -> None:
    rows, order, counts = expert_dispatch(torch.zeros(0, HIDDEN), torch.zeros(0, TOP, dtype=torch.long), EXPERTS)
    assert counts.sum() == 0
    out = grouped_linear(rows, torch.zeros(EXPERTS, OUT, HIDDEN), counts)
    assert expert_combine(out, order, torch.zeros(0, TOP)).shape == (0, OUT)
