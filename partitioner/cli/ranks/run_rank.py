"""One rank of `partitioner run`: the launcher starts this per rank, and gives it the question."""

from __future__ import annotations

import contextlib
import os
import sys

from partitioner.cli.common.progress import shown
from partitioner.cli.run import Question, answer
from partitioner.errors import CommunicationError, PartitionerError
from runtime.processes.launch import read_given, refuse

if __name__ == "__main__":
    try:
        question = Question.from_json(read_given().decode())
        # the ranks compile the same at the same time
        with shown(verbose=question.compile.verbose) if os.environ.get("RANK") == "0" else contextlib.nullcontext():
            answer(question)
    except CommunicationError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except PartitionerError as error:
        refuse(error)
