"""One of the processes of test_stages.py: replicas that one launcher has started say what one replica says.

python -m tests.equivalence.ranks.replica_rank PLAN FAULT        started by torchrun, or by runtime.processes.launch
"""

from __future__ import annotations

import os
import sys

import pytest
import torch

from partitioner import Plan, partition
from partitioner.errors import RankLost
from runtime.engine import Engine
from runtime.processes.launch import begin_worker
from tests.support import zoo
from tests.support.generated import prompts


def main() -> None:
    begin_worker()
    plan, fault = Plan.parse(sys.argv[1]), sys.argv[2]
    model = zoo.tiny("llama")[0]
    parts, alone = partition(model, plan), partition(model, Plan())
    texts = prompts("llama", (4, 7, 2, 5, 3))
    number = int(os.environ["RANK"])
    with Engine.connect(parts, timeout_s=20) as engine:
        for options in (
            {"max_new_tokens": 9, "do_sample": True, "seed": 3},
            {"max_length": 12},
            {"max_new_tokens": 1},
        ):
            found, expected = (each.generate(texts, eos_token_id=[], **options) for each in (engine, alone))
            assert torch.equal(found, expected)
        one = engine.generate(texts[:1], max_new_tokens=3)  # of which one replica has no row
        assert torch.equal(one, alone.generate(texts[:1], max_new_tokens=3))
        steps = [step.tokens for step in engine.stream(texts, max_new_tokens=3)]
        assert steps == [step.tokens for step in alone.stream(texts, max_new_tokens=3)]
        if fault == "none":
            return
        if number == plan.mesh.world_size - 1:
            raise ValueError("a fault of its own")
        with pytest.raises(RankLost, match=f"replica {plan.replicas - 1}") as raised:
            engine.generate(texts, max_new_tokens=200, eos_token_id=[])
        print(f"rank {number}: {raised.value}", flush=True)
        raise raised.value


if __name__ == "__main__":
    main()
