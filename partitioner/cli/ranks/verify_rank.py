"""One rank of `partitioner verify`: the launcher starts this per rank, and gives it the case."""

from __future__ import annotations

import functools
import json
from dataclasses import asdict

import torch
from torch import Tensor

from partitioner.cli.actions.verify import CacheLoss, Outcome, compiled, losses_of, outcomes_of
from partitioner.cli.jobs.verify import Case
from partitioner.storage.dtypes import dtype_named
from partitioner.storage.named_model import load_model
from runtime.engine.engine import Engine
from runtime.kv_cache.cache_size import CacheSize
from runtime.processes.launch import begin_worker, read_given, told_to_launch, write_answer


def main() -> None:
    begin_worker()
    case = Case.from_json(read_given().decode())
    if case.cache_dtype is not None:
        write_answer(json.dumps([asdict(loss) for loss in _losses(case)]).encode())
        return
    outcomes: list[Outcome] = []
    for dtype in case.dtypes:
        model = load_model(case.model, dtype=dtype_named(dtype), seed=case.seed)
        with Engine.connect(compiled(model, case.compile), device=case.placed) as engine:
            run = functools.partial(_run, engine)
            outcomes += outcomes_of(case, dtype, model, run)
    write_answer(json.dumps([asdict(outcome) for outcome in outcomes]).encode())


def _losses(case: Case) -> list[CacheLoss]:
    model = load_model(case.model, dtype=torch.bfloat16, seed=case.seed)
    with Engine.connect(compiled(model, case.compile), device=case.placed) as engine:

        def run(size: CacheSize, texts: list[list[int]]) -> Tensor:
            engine.reserve(size)
            return engine.log_probabilities(texts)

        return list(losses_of(case, model, run))


def _run(engine: Engine, input_ids: Tensor) -> list[Tensor | None]:
    result = engine(input_ids=input_ids)
    return [None if result is None else result.cpu()]


if __name__ == "__main__":
    with told_to_launch():
        main()
