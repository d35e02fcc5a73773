"""One of the two processes of test_overlap.py: what stands beside experts runs while their tokens are on their way.

python -m tests.equivalence.ranks.overlap_rank      started by runtime.processes.launch

Rank 1 is slow to send. Rank 0 has begun to receive, and computes its shared experts meanwhile.
"""

from __future__ import annotations

import time
import warnings
from typing import Any

import torch

from partitioner.compile.compare import difference
from partitioner.compile.partition import compile_program
from partitioner.compile.tracing.trace import trace
from partitioner.program.plan import Plan
from partitioner.proof.float64 import in_float64
from runtime.engine import Engine
from runtime.ops import expert_exchange
from runtime.processes.launch import begin_worker
from tests.support import reference, zoo

LATE_S = 0.5


def main() -> None:
    begin_worker()
    warnings.simplefilter("ignore")
    model = zoo.tiny("deepseek_v3")[0]  # seeded: the same on every rank
    traced = in_float64(trace(model))
    ids = torch.arange(3, 21, device="cpu").view(2, 9)
    expected = reference.forward(model, lifted=True, input_ids=ids)
    parts = compile_program(traced, Plan.parse("ep=2,expert-parallel.exchange=exchange"))
    for check in (True, False):
        with Engine.connect(parts, check=check) as engine:
            assert difference(engine(input_ids=ids), expected) < 1e-10
            _slow_to_send(engine)
            with engine.profile() as profile:
                assert difference(engine(input_ids=ids), expected) < 1e-10
        first, second = (_spans(recorded) for recorded in profile.ranks)
        names = list(first)
        sent, waited = (
            next(i for i, name in enumerate(names) if name.startswith(op)) for op in ("expert_send", "landed")
        )
        meanwhile = [name for name in names[sent + 1 : waited] if name.startswith("linear")]
        assert meanwhile, names[sent : waited + 1]
        # it began, and was through with what stands beside the experts, before the other had sent anything
        begun, computed = first["expert_send"][1], first[meanwhile[-1]][1]
        other, arrived = second["expert_send"][1], first[names[waited]][1]
        if not check:  # what is compared first is waited for where it begins
            assert begun < computed < other < arrived, (begun, computed, other, arrived)
            if engine.program.rank == 0:
                before = (other - computed) / 1e6
                print(f"through with what stands beside the experts {before:.0f} ms before the others' tokens left")


def _slow_to_send(engine: Engine) -> None:
    """The other way round of what is bytes of one message: the counts have been exchanged then."""
    pack, slept = expert_exchange._bytes, []

    def late(x: Any) -> Any:
        if engine.program.rank == 1 and not slept:
            slept.append(time.sleep(LATE_S))
        return pack(x)

    expert_exchange._bytes = late


def _spans(recorded: Any) -> dict[str, tuple[int, int]]:
    (run,) = recorded.runs
    nodes = recorded.graphs[run["graph"]]
    return {node["name"]: span for node, *span in zip(nodes, run["begins"], run["ends"], strict=False)}  # type: ignore[misc]


if __name__ == "__main__":
    main()
