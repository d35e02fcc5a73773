"""All ranks of a program in this process: one engine and one thread per rank, meeting in a Rendezvous.

The simulator is not a second interpreter: the engines, graphs and weights are those of a real run.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from partitioner.errors import CommunicationError
from runtime.engine import Engine
from runtime.rank_program import RankProgram
from runtime.rendezvous import Rendezvous
from runtime.weights import WeightSource

__all__ = ["Simulator"]


class Simulator:
    """Loads every rank once; each call runs all of them and returns their results in order of rank."""

    def __init__(
        self, programs: Sequence[RankProgram], *, weights: WeightSource | None = None, timeout_s: float = 60.0
    ) -> None:
        self._rendezvous = Rendezvous(programs[0].mesh, timeout_s=timeout_s)
        self.engines = [
            Engine(program, self._rendezvous.communicator(program.rank), weights=weights) for program in programs
        ]

    def __call__(self, **inputs: Tensor | None) -> list[Any]:
        self._rendezvous.reset()
        results: list[Any] = [None] * len(self.engines)
        errors: list[tuple[int, BaseException]] = []

        def run(rank: int) -> None:
            try:
                results[rank] = self.engines[rank](**inputs)
            except BaseException as error:
                errors.append((rank, error))
                self._rendezvous.abort(rank, error)
            finally:
                self._rendezvous.end(rank)

        threads = [threading.Thread(target=run, args=(rank,), name=f"rank {rank}") for rank in range(len(results))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise _cause(errors)
        return results


def _cause(errors: list[tuple[int, BaseException]]) -> BaseException:
    """The failure that the others follow from: a rank's own error rather than what the ranks waiting for it met."""
    own = [pair for pair in errors if not isinstance(pair[1], CommunicationError)]
    return min(own or errors, key=lambda pair: pair[0])[1]
