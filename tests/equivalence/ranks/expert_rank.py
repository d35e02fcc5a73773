"""One of the processes of test_experts.py: experts over gloo, whole texts and generation against the model's own code.

python -m tests.equivalence.ranks.expert_rank NAME PLAN ...      started by runtime.processes.launch
python -m tests.equivalence.ranks.expert_rank --always ...       with every collective compared
"""

from __future__ import annotations

import sys
import warnings

import torch

from partitioner.compile.compare import difference
from partitioner.compile.partition import compile_program
from partitioner.compile.tracing.trace import trace
from partitioner.program.plan import Plan
from partitioner.proof.float64 import in_float64
from runtime.engine import Engine
from runtime.processes.launch import begin_worker
from tests.support import reference, zoo

UNEVEN = [[5, 6, 7], [9, 10, 11, 12, 13, 14, 15], [20]]


def main() -> None:
    begin_worker()
    warnings.simplefilter("ignore")
    name, *plans = (word for word in sys.argv[1:] if not word.startswith("--"))
    options = {word.removeprefix("--") for word in sys.argv[1:] if word.startswith("--")}
    model = zoo.tiny(name)[0]  # seeded: the same on every rank
    traced = in_float64(trace(model))
    ids = torch.arange(3, 21, device="cpu").view(2, 9)
    expected = reference.forward(model, lifted=True, input_ids=ids)
    for plan in plans:
        parts = compile_program(traced, Plan.parse(plan))
        with Engine.connect(parts, check="always" in options) as engine:
            error = difference(engine(input_ids=ids), expected)
            said = engine.generate(ids, max_new_tokens=4, eos_token_id=[])
            # three rows of any lengths, then one: a rank of dp has more than another, or nothing
            uneven = [engine.generate(some, max_new_tokens=4, eos_token_id=[]) for some in (UNEVEN, UNEVEN[:1])]
            rank = engine.program.rank
        logits = reference.forward(model, lifted=True, input_ids=said)
        assert error < 1e-10, (plan, error)
        assert torch.equal(logits[:, 8:-1].argmax(-1), said[:, 9:]), plan
        for found in uneven:
            for text, row in zip(UNEVEN, found, strict=False):
                whole = torch.cat([torch.tensor(text), row[-4:]])[None]
                logits = reference.forward(model, lifted=True, input_ids=whole)
                assert torch.equal(logits[0, len(text) - 1 : -1].argmax(-1), row[-4:]), (plan, text)
        if rank == 0:
            print(f"{name} {plan}: off by {error:.0e}", flush=True)


if __name__ == "__main__":
    main()
