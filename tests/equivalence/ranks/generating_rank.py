"""One of the processes of test_generating.py: over gloo, each model named continues texts as its own forward does.

python -m tests.equivalence.ranks.generating_rank NAME ...      started by torchrun, or by runtime.processes.launch
"""

from __future__ import annotations

import os
import sys
import warnings

from partitioner.compile.partition import compile_program
from partitioner.compile.tracing.trace import trace, trace_step
from partitioner.program.plan import Plan
from partitioner.proof.float64 import in_float64
from runtime.engine import Engine
from runtime.generation.generation_request import Generated
from runtime.processes.launch import begin_worker
from tests.support import zoo
from tests.supported_models.generation import PREFILL_STEP, PROMPTS, Own, prompts_for

NEW = 64


def main() -> None:
    begin_worker()
    warnings.simplefilter("ignore")
    plan = Plan(tp=int(os.environ["WORLD_SIZE"]))
    for name in sys.argv[1:]:
        model = zoo.tiny(name)[0]  # seeded: the same on every rank
        parts = compile_program(in_float64(trace(model)), plan, step=lambda m=model: in_float64(trace_step(m)))
        prompts = prompts_for(model)
        with Engine.connect(parts) as engine:
            found = engine.generate(
                prompts, max_new_tokens=NEW, eos_token_id=[], logprobs=True, prefill_step=PREFILL_STEP
            )
            rank = engine.program.rank
        assert isinstance(found, Generated)
        error = Own(model).judge(prompts, found, f"{name} over {plan.tp} processes")
        if rank == 0:
            print(f"{name}: {NEW} tokens after prompts of {PROMPTS}, log-probabilities to {error:.0e}", flush=True)


if __name__ == "__main__":
    main()
