"""One of the processes of test_stages.py: pipeline stages do what the simulated ones do.

python -m tests.equivalence.ranks.staged_rank PLAN NAME ...      started by torchrun, or by runtime.processes.launch
"""

from __future__ import annotations

import sys
import warnings

import torch

from partitioner.compile.partition import compile_program
from partitioner.compile.tracing.trace import trace, trace_step
from partitioner.program.plan import Plan
from partitioner.proof.float64 import in_float64
from runtime.engine import Engine
from runtime.generation.generation_request import Generated
from runtime.processes.launch import begin_worker
from tests.support import zoo
from tests.supported_models.generation import PREFILL_STEP, Own, prompts_for

NEW = 24


def main() -> None:
    begin_worker()
    warnings.simplefilter("ignore")
    plan = Plan.parse(sys.argv[1])
    for name in sys.argv[2:]:
        model = zoo.tiny(name)[0]  # seeded: the same on every rank
        parts = compile_program(in_float64(trace(model)), plan, step=lambda m=model: in_float64(trace_step(m)))
        prompts = prompts_for(model)
        ids = torch.randint(3, 100, (5, 7), generator=torch.Generator().manual_seed(1))
        with Engine.connect(parts, timeout_s=300) as engine:
            rank, stage = engine.program.rank, engine.program.stage
            assert stage is not None
            for _ in range(2):  # the first run compares, the second does not
                result = engine(input_ids=ids)
            found = engine.generate(
                prompts, max_new_tokens=NEW, eos_token_id=[], logprobs=True, prefill_step=PREFILL_STEP
            )
            again = engine.generate(prompts, max_new_tokens=NEW, eos_token_id=[], do_sample=True, seed=rank * 0)
        assert isinstance(found, Generated)
        error = Own(model).judge(prompts, found, f"{name} at {plan}")
        has_result = engine.program.shared_head is not None or stage.index + 1 == stage.count
        assert (result is not None) == has_result
        if result is not None:
            torch.testing.assert_close(result, parts.simulate(input_ids=ids), rtol=0, atol=0)
        sampled = parts.generate(prompts, max_new_tokens=NEW, eos_token_id=[], do_sample=True, seed=0)
        assert torch.equal(torch.as_tensor(again), torch.as_tensor(sampled))
        if rank == 0:
            print(f"{name} at {plan}: whole texts, {NEW} tokens, log-probabilities to {error:.0e}", flush=True)


if __name__ == "__main__":
    main()
