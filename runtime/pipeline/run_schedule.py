"""Running a schedule on one rank of a stage, and a whole run of one stage by it.

StagedExecutable(executable, head)(values)    the batch in pieces through the stages: the result on the last stage, None
                                              on the others; on all, where they share out the head
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from runtime.communication.channels import Handle
from runtime.execution.executable import Executable
from runtime.pipeline.head import HeadOfAll
from runtime.pipeline.links import Links, sizes_of
from runtime.pipeline.schedule import Action, Head, Receive, Run, Send, chain, pieces_of

__all__ = ["StagedExecutable", "run_schedule"]

_IN_FLIGHT = 2
"""How many pieces may be on their way to the next stage: each holds its memory."""


def run_schedule(
    actions: Sequence[Action],
    links: Links,
    sizes: Sequence[dict[str, int]],
    run: Callable[[int, list[Tensor]], Any],
    head: Callable[[int, Any], None] | None = None,
) -> None:
    """Runs the actions of one stage of a chain. run: of a piece's number and what came for it, what the stage yields.

    head: of a piece's number and what the last stage has made of it, None on the others, for a head that all share out.
    """
    arriving: dict[int, list[Handle]] = {}
    made: dict[int, Any] = {}
    leaving: deque[list[Handle]] = deque()
    for action in actions:
        match action:
            case Receive(piece):
                arriving[piece] = links.receive(sizes[piece])
            case Run(piece):
                received = [handle.finish() for handle in arriving.pop(piece, ())]
                made[piece] = run(piece, received)
            case Send(piece):
                if len(leaving) == _IN_FLIGHT:
                    _finish(leaving.popleft())
                leaving.append(links.send(made.pop(piece)))
            case Head(piece):
                assert head is not None
                head(piece, made.pop(piece, None))
    while leaving:
        _finish(leaving.popleft())


def _finish(handles: Sequence[Handle]) -> None:
    for handle in handles:
        handle.finish()


class StagedExecutable:
    """See the module's docstring. head: of stages that share it out, all of which have the result."""

    def __init__(self, executable: Executable, head: HeadOfAll | None) -> None:
        stage = executable.program.stage
        assert stage is not None
        self.executable, self.stage, self.head = executable, stage, head
        self.links = Links(executable.communicator, stage, executable.profiler)
        self._seen: set[tuple[tuple[int, ...], ...]] = set()

    def __call__(self, values: Sequence[Tensor]) -> Any:
        inputs = self.executable.program.inputs
        rows = sizes_of(inputs, values).get("batch", 1)
        pieces = pieces_of(rows, self.stage.count) if self.stage.rows_apart else [slice(0, rows)]
        by_row = [wanted.shape[:1] == ("batch",) for wanted in inputs]
        given = [
            [value[piece] if rowed else value for rowed, value in zip(by_row, values, strict=True)] for piece in pieces
        ]
        sizes = [sizes_of(inputs, each) for each in given]
        shapes = tuple(tuple(value.shape) for value in values)
        self.links.begin(new_shapes=shapes not in self._seen)
        results: list[Any] = []

        def run(piece: int, received: list[Tensor]) -> Any:
            made = self.executable([*given[piece], *received])
            if self.head is None and self.stage.index + 1 == self.stage.count:
                results.append(made)
            return made

        def head(piece: int, made: Any) -> None:
            assert self.head is not None
            results.append(self.head(given[piece], sizes[piece], made))

        try:
            heads = range(len(pieces)) if self.head is not None else ()
            early = self.executable.device.type != "cuda"
            timeline = chain(self.stage.count, len(pieces), heads=heads, early=early)[self.stage.index]
            run_schedule(timeline, self.links, sizes, run, head)
        except BaseException as error:
            self.executable.communicator.abort(error)
            raise
        self._seen.add(shapes)
        if len(results) < 2:
            return results[0] if results else None
        return torch.cat(results)
