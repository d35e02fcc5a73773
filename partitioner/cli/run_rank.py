"""One rank of `partitioner run`: the launcher starts `partitioner.cli.run_rank QUESTION.json` per rank."""

from __future__ import annotations

import sys
from pathlib import Path

from partitioner.cli.run import Question, answer
from partitioner.errors import PartitionerError

if __name__ == "__main__":
    try:
        answer(Question.from_json(Path(sys.argv[1]).read_text()))
    except PartitionerError as error:
        sys.exit(f"{type(error).__name__}: {error}")
