"""The tokens of each expert, counted while ranks run; and what dealing experts out by them gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from partitioner import Plan
from partitioner.compile.partition import compile_program
from partitioner.program.balance import balance, imbalance
from passes.expert_parallel import ExpertParallel
from runtime.engine.engine import Engine
from runtime.ops.experts import expert_dispatch
from tests.support.partitioned import EXACT, error, tokens, traced

NAME = "mixtral"


def counted(plan: Plan, ids: Tensor) -> dict[str, Tensor]:
    parts = compile_program(traced(NAME)[1], plan)

    def work(engine: Engine) -> dict[str, Tensor]:
        with engine.routing() as routing:
            engine(input_ids=ids)
        engine(input_ids=ids)  # not counted
        return routing.counts

    found = parts._simulator.run(work)
    return {path: sum(each[path] for each in found) for path in found[0]}  # type: ignore[misc]


@pytest.mark.parametrize("exchange", ["replicate", "exchange"])
def test_ranks_count_together_what_one_counts(exchange: str) -> None:
    ids = tokens(NAME, 9)
    whole = counted(Plan(), ids)
    plan = Plan(ep=3, passes=[ExpertParallel(exchange=exchange)])
    found = counted(plan, ids)
    layers = sum(node.target is expert_dispatch for node in traced(NAME)[1].graph.nodes)
    assert len(whole) == layers
    assert all(int(counts.sum()) == 2 * ids.numel() for counts in whole.values())  # two experts per token
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[path], whole[path]) for path in whole)


def test_experts_dealt_out_by_what_was_counted_are_the_same_model() -> None:
    counts: Any = sum(counted(Plan(), tokens(NAME, 9)).values()).tolist()
    owners = balance(counts, 2, extra=2)
    assert imbalance(counts, owners) <= imbalance(counts, ((0, 1), (2, 3)))
    parts = compile_program(traced(NAME)[1], Plan(ep=2, passes=[ExpertParallel(owners=owners)]))
    assert error(NAME, parts, 5) < EXACT
