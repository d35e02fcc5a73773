"""Which of the other ranks are still there: a connection from every rank to rank 0, which passes on what it hears.

    Heartbeat.connect(store, ..) all ranks together; RankLost names those that have not come before the deadline
    tell(kind, text)        all others know it within milliseconds; with `to`, those of them
    known(kind)             {rank: text} of what has been told; `ended` and `left` come from the connections themselves
    silent_s(rank)          how long no sign of life has come

A connection breaks when its process ends, however that happens and on whatever host: nobody has to wait for a
collective to fail, and a rank that is merely slow is not taken for a lost one. A process that is stopped, or whose host
is unreachable, keeps its connection: it is known by the beats that do not come.

One line of JSON per message: {"rank": 2, "kind": "failed", "text": "..."}; `authenticated_links.py` has how a line
proves its sender. Who connects and proves nothing loses that connection, whatever it sent, and none is accepted any
more once all ranks have come.
"""

from __future__ import annotations

import hmac
import json
import secrets
import selectors
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from typing import Any

from torch.distributed.distributed_c10d import Store

from partitioner.errors import RankLost
from runtime.processes.authenticated_links import LONGEST, Link, Refused, address_of, connect, key_of, listen

__all__ = ["BEAT_S", "Heartbeat"]

BEAT_S = 0.2
_HELLO_S = 2.0
"""How long who has connected may take to say who it is."""
_MOST_STRANGERS = 64
"""How many at a time may have said nothing yet; beyond, the oldest goes. Ranks say it at once, and try again."""

_Message = dict[str, Any]
Names = Callable[[Iterable[int]], str]


class Heartbeat:
    """One rank's connections; a thread listens to them until `close`."""

    def __init__(
        self,
        rank: int,
        num_ranks: int,
        *,
        key: bytes,
        listener: socket.socket | None = None,
        link: Link | None = None,
        names: Names | None = None,
    ) -> None:
        self.rank, self.num_ranks = rank, num_ranks
        self.names: Names = names or _numbers
        """How messages call some of them."""
        self.at = ""
        """What this rank is about to do; told to the others once one of them waits in vain."""
        self._listener, self._key = listener, key
        self._links: dict[int, Link] = {} if link is None else {0: link}
        self._strangers: list[Link] = []
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
    def connect(
        cls, store: Store, host: str, rank: int, num_ranks: int, *, timeout_s: float, names: Names | None = None
    ) -> Heartbeat:
        """`host`: where the others find rank 0, "" on one host; `store`: of this meeting alone."""
        deadline = time.monotonic() + timeout_s
        if rank == 0:
            token = secrets.token_hex(16)
            key = key_of(token)
            listener = listen(host)
            listener.setblocking(False)
            self = cls(rank, num_ranks, key=key, listener=listener, names=names)
            store.set("rank 0", f"{token} {address_of(listener, host)}")
        else:
            try:
                token, _, address = store.get("rank 0").decode().partition(" ")
                key = key_of(token)
                link = connect(address, key, rank, timeout_s=max(0.1, deadline - time.monotonic()))
            except (RuntimeError, OSError, ValueError) as error:
                where, first = f" on {host}" if host else "", (names or _numbers)([0])
                raise RankLost(f"{first} has not come, or cannot be reached{where}: {_line(error)}") from error
            self = cls(rank, num_ranks, key=key, link=link, names=names)
        try:
            self._wait(lambda: self._complete and self._listener is None, deadline)
        except BaseException:
            self.close()
            raise
        return self

    def tell(self, kind: str, text: str, *, to: Collection[int] | None = None) -> None:
        """Never raises: a rank that fails has nobody to turn to. What only some are told, this rank does not keep."""
        text = text[:LONGEST]
        message: _Message = {"rank": self.rank, "kind": kind, "text": text}
        if to is None:
            self._known[kind].setdefault(self.rank, text)
        else:
            message["to"] = sorted(to)
        for other in list(self._links):
            if self.rank != 0 or to is None or other in to:
                self._send(other, message)

    def start(self, *, timeout_s: float) -> None:
        """Waits until all ranks have come here: one that is quick could be through, and gone, while others connect."""
        self.tell("joined", "")
        if self.rank == 0:
            self._tell_once_all_joined()
        self._wait(lambda: 0 in self._known["started"], time.monotonic() + timeout_s)

    def known(self, kind: str) -> dict[int, str]:
        return dict(self._known[kind])

    def taken(self, kind: str) -> str | None:
        """What one rank alone tells of this kind, forgotten from here on; None: nothing yet."""
        told = self._known.pop(kind, None) if self._known.get(kind) else None
        return next(iter(told.values())) if told else None

    def lost(self) -> dict[int, str]:
        """Ranks that failed, or ended without a word."""
        lost = dict.fromkeys(self.known("ended"), "lost: its process ended")
        lost |= {rank: f"failed: {text}" for rank, text in self.known("failed").items()}
        return dict(sorted(lost.items()))

    def silent_s(self, rank: int) -> float:
        return time.monotonic() - self._heard[rank]

    def proof(self, sender: int, receiver: int) -> bytes:
        """What the one can show to the other of having the key of this meeting."""
        return hmac.digest(self._key, f"from {sender} to {receiver}".encode(), "sha256")

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
        for one in (*self._links.values(), *self._strangers, self._listener, self._wake, self._woken):
            if one is not None:
                one.close()
        self._links.clear()

    def _wait(self, done: Callable[[], bool], deadline: float) -> None:
        while not done():
            if verdicts := self.known("verdict"):
                raise RankLost(json.loads(next(iter(verdicts.values())))[1])
            if lost := self.lost():
                raise RankLost("; ".join(f"{self.names([rank])} {how}" for rank, how in lost.items()))
            if time.monotonic() > deadline or self.is_cut_off:
                # those that came would only say that this rank went
                why = self._who_is_missing()
                self.tell("verdict", json.dumps(("lost", why)))
                raise RankLost(why)
            time.sleep(0.005)

    def _who_is_missing(self) -> str:
        if self.is_cut_off:
            return f"{self.names([0])} left before all had come"
        if self.rank != 0 and self.silent_s(0) > 5 * BEAT_S:
            return f"{self.names([0])} has stopped answering"
        return f"{self.names(self._missing() if self.rank == 0 else self._absent)} did not come"

    def _missing(self) -> list[int]:
        return self._not_here() or [rank for rank in range(self.num_ranks) if rank not in self._known["joined"]]

    def _tell_once_all_joined(self) -> None:
        if len(self._known["joined"]) == self.num_ranks:
            self.tell("started", "")

    def _not_here(self) -> list[int]:
        return [rank for rank in range(1, self.num_ranks) if rank not in self._links]

    def _listen(self) -> None:
        try:
            self._watch()
        except BaseException as error:  # deaf from here on: better said than waited for
            self.tell("failed", f"the watch over the other ranks ended: {type(error).__name__}: {error}")
            raise

    def _watch(self) -> None:
        next_beat = 0.0
        with selectors.DefaultSelector() as selector:
            selector.register(self._woken, selectors.EVENT_READ)
            for link in self._links.values():
                selector.register(link.socket, selectors.EVENT_READ, link)
            if self._listener is not None:
                selector.register(self._listener, selectors.EVENT_READ)
            while not self._closing:
                for key, _ in selector.select(BEAT_S / 2):
                    if key.fileobj is self._listener:
                        self._accept(selector)
                    elif isinstance(key.data, Link) and not self._hear(key.data):
                        self._drop(selector, key.data)
                if time.monotonic() >= next_beat:
                    next_beat = time.monotonic() + BEAT_S
                    self._beat()
                    self._see_to_the_door(selector)
                elif self._complete and self._listener is not None:
                    self._see_to_the_door(selector)  # nobody else is expected

    def _accept(self, selector: selectors.BaseSelector) -> None:
        assert self._listener is not None
        for _ in range(_MOST_STRANGERS):
            try:
                link = Link.accept(self._listener.accept()[0])
            except BlockingIOError:
                return
            except Refused:
                continue
            except OSError:
                # no descriptors are left, say: it would be tried again at once, and forever
                selector.unregister(self._listener)
                return
            self._strangers.append(link)
            selector.register(link.socket, selectors.EVENT_READ, link)
            if not self._hear(link):  # what a rank has to say comes at once
                self._drop(selector, link)
            if len(self._strangers) > _MOST_STRANGERS:
                self._drop(selector, self._strangers[0])

    def _see_to_the_door(self, selector: selectors.BaseSelector) -> None:
        """Opens it again after a while, and shuts it once all have come."""
        for link in list(self._strangers):
            if self._complete or time.monotonic() - link.since > _HELLO_S:
                self._drop(selector, link)
        if self._listener is None:
            return
        is_watched = self._listener in selector.get_map()
        if self._complete:
            if is_watched:
                selector.unregister(self._listener)
            self._listener.close()
            self._listener = None
        elif not is_watched:
            selector.register(self._listener, selectors.EVENT_READ)

    def _hear(self, link: Link) -> bool:
        """Takes what has come; False: this connection is over."""
        try:
            lines = link.receive()
            if lines is None:
                return False
            for line in lines:
                if link.rank is None:
                    self._come(link, line)
                else:
                    self._take(link, link.opened(line))
        except Exception:  # whatever a stranger has sent; of a rank this shows as its loss
            return False
        return True

    def _come(self, link: Link, line: bytes) -> None:
        with self._sending:
            rank = link.introduce(line, self._key, lambda rank: rank in self._not_here())
            self._heard[rank] = time.monotonic()
            self._strangers.remove(link)
            self._links[rank] = link
        if not self._not_here():
            self._complete = True
            self.tell("all", "")

    def _take(self, source: Link, line: bytes) -> None:
        message: _Message = json.loads(line)
        rank, kind, text = message["rank"], message["kind"], message["text"]
        if self.rank == 0 and source.rank != rank:
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
        if self.rank in message.get("to", (self.rank,)):
            self._known[kind].setdefault(rank, text)

    def _drop(self, selector: selectors.BaseSelector, source: Link) -> None:
        with suppress(KeyError, ValueError):
            selector.unregister(source.socket)
        if source in self._strangers:
            self._strangers.remove(source)
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
                if other != message["rank"] and other in message.get("to", (other,)):
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
                    link.send(json.dumps(message).encode())
        except (OSError, MemoryError):
            # the listening thread finds out what it means
            return


def _numbers(ranks: Iterable[int]) -> str:
    numbers = list(map(str, ranks))
    return f"{'rank' if len(numbers) == 1 else 'ranks'} {', '.join(numbers)}"


def _line(error: BaseException) -> str:
    return str(error).partition("\n")[0]
