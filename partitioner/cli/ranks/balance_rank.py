"""One rank of `partitioner balance`: the launcher starts this per rank, and gives it the text."""

from __future__ import annotations

import json

import torch

from partitioner.cli.jobs.balance import TextCase
from runtime.engine.engine import Engine
from runtime.processes.launch import begin_worker, read_given, told_to_launch, write_answer


def main() -> None:
    begin_worker()
    case = TextCase.from_json(read_given().decode())
    ranks = case.compile.ranks(case.model, dtype=case.dtype, mapped=False, cached=True)
    with Engine.connect(ranks, device=case.placed) as engine, engine.routing() as routing:
        for piece in case.pieces:
            engine(input_ids=torch.tensor([piece]))
    write_answer(json.dumps({path: counts.tolist() for path, counts in routing.counts.items()}).encode())


if __name__ == "__main__":
    with told_to_launch():
        main()
