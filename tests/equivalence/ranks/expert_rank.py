"""One of the processes of test_experts.py: experts over gloo, whole texts and generation against the model's own code.

python -m tests.equivalence.ranks.expert_rank NAME PLAN ...      started by runtime.processes.launch
"""

from __future__ import annotations

import sys
import warnings

import torch

from partitioner.cli.compare import difference
from partitioner.compile.partition import compile_program, trace
from partitioner.program.plan import Plan
from partitioner.proof.float64 import in_float64
from runtime.engine import Engine
from runtime.processes.launch import begin_worker
from tests.support import reference, zoo


def main() -> None:
    begin_worker()
    warnings.simplefilter("ignore")
    name, *plans = sys.argv[1:]
    model = zoo.tiny(name)[0]  # seeded: the same on every rank
    traced = in_float64(trace(model))
    ids = torch.arange(3, 21, device="cpu").view(2, 9)
    expected = reference.forward(model, lifted=True, input_ids=ids)
    for plan in plans:
        with Engine.connect(compile_program(traced, Plan.parse(plan)), check=True) as engine:
            error = difference(engine(input_ids=ids), expected)
            said = engine.generate(ids, max_new_tokens=4, eos_token_id=[])
            rank = engine.program.rank
        logits = reference.forward(model, lifted=True, input_ids=said)
        assert error < 1e-10, (plan, error)
        assert torch.equal(logits[:, 8:-1].argmax(-1), said[:, 9:]), plan
        if rank == 0:
            print(f"{name} {plan}: off by {error:.0e}", flush=True)


if __name__ == "__main__":
    main()
