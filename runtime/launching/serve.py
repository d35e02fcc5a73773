"""What a rank does that `partitioner.launch` started: it connects, then carries out what it is told, until the end.

    told       {"kind": "add", "job": 7, "request": ..}      one row: `request_data.py`
               {"kind": "step"}                              one step of all rows that are there
               {"kind": "cancel", "job": 7}
               {"kind": "reserve", "job": 8, "size": ..}
    answers    {"kind": "ready", ..}   {"kind": "beat"}
               {"kind": "failed", "type": .., "text": ..}               it cannot go on
               and of rank 0 only:
               {"kind": "stepped", "told": [[7, token, logprob, is_over, top], ..], "status": ..}
               {"kind": "refused", "job": 7, "type": .., "text": ..}
               {"kind": "room", "job": 8, "room": ..}

All ranks of a replica are told the same, and carry it out in the order in which it comes. So a row comes and goes
between the same two steps on all of them, and they never have to agree.
"""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import NoReturn

from partitioner.errors import CommunicationError, PartitionerError
from runtime.engine.engine import Engine
from runtime.execution.threads import use_threads_for
from runtime.generation.batching.batch_loop import BatchLoop
from runtime.generation.generation_request import longest_text
from runtime.kv_cache.cache_size import CacheSize
from runtime.kv_cache.paged_size import DEFAULT_ROWS
from runtime.launching.connection import Connection, Message
from runtime.launching.request_data import read_request
from runtime.processes.launch import inherited

__all__ = ["BEAT_S", "CONNECTION", "Rank", "serve"]

CONNECTION = "PARTITIONER_CONNECTION"
"""The descriptor of this rank's connection."""
BEAT_S = 0.5


class Rank:
    """What is told, carried out on an engine. size, rows, vocabulary: as `Engine.batching` takes them."""

    def __init__(
        self,
        engine: Engine,
        *,
        size: CacheSize | None,
        rows: int | None,
        vocabulary: str | None,
    ) -> None:
        self._engine, self._size, self._rows, self._vocabulary = engine, size, rows, vocabulary
        self._loop: BatchLoop | None = None
        if size is not None:
            self._batching().reserve(size)

    def carry_out(self, message: Message) -> Iterator[Message]:
        """What rank 0 answers. Raises what ends this rank."""
        kind = message["kind"]
        if kind == "step":
            yield self._step()
            return
        if kind == "cancel":
            if self._loop is not None:
                self._loop.cancel(message["job"])
            return
        try:
            if kind == "add":
                self._batching().add(message["job"], read_request(message["request"]))
            else:
                room = self._batching().reserve(CacheSize(**message["size"]))
                yield {"kind": "room", "job": message["job"], "room": asdict(room)}
        except CommunicationError:
            raise
        except PartitionerError as error:
            yield {"kind": "refused", "job": message["job"], **_said(error)}

    def _step(self) -> Message:
        if self._loop is None:
            return {"kind": "stepped", "told": [], "refused": [], "status": {}}
        told = self._loop.step()
        refused = [[each.number, *_said(each.error).values()] for each in told if each.error is not None]
        said = [[each.number, each.token, each.logprob, each.is_over, each.top] for each in told if each.error is None]
        return {"kind": "stepped", "told": said, "refused": refused, "status": self._loop.status()}

    def _batching(self) -> BatchLoop:
        if self._loop is None:
            self._loop = self._engine.batching(self._size, rows=self._rows, vocabulary=self._vocabulary)
        return self._loop


def serve(
    connect: Callable[[], Engine],
    *,
    size: CacheSize | None = None,
    rows: int | None = None,
    vocabulary: str | None = None,
) -> NoReturn:
    """Ends the process."""
    connection = Connection(socket.socket(fileno=inherited(CONNECTION)))
    threading.Thread(target=_beat, args=(connection,), daemon=True, name="beat").start()
    told: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(connection, told), daemon=True, name="listen").start()
    code = 0
    try:
        with connect() as engine:
            at_once = rows or (DEFAULT_ROWS if size is None else size.max_batch)
            use_threads_for(engine.program, at_once, engine.device)
            rank = Rank(engine, size=size, rows=rows, vocabulary=vocabulary)
            program = engine.program
            said: Message = {"eos_token_id": program.eos_token_id, "generation": dict(program.generation)}
            said["longest"] = longest_text(program)
            connection.send({"kind": "ready", **said})
            while (message := told.get()) is not None:
                for answer in rank.carry_out(message):
                    if program.rank == 0 and not _sent(connection, answer):
                        raise SystemExit(1)
    except BaseException as error:
        code = 1
        if not isinstance(error, SystemExit):
            _sent(connection, {"kind": "failed", **_said(error)})
        if not isinstance(error, (PartitionerError, SystemExit)):
            sys.excepthook(type(error), error, error.__traceback__)
    # to clear away all of torch takes seconds where processors are busy
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _beat(connection: Connection) -> None:
    """A process that is stopped sends none."""
    pause = threading.Event()
    with contextlib.suppress(OSError):
        while not pause.wait(BEAT_S):
            connection.send({"kind": "beat"})


def _sent(connection: Connection, message: Message) -> bool:
    """False: who started this rank is gone, or wants no more of it."""
    try:
        connection.send(message)
    except OSError:
        return False
    return True


def _listen(connection: Connection, told: queue.SimpleQueue[Message | None]) -> None:
    """While a step runs as well: who writes to this rank never waits for it."""
    message: Message | None = {}
    while message is not None:
        message = None
        with contextlib.suppress(OSError):
            message = connection.receive()
        told.put(message)


def _said(error: BaseException) -> dict[str, str]:
    return {"type": type(error).__name__, "text": str(error)}
