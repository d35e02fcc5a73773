"""What ranks tell each other through the store once a collective has failed: who stopped where, and why.

    stopped/RANK   {"failed": text} an error of its own, or {"waiting": text} met a failed collective
    at/RANK        the collective that a rank is about to start (only where runs are checked)
    verdict        the conclusion of the first rank that reached one: those that fail after it repeat it

A store is torch.distributed's key-value server. It outlives a killed rank unless that rank hosts it: under torchrun the
agent does, otherwise rank 0.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence

from torch.distributed.distributed_c10d import Store

from partitioner.errors import CommunicationError, RankLost, RankMismatch
from runtime.agreement import Call

__all__ = ["Notices"]

_GRACE_S = 0.5
"""How long the others have to give a sign of life; a killed rank's connections break within milliseconds for all."""

_Notice = dict[str, str]


class Notices:
    """One rank's view of the store; where the store is gone too, every method still returns, at once."""

    def __init__(self, store: Store | None, rank: int, *, hosted: bool) -> None:
        self._store = store
        self._rank = rank
        self._hosted = hosted
        """Whether rank 0 hosts the store."""
        self._gone = False

    def about_to(self, call: Call) -> None:
        if self._store is not None:
            self._store.set(f"at/{self._rank}", str(call))

    def failed(self, error: BaseException) -> None:
        self._post(f"stopped/{self._rank}", {"failed": f"{type(error).__name__}: {error}"})

    def conclude(self, call: Call, group: Sequence[int], error: Exception) -> CommunicationError:
        """What it means that a collective failed with `error`; waits up to half a second for the others' notices."""
        self._post(f"stopped/{self._rank}", {"waiting": str(call)})
        others = [rank for rank in group if rank != self._rank]
        stopped: dict[int, _Notice] = {}
        deadline = time.monotonic() + _GRACE_S
        while True:
            if (verdict := self._read("verdict")) is not None:
                return _as_error(verdict)
            for rank in others:
                if rank not in stopped and (notice := self._read(f"stopped/{rank}")) is not None:
                    stopped[rank] = notice
            if self._store is None or self._gone or len(stopped) == len(others) or time.monotonic() > deadline:
                break
            time.sleep(0.01)
        verdict = self._judge(call, others, stopped, str(error))
        self._post("verdict", verdict)
        return _as_error(verdict)

    def _judge(self, call: Call, others: list[int], stopped: dict[int, _Notice], error: str) -> _Notice:
        # gloo's "[file:line] what. This is typically ..."
        cause = re.sub(r"^\[[^]]*\] ", "", error.splitlines()[0]).split(". This is")[0]
        origin = "" if cause.startswith("shared memory") else "torch.distributed: "
        detail = f"\n  awaited by {call}\n  {origin}{cause}"
        failed = [f"rank {rank} failed: {notice['failed']}" for rank, notice in stopped.items() if "failed" in notice]
        if failed:
            return {"lost": "; ".join(failed) + detail}
        silent = [rank for rank in others if rank not in stopped]
        if self._gone and self._hosted:
            return {"lost": f"rank 0 is lost: neither it nor the store that it hosts answers{detail}"}
        if silent and (self._gone or self._store is None):
            return {"lost": f"one of the ranks {_list(others)} is lost, and no store tells which{detail}"}
        if silent:
            timed_out = re.search("timed? ?out", error, re.IGNORECASE)
            how = "did not answer before the deadline" if timed_out else "lost: it broke the connection and is silent"
            seen = [f"\n  last checked there: {text}" for rank in silent if (text := self._text(f"at/{rank}"))]
            return {"lost": f"{_list(silent, 'rank')} {how}{''.join(seen)}{detail}"}
        waits = "".join(f"\n  {notice['waiting']}" for notice in stopped.values())
        return {"mismatch": f"the ranks wait for each other and none can go on:\n  {call}{waits}"}

    def _text(self, key: str) -> str | None:
        if self._store is None or self._gone:
            return None
        try:
            return self._store.get(key).decode() if self._store.check([key]) else None
        except RuntimeError:
            # asking again would cost the store's timeout each time
            self._gone = True
            return None

    def _read(self, key: str) -> _Notice | None:
        text = self._text(key)
        if text is None:
            return None
        notice: _Notice = json.loads(text)
        return notice

    def _post(self, key: str, notice: _Notice) -> None:
        if self._store is None or self._gone:
            return
        try:
            self._store.set(key, json.dumps(notice))
        except RuntimeError:
            self._gone = True


def _list(ranks: list[int], word: str = "") -> str:
    names = ", ".join(map(str, ranks))
    return names if not word else f"{word} {names}" if len(ranks) == 1 else f"{word}s {names}"


def _as_error(verdict: _Notice) -> CommunicationError:
    return RankLost(verdict["lost"]) if "lost" in verdict else RankMismatch(verdict["mismatch"])
