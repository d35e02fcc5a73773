"""Which of the other ranks are still there: a TCP connection from every rank to rank 0, which passes on what it hears.

    Heartbeat.connect(store, ..) all ranks together; RankLost names those that have not come before the deadline
    tell(kind, text)        all others know it within milliseconds
    known(kind)             {rank: text} of what has been told; `ended` and `left` come from the connections themselves
    silent_s(rank)          how long no sign of life has come

A connection breaks when its process ends, however that happens and on whatever host: nobody has to wait for a
collective to fail, and a rank that is merely slow is not taken for a lost one. A process that is stopped, or whose host
is unreachable, keeps its connection: it is known by the beats that do not come.

One line of JSON per message: {"rank": 2, "kind": "failed", "text": "..."}.
"""

from __future__ import annotations

import json
import secrets
import selectors
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from torch.distributed.distributed_c10d import Store

from partitioner.errors import RankLost

__all__ = ["BEAT_S", "Heartbeat"]

BEAT_S = 0.2
_SEND_S = 1.0
"""A line is a few hundred bytes: only a process that is stopped for minutes lets so many pile up."""
_LONGEST = 1 << 14

_Message = dict[str, Any]


class Heartbeat:
    """One rank's connections; a thread listens to them until `close`."""

    def __init__(
        self, rank: int, num_ranks: int, *, listener: socket.socket | None, link: socket.socket | None, token: str
    ) -> None:
        self.rank, self.num_ranks = rank, num_ranks
        self.at = ""
        """What this rank is about to do; told to the others once one of them waits in vain."""
        self._listener, self._token = listener, token
        self._links: dict[int, socket.socket] = {} if link is None else {0: link}
        self._sending = threading.Lock()
        self._known: dict[str, dict[int, str]] = defaultdict(dict)
        self._heard = dict.fromkeys(range(num_ranks), time.monotonic())
        self._complete = num_ranks == 1
        """Whether all have come; for others than rank 0, whether it says so."""
        self._absent: list[int] = []
        self._closing = self._has_told_where = False
        self._wake, self._woken = socket.socketpair()
        self._thread = threading.Thread(target=self._listen, daemon=True, name="watch the other ranks")
        self._thread.start()

    @classmethod
    def connect(cls, store: Store, host: str, rank: int, num_ranks: int, *, timeout_s: float) -> Heartbeat:
        """`host`: where the others find rank 0; `store`: of this meeting alone."""
        deadline = time.monotonic() + timeout_s
        if rank == 0:
            token = secrets.token_hex(16)
            listener = _listener(host, num_ranks)
            self = cls(rank, num_ranks, listener=listener, link=None, token=token)
            store.set("rank 0", f"{listener.getsockname()[1]} {token}")
        else:
            try:
                port, token = store.get("rank 0").decode().split()
                link = socket.create_connection((host, int(port)), timeout=timeout_s)
            except (RuntimeError, OSError) as error:
                raise RankLost(f"rank 0 has not come, or cannot be reached on {host}: {_line(error)}") from error
            link.settimeout(_SEND_S)
            self = cls(rank, num_ranks, listener=None, link=link, token=token)
            self.tell("hello", token)
        try:
            self._wait(lambda: self._complete, deadline)
        except BaseException:
            self.close()
            raise
        return self

    def tell(self, kind: str, text: str) -> None:
        """Never raises: a rank that fails has nobody to turn to."""
        text = text[:_LONGEST]
        self._known[kind].setdefault(self.rank, text)
        message = {"rank": self.rank, "kind": kind, "text": text}
        for other in list(self._links):
            self._send(other, message)

    def start(self, *, timeout_s: float) -> None:
        """Waits until all ranks have come here: one that is quick could be through, and gone, while others connect."""
        self.tell("joined", "")
        if self.rank == 0:
            self._tell_once_all_joined()
        self._wait(lambda: 0 in self._known["started"], time.monotonic() + timeout_s)

    def known(self, kind: str) -> dict[int, str]:
        return dict(self._known[kind])

    def lost(self) -> dict[int, str]:
        """Ranks that failed, or ended without a word."""
        lost = dict.fromkeys(self.known("ended"), "lost: its process ended")
        lost |= {rank: f"failed: {text}" for rank, text in self.known("failed").items()}
        return dict(sorted(lost.items()))

    def silent_s(self, rank: int) -> float:
        return time.monotonic() - self._heard[rank]

    @property
    def is_well(self) -> bool:
        """Whether nobody is known to be lost."""
        return not (self._known["ended"] or self._known["failed"] or self._known["verdict"] or self.is_cut_off)

    @property
    def is_cut_off(self) -> bool:
        """Whether rank 0 is gone, through which everything comes."""
        return self.rank != 0 and not self._links

    def close(self) -> None:
        if self._closing:
            return
        self.tell("left", "")
        self._closing = True
        self._wake.send(b".")
        self._thread.join()
        for one in (*self._links.values(), self._listener, self._wake, self._woken):
            if one is not None:
                one.close()
        self._links.clear()

    def _wait(self, done: Callable[[], bool], deadline: float) -> None:
        while not done():
            if verdicts := self.known("verdict"):
                raise RankLost(json.loads(next(iter(verdicts.values())))[1])
            if lost := self.lost():
                raise RankLost("; ".join(f"rank {rank} {how}" for rank, how in lost.items()))
            if time.monotonic() > deadline or self.is_cut_off:
                # those that came would only say that this rank went
                why = self._who_is_missing()
                self.tell("verdict", json.dumps(("lost", why)))
                raise RankLost(why)
            time.sleep(0.005)

    def _who_is_missing(self) -> str:
        if self.is_cut_off:
            return "rank 0 left before all had come"
        if self.rank != 0 and self.silent_s(0) > 5 * BEAT_S:
            return "rank 0 has stopped answering"
        missing = self._missing() if self.rank == 0 else self._absent
        return f"{'rank' if len(missing) == 1 else 'ranks'} {', '.join(map(str, missing))} did not come"

    def _missing(self) -> list[int]:
        return self._not_here() or [rank for rank in range(self.num_ranks) if rank not in self._known["joined"]]

    def _tell_once_all_joined(self) -> None:
        if len(self._known["joined"]) == self.num_ranks:
            self.tell("started", "")

    def _not_here(self) -> list[int]:
        return [rank for rank in range(1, self.num_ranks) if rank not in self._links]

    def _listen(self) -> None:
        unread: dict[socket.socket, bytes] = defaultdict(bytes)
        next_beat = 0.0
        with selectors.DefaultSelector() as selector:
            for one in (self._woken, self._listener, *self._links.values()):
                if one is not None:
                    selector.register(one, selectors.EVENT_READ)
            while not self._closing:
                for key, _ in selector.select(BEAT_S / 2):
                    source: Any = key.fileobj
                    if self._listener is not None and source is self._listener:
                        link, _ = self._listener.accept()
                        link.settimeout(_SEND_S)
                        selector.register(link, selectors.EVENT_READ)
                    elif source is not self._woken:
                        try:
                            received = source.recv(1 << 16)
                        except OSError:
                            received = b""
                        *lines, unread[source] = (unread[source] + received).split(b"\n")
                        try:
                            for line in lines:
                                self._take(source, line)
                        except (ValueError, KeyError, TypeError):
                            received = b""  # a stranger that knocks at an open port
                        if not received or len(unread[source]) > 16 * _LONGEST:
                            selector.unregister(source)
                            self._broken(source)
                if time.monotonic() >= next_beat:
                    next_beat = time.monotonic() + BEAT_S
                    self._beat()

    def _take(self, source: socket.socket, line: bytes) -> None:
        message: _Message = json.loads(line)
        rank, kind, text = message["rank"], message["kind"], message["text"]
        if kind == "hello":
            if secrets.compare_digest(text, self._token) and rank in self._not_here():
                self._links[rank] = source
                self._heard[rank] = time.monotonic()
                if not self._not_here():
                    self._complete = True
                    self.tell("all", "")
            return
        if self.rank == 0 and self._links.get(rank) is not source:
            return
        now = time.monotonic()
        self._heard[rank] = now
        if kind == "beat":
            if self.rank == 0:
                self._known["at"][rank] = text
            else:
                self._absent = message["absent"]
                silent_s = message["silent_s"]
                self._heard |= {other: now - silent_s.get(str(other), 0) for other in range(1, self.num_ranks)}
            return
        if kind == "all":
            self._complete = True
            return
        if kind == "joined" and self.rank == 0:
            # told once all have: each to each would be many
            self._known[kind][rank] = text
            self._tell_once_all_joined()
            return
        # first to the others: what this rank knows may end it
        self._pass_on(message)
        if kind == "waiting" and self.rank == 0 and not self._has_told_where:
            self._has_told_where = True
            for other, at in (self.known("at") | {0: self.at}).items():
                self._pass_on({"rank": other, "kind": "at", "text": at})
        self._known[kind].setdefault(rank, text)

    def _broken(self, source: socket.socket) -> None:
        for rank, link in list(self._links.items()):
            if link is source:
                # whoever is in the midst of sending has it until then
                with self._sending:
                    del self._links[rank]
                if rank not in self._known["left"]:
                    self._pass_on({"rank": rank, "kind": "ended", "text": ""})
                    self._known["ended"].setdefault(rank, "")
        source.close()

    def _pass_on(self, message: _Message) -> None:
        if self.rank == 0:
            for other in list(self._links):
                if other != message["rank"]:
                    self._send(other, message)

    def _beat(self) -> None:
        message: _Message = {"rank": self.rank, "kind": "beat", "text": self.at}
        if self.rank == 0:
            silent = {rank: round(self.silent_s(rank), 2) for rank in self._links}
            message["silent_s"] = {rank: seconds for rank, seconds in silent.items() if seconds > 2 * BEAT_S}
            message["absent"] = self._missing()
            self._known["at"][0] = self.at
        for other in list(self._links):
            self._send(other, message)

    def _send(self, other: int, message: _Message) -> None:
        try:
            with self._sending:
                if (link := self._links.get(other)) is not None:
                    link.sendall(json.dumps(message).encode() + b"\n")
        except (OSError, MemoryError):
            # the listening thread finds out what it means
            return


def _listener(host: str, num_ranks: int) -> socket.socket:
    if host == "localhost" or host.startswith("127."):
        return socket.create_server((host, 0), backlog=num_ranks)
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=num_ranks)
    return socket.create_server(("", 0), backlog=num_ranks)


def _line(error: BaseException) -> str:
    return str(error).partition("\n")[0]
