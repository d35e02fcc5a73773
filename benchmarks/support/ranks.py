"""Ranks that run a benchmark find its module, from wherever it was started and wherever the product is installed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from runtime.processes.launch import launch

__all__ = ["ROOT", "launch_ranks"]

ROOT = str(Path(__file__).resolve().parents[2])


def launch_ranks(command: Sequence[str], *, num_ranks: int, timeout_s: float) -> list[bytes]:
    """`runtime.processes.launch`, with the folder that has `benchmarks` among those that the ranks import from."""
    known = os.environ.get("PYTHONPATH", "")
    if ROOT not in known.split(os.pathsep):
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [ROOT, known]))
    return launch(command, num_ranks=num_ranks, timeout_s=timeout_s)
