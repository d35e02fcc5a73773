"""Whose fault it is when a graph cannot be run: a program from a bundle is nobody's work here, and is named.

What a compiled program makes torch raise is raised as it is. A bundle's graph is data whose shapes and kinds of
arguments torch checks only as it runs: there the same becomes a `BundleError`, which says at which node.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from partitioner.errors import BundleError, PartitionerError
from runtime.program.rank_program import RankProgram

__all__ = ["attribute_errors"]


@contextlib.contextmanager
def attribute_errors(program: RankProgram) -> Iterator[None]:
    """What goes wrong inside is, but for a lack of the device's memory, the fault of the program."""
    try:
        yield
    except (PartitionerError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if program.read_from is None:
            raise
        where = "".join(f" {note}" for note in error.__notes__) if hasattr(error, "__notes__") else ""
        raise BundleError(
            f"a program of {program.read_from} (rank {program.rank}) cannot be run like this{where}: "
            f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
        ) from error
