"""Experts that ranks share out: whatever the routing, the same as on one rank; and no more bytes than the formula."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from partitioner.sharding.mesh import Mesh
from runtime.communication.matching_calls import Call
from runtime.communication.thread_communicator import ThreadCommunicator, ThreadGroup
from runtime.ops.expert_exchange import localise_experts, receive_from_experts, send_to_experts
from runtime.ops.experts import expert_combine, expert_dispatch, grouped_linear
from tests.runtime.communication.channels.threads import run

Owners = Sequence[Sequence[int]]


def flat(owners: Owners) -> dict[str, list[int]]:
    return {"experts": [expert for mine in owners for expert in mine], "counts": [len(mine) for mine in owners]}


def experts(
    hidden: Tensor, index: Tensor, gates: Tensor, weight: Tensor, bias: Tensor, *, trim: bool = False
) -> Tensor:
    """One layer of experts whose activation makes 1 of 0."""
    rows, order, counts = expert_dispatch(hidden, index, weight.shape[0], trim=trim)
    rows = torch.cos(grouped_linear(rows, weight, counts, bias))
    return expert_combine(grouped_linear(rows, weight, counts), order, gates)


def make(num_tokens: int, num_experts: int, choices: int, seed: int, *, hidden: int = 4) -> tuple[Tensor, ...]:
    random = torch.Generator().manual_seed(seed)
    options: dict[str, Any] = {"generator": random, "dtype": torch.float64, "device": "cpu"}
    scores = torch.rand(num_tokens, num_experts, **options)
    gates, index = scores.topk(choices)
    return (
        torch.randn(num_tokens, hidden, **options),
        index,
        gates,
        torch.randn(num_experts, hidden, hidden, **options),
        torch.randn(num_experts, hidden, **options),
    )


def replicated(given: tuple[Tensor, ...], owners: Owners) -> Tensor:
    hidden, index, gates, weight, bias = given
    parts = []
    for rank, mine in enumerate(owners):
        local, kept = localise_experts(index, gates, rank, axes=("ep",), **flat(owners))
        parts.append(experts(hidden, local, kept, weight[list(mine)], bias[list(mine)]))
    return torch.stack(parts).sum(0)


def exchanged(
    given: tuple[Tensor, ...], owners: Owners, cuts: Sequence[int], group: ThreadGroup | None = None
) -> Tensor:
    hidden, index, gates, weight, bias = given
    bounds = [0, *cuts, hidden.shape[0]]
    group = group or ThreadGroup(Mesh.of(ep=len(owners), dp=len(owners)))

    def rank(number: int) -> Any:
        mine, own = slice(*bounds[number : number + 2]), list(owners[number])

        def work(communicator: ThreadCommunicator) -> Tensor:
            channel = communicator.channel("ep", node="send")
            rows, local, kept, back = send_to_experts(channel, hidden[mine], index[mine], gates[mine], **flat(owners))
            made = experts(rows, local, kept, weight[own], bias[own], trim=True)
            return receive_from_experts(communicator.channel("ep", node="return"), made, back)

        return work

    found = run(group, *map(rank, range(len(owners))))
    for each in found:
        if isinstance(each, BaseException):
            raise each
    return torch.cat([each for each in found if isinstance(each, Tensor)])


def close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-12, atol=1e-12)


@st.composite
def cases(draw: st.DrawFn) -> tuple[tuple[Tensor, ...], Owners, list[int]]:
    num_ranks = draw(st.integers(1, 6))
    num_experts = draw(st.integers(1, 9))
    choices = draw(st.integers(1, num_experts))
    num_tokens = draw(st.integers(0, 9))
    ranks = st.sets(st.integers(0, num_ranks - 1), min_size=1)
    held = [draw(ranks) for _ in range(num_experts)]
    owners = [[expert for expert in range(num_experts) if rank in held[expert]] for rank in range(num_ranks)]
    made = list(make(num_tokens, num_experts, choices, draw(st.integers(0, 99))))
    extreme = draw(st.sampled_from(("as drawn", "all to one", "none")))
    if extreme == "all to one":
        made[1] = torch.full_like(made[1], num_experts - 1)
    elif extreme == "none":
        made[1] = torch.full_like(made[1], num_experts)
    cuts = sorted(draw(st.lists(st.integers(0, num_tokens), min_size=num_ranks - 1, max_size=num_ranks - 1)))
    return tuple(made), owners, cuts


@given(cases())
@settings(max_examples=100, deadline=None)
def test_any_routing_and_any_owners(case: tuple[tuple[Tensor, ...], Owners, list[int]]) -> None:
    given, owners, cuts = case
    expected = experts(*given)
    assert close(replicated(given, owners), expected)
    assert close(exchanged(given, owners, cuts), expected)


def test_gates_of_experts_elsewhere_must_not_count() -> None:
    """The control: what experts make of rows of zeros is not zero, so the gates have to be."""
    given = make(5, 4, 2, seed=0)
    owners = [[0, 1], [2, 3]]
    hidden, index, gates, weight, bias = given
    parts = []
    for rank, mine in enumerate(owners):
        local, _ = localise_experts(index, gates, rank, axes=("ep",), **flat(owners))
        rows, order, counts = expert_dispatch(hidden, local, len(mine))
        made = torch.cos(grouped_linear(rows, weight[mine], counts, bias[mine]))  # no linear after it
        parts.append(expert_combine(made, order, gates))
    whole_rows, order, counts = expert_dispatch(hidden, index, 4)
    expected = expert_combine(torch.cos(grouped_linear(whole_rows, weight, counts, bias)), order, gates)
    assert not close(torch.stack(parts).sum(0), expected)


class Counting(ThreadGroup):
    """Counts the bytes that leave a rank in all-to-alls."""

    sent = 0

    def exchange(self, members: tuple[int, ...], call: Call, x: Tensor) -> list[tuple[Call, Tensor]]:
        if call.kind == "all_to_all":
            assert call.counts is not None
            row = x.element_size() * math.prod(x.shape[1:])
            self.sent += row * sum(n for rank, n in zip(members, call.counts[0], strict=True) if rank != call.rank)
        return super().exchange(members, call, x)


@pytest.mark.parametrize("ranks", [2, 4])
def test_bytes_are_those_of_the_formula(ranks: int) -> None:
    """One row there and one back per (token, other rank), 8 bytes per choice beside it, and the counts."""
    tokens, num_experts, choices, size = 512 * ranks, 16, 4, 256
    hidden, index, gates, weight, bias = make(tokens, num_experts, choices, seed=1, hidden=size)
    given = (hidden.float(), index, gates.float(), weight.float(), bias.float())
    each = num_experts // ranks
    owners = [list(range(rank * each, rank * each + each)) for rank in range(ranks)]
    group = Counting(Mesh.of(ep=ranks, dp=ranks))
    exchanged(given, owners, [512 * (i + 1) for i in range(ranks - 1)], group)

    none_there = math.comb(num_experts - each, choices) / math.comb(num_experts, choices)
    rows = tokens * (ranks - 1) * (1 - none_there)  # uniform routing
    formula = rows * (2 * 4 * size + 8 * choices) + ranks * (ranks - 1) * 8
    assert group.sent == pytest.approx(formula, rel=0.02)
    pairs = tokens * choices * (ranks - 1) / ranks * (2 * 4 * size)
    assert group.sent < pairs  # what sending every (token, expert) pair would take


def test_ranks_that_have_no_experts_and_no_tokens() -> None:
    given = make(6, 3, 2, seed=4)
    for owners in itertools.permutations([[0, 1, 2], [], []]):
        assert close(exchanged(given, owners, [6, 6]), experts(*given))
        assert close(exchanged(given, owners, [0, 0]), experts(*given))
