"""One rank of `partitioner run`: the launcher starts this per rank, and gives it the question."""

from __future__ import annotations

import sys

from partitioner.cli.run import Question, answer
from partitioner.errors import PartitionerError
from runtime.processes.launch import read_given

if __name__ == "__main__":
    try:
        answer(Question.from_json(read_given().decode()))
    except PartitionerError as error:
        sys.exit(f"{type(error).__name__}: {error}")
