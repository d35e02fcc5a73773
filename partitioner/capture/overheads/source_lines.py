"""The line of the model's code that a node came from.

torch.export keeps the whole stack of each node, as text: a tenth of the time of a trace. All that is read of it is the
innermost line of the model's own code, in a module's `forward`, so that is all that is kept while this package traces.
"""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from torch import fx

from partitioner.capture.overheads.internals import internal

__all__ = ["innermost_lines", "source_of"]

_NOT_THE_MODELS = (f"{os.sep}torch{os.sep}", f"{os.sep}partitioner{os.sep}capture{os.sep}")
"""Code that stands between a model's and an op: torch's, and what stands in for layers while they are traced."""


_STACKS = "torch.fx.proxy.CapturedTraceback"
"""By which the stack of a new node is kept."""


def source_of(node: fx.Node) -> str:
    """The line of the model's code that a node came from, "file.py:12"; "" where the trace does not say."""
    trace = node.meta.get("stack_trace")
    lines = re.findall(r'File "([^"]+)", line (\d+)', trace) if isinstance(trace, str) else []
    mine = [(file, line) for file, line in lines if _is_the_models(file)]
    return f"{Path(mine[-1][0]).name}:{mine[-1][1]}" if mine else ""


def _is_the_models(file: str) -> bool:
    return not any(part in file for part in _NOT_THE_MODELS)


@contextmanager
def innermost_lines() -> Iterator[None]:
    """Within this context, nodes that the function which opens it has made keep that line in place of their stack.

    Those of other threads keep theirs, and so do all where this torch keeps stacks in another way.
    """
    proxies: Any = fx.proxy
    real: Any = internal(_STACKS)
    if real is None:
        yield
        return
    opener = sys._getframe(2).f_code  # beyond contextlib's frame

    class Innermost:
        @staticmethod
        def extract() -> Any:
            frames = _frames_within(opener)
            return real.extract() if frames is None else _Stack(frames)

    proxies.CapturedTraceback = Innermost
    try:
        yield
    finally:
        proxies.CapturedTraceback = real


class _Stack:
    def __init__(self, frames: list[traceback.FrameSummary]) -> None:
        self.frames = frames

    def summary(self) -> traceback.StackSummary:
        return traceback.StackSummary.from_list(self.frames)


def _frames_within(opener: CodeType) -> list[traceback.FrameSummary] | None:
    """The innermost `forward` of the model's that `opener` has called, if any; None where it has called nothing."""
    frame: FrameType | None = sys._getframe(2)
    found: list[traceback.FrameSummary] = []
    while frame is not None and frame.f_code is not opener:
        code = frame.f_code
        if not found and code.co_name == "forward" and _is_the_models(code.co_filename):
            found = [traceback.FrameSummary(code.co_filename, frame.f_lineno, code.co_name, line="")]
        frame = frame.f_back
    return None if frame is None else found
