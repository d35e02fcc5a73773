"""One rank of `partitioner run`: the launcher starts this per rank, and gives it the question."""

from __future__ import annotations

import contextlib
import os

from partitioner.cli.actions.run import answer
from partitioner.cli.common.progress import shown
from partitioner.cli.jobs.run import Question
from runtime.processes.launch import read_given, told_to_launch

if __name__ == "__main__":
    with told_to_launch():
        question = Question.from_json(read_given().decode())
        # the ranks compile the same at the same time
        with shown(verbose=question.compile.verbose) if os.environ.get("RANK") == "0" else contextlib.nullcontext():
            answer(question)
