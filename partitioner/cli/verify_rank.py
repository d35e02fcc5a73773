"""One rank of `partitioner verify`: the launcher starts `partitioner.cli.verify_rank CASE.json FOLDER` per rank."""

from __future__ import annotations

import functools
import json
import sys
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from partitioner.cli.verify import Case, Outcome, compiled, outcomes_of
from partitioner.errors import PartitionerError
from partitioner.storage.named_model import dtype_named, load_model
from runtime.engine.engine import Engine
from runtime.processes.launch import begin_worker


def main() -> None:
    begin_worker()
    question, answers = Path(sys.argv[1]), Path(sys.argv[2])
    case = Case.from_json(question.read_text())
    outcomes: list[Outcome] = []
    rank = 0
    for dtype in case.dtypes:
        model = load_model(case.model, dtype=dtype_named(dtype), seed=case.seed)
        with Engine.connect(compiled(model, case.compile)) as engine:
            rank = engine.program.rank
            run = functools.partial(_run, engine)
            outcomes += outcomes_of(case, dtype, model, run)
    text = json.dumps([asdict(outcome) for outcome in outcomes])
    (answers / f"outcomes-{rank}.json").write_text(text)


def _run(engine: Engine, input_ids: Tensor) -> list[Tensor]:
    return [engine(input_ids=input_ids)]


if __name__ == "__main__":
    try:
        main()
    except PartitionerError as error:
        sys.exit(f"{type(error).__name__}: {error}")
