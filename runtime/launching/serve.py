"""What a rank does that `partitioner.launch` started: it connects, then carries out what it is told, until the end.

    told       {"kind": "generate", "job": 7, "request": .., "granted": 32}      `request_data.py`
               {"kind": "grant", "job": 7, "granted": 64}    it may go so many steps; {"kind": "end", ..}: no more
               {"kind": "reserve", "job": 8, "size": ..}
    answers    {"kind": "ready", ..}   {"kind": "beat"}   {"kind": "done", "job": 7}
               {"kind": "step", "job": 7, "tokens": .., "logprobs": ..}    from rank 0 only
               {"kind": "refused", "job": 7, "type": .., "text": ..}       it can go on
               {"kind": "failed", "type": .., "text": ..}                  it cannot

All ranks of a replica are told the same. They leave a job that nobody wants any more after the same step: none goes
further than it was granted, and what has been granted is not taken back.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import NoReturn

from partitioner.errors import CommunicationError, PartitionerError
from runtime.engine.engine import Engine
from runtime.generation.generation_request import longest_text
from runtime.kv_cache.cache_size import CacheSize
from runtime.launching.line import Line, Message
from runtime.launching.request_data import read_request
from runtime.processes.launch import inherited

__all__ = ["BEAT_S", "LINE", "serve"]

LINE = "PARTITIONER_LINE"
"""The descriptor of this rank's connection."""
BEAT_S = 0.5


def serve(connect: Callable[[], Engine]) -> NoReturn:
    """Ends the process."""
    line = Line(socket.socket(fileno=inherited(LINE)))
    threading.Thread(target=_beat, args=(line,), daemon=True, name="beat").start()
    code = 0
    try:
        with connect() as engine:
            program = engine.program
            said: Message = {"eos_token_id": program.eos_token_id, "generation": dict(program.generation)}
            said["longest"] = longest_text(program)
            line.send({"kind": "ready", **said})
            while (message := line.receive()) is not None:
                _do(engine, line, message)
    except BaseException as error:
        code = 1
        with contextlib.suppress(OSError):
            line.send({"kind": "failed", **_said(error)})
        if not isinstance(error, PartitionerError):
            sys.excepthook(type(error), error, error.__traceback__)
    # to clear away all of torch takes seconds where processors are busy
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _beat(line: Line) -> None:
    """A process that is stopped sends none."""
    pause = threading.Event()
    with contextlib.suppress(OSError):
        while not pause.wait(BEAT_S):
            line.send({"kind": "beat"})


def _do(engine: Engine, line: Line, message: Message) -> None:
    kind = message["kind"]
    if kind not in _WORK:
        return  # a grant that came after its job's end
    try:
        for answer in _WORK[kind](engine, line, message):
            if engine.program.rank == 0:
                line.send({**answer, "job": message["job"]})
    except CommunicationError:
        raise
    except PartitionerError as error:
        line.send({"kind": "refused", "job": message["job"], **_said(error)})
        return
    line.send({"kind": "done", "job": message["job"]})


def _generate(engine: Engine, line: Line, message: Message) -> Iterator[Message]:
    granted: int = message["granted"]
    steps = engine.steps(read_request(message["request"]))
    with contextlib.closing(steps):  # type: ignore[type-var]
        for number, step in enumerate(steps):
            yield {"kind": "step", "tokens": step.tokens, "logprobs": step.logprobs}
            while number + 1 >= granted:
                word = line.receive()
                if word is None:
                    raise SystemExit(1)
                if word["job"] != message["job"]:
                    continue
                if word["kind"] == "end":
                    return
                granted = word["granted"]


def _reserve(engine: Engine, line: Line, message: Message) -> Iterator[Message]:
    yield {"kind": "room", "room": asdict(engine.reserve(CacheSize(**message["size"])))}


_WORK: dict[str, Callable[[Engine, Line, Message], Iterator[Message]]] = {"generate": _generate, "reserve": _reserve}


def _said(error: BaseException) -> dict[str, str]:
    return {"type": type(error).__name__, "text": str(error)}
