"""What it means that a collective has failed: which rank is lost and how, or that the ranks wait for each other.

Every rank tells the others (`runtime/processes/heartbeat.py`) why it stops:

    failed    an error of its own
    waiting   it met a failed collective
    verdict   its conclusion: those that fail after it repeat the first one

That a process ended, they see for themselves.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence

from torch import distributed as dist

from partitioner.errors import CommunicationError, RankLost, RankMismatch
from runtime.communication.matching_calls import Call
from runtime.communication.shared_memory.shared_memory import Disconnected
from runtime.processes.heartbeat import BEAT_S, Heartbeat

__all__ = ["FailureVerdict", "is_broken"]

# gloo has no exception type of its own; other RuntimeErrors are this rank's own mistakes
_BROKEN = re.compile("connection|timed? ?out|socket|broken pipe|nccl", re.IGNORECASE)

_GRACE_S = 0.5
"""How long the others have to say that they wait too."""
_SETTLE_S = 0.05
"""After the first rank is known to be lost: others that are lost with it are named too."""


class FailureVerdict:
    """One rank's view; `peers` None: groups that someone else made, where nothing tells who is lost."""

    def __init__(self, heartbeat: Heartbeat | None, rank: int, *, timeout_s: float) -> None:
        self._heartbeat = heartbeat
        self._rank = rank
        self._timeout_s = timeout_s

    @property
    def is_known(self) -> bool:
        """Whether this rank, or another one, has concluded that a rank is lost or that ranks disagree."""
        return self._heartbeat is not None and bool(self._heartbeat.known("verdict"))

    def about_to(self, call: Call) -> None:
        if self._heartbeat is not None:
            self._heartbeat.at = str(call)

    def failed(self, error: BaseException) -> None:
        if self._heartbeat is not None:
            self._heartbeat.tell("failed", f"{type(error).__name__}: {error}")

    def conclude(self, call: Call | str, group: Sequence[int], error: BaseException) -> CommunicationError:
        """What it means that `call` failed with `error`; waits up to half a second for what the others say."""
        others = [rank for rank in group if rank != self._rank]
        # gloo's "[file:line] what. This is typically ..."
        cause = re.sub(r"^\[[^]]*\] ", "", str(error).partition("\n")[0]).split(". This is")[0]
        origin = "" if cause.startswith("shared memory") else "torch.distributed: "
        detail = f"\n  awaited by {call}\n  {origin}{cause}"
        heartbeat = self._heartbeat
        if heartbeat is None:
            return RankLost(f"one of the ranks {', '.join(map(str, others))} is lost, and nothing tells which{detail}")
        heartbeat.tell("waiting", str(call))
        deadline = time.monotonic() + _GRACE_S
        while time.monotonic() < deadline:
            if verdicts := heartbeat.known("verdict"):
                return _as_error(next(iter(verdicts.values())))
            if heartbeat.is_cut_off:
                break
            if heartbeat.lost():
                deadline = min(deadline, time.monotonic() + _SETTLE_S)
            elif heartbeat.known("waiting").keys() | heartbeat.known("left").keys() | self._stopped(others) >= set(
                others
            ):
                break
            time.sleep(0.005)
        verdict = json.dumps(self._judge(heartbeat, call, others, cause, detail))
        heartbeat.tell("verdict", verdict)
        return _as_error(verdict)

    def _stopped(self, ranks: Sequence[int]) -> set[int]:
        """Those whose process gives no sign of life."""
        assert self._heartbeat is not None
        return {rank for rank in ranks if self._heartbeat.silent_s(rank) > min(5 * BEAT_S, self._timeout_s / 2)}

    def _judge(
        self, heartbeat: Heartbeat, call: Call | str, others: list[int], cause: str, detail: str
    ) -> tuple[str, str]:
        names = heartbeat.names
        if lost := heartbeat.lost():
            return "lost", "; ".join(f"{names([rank])} {how}" for rank, how in lost.items()) + detail
        waiting = heartbeat.known("waiting")
        if left := [rank for rank in others if rank in heartbeat.known("left") and rank not in waiting]:
            return "lost", f"{names(left)} left, by closing the engine, while others wait for it{detail}"
        if heartbeat.is_cut_off:
            return "lost", f"one of {names(others)} is lost, and {names([0])}, which would know, has left{detail}"
        silent = [rank for rank in others if rank not in waiting]
        stopped = self._stopped(silent)
        if 0 in stopped or (self._rank != 0 and heartbeat.silent_s(0) > self._timeout_s / 2):
            # of the others nothing is known, whoever is in the group: it all comes through rank 0
            silent, stopped = [0], {0}
        at = heartbeat.known("at")
        here = _without_rank(str(call))
        elsewhere_or_lost = [rank for rank in silent if rank in stopped or _without_rank(at.get(rank, "")) != here]
        silent = elsewhere_or_lost or silent  # who is here as well waits too, and has merely not said so
        seen = "".join(f"\n  last checked there: {at[rank]}" for rank in silent if at.get(rank))
        if not silent and (elsewhere := self._stopped([r for r in range(heartbeat.num_ranks) if r != self._rank])):
            silent = sorted(elsewhere)  # of two stages that wait, each may wait because of a third
            stopped = elsewhere
        if not silent:
            waits = "".join(f"\n  {text}" for rank, text in waiting.items() if rank in others)
            return "mismatch", f"the ranks wait for each other and none can go on:\n  {call}{waits}"
        if not stopped and not re.search("timed? ?out", cause, re.IGNORECASE):
            return "lost", f"{names(silent)} did not say why a connection broke, and still runs{seen}{detail}"
        if stopped:
            how = "no sign of life comes from its process: it is stopped, or its host cannot be reached"
        else:
            how = (
                "its process is alive: if a step may take that long, give more time, as in "
                "Engine.connect(..., timeout_s=600); otherwise see what it is doing"
            )
        named = [rank for rank in silent if rank in stopped] or silent
        within = f"within {self._timeout_s:g} s"
        return "lost", f"{names(named)} did not answer {within}; {how}{seen}{detail}"


def _without_rank(call: str) -> str:
    """What is to be done, as in "rank 3: node 'n', all_reduce ..", without who does it."""
    return call.partition(": ")[2]


def is_broken(error: RuntimeError) -> bool:
    """Whether others are the cause."""
    return isinstance(error, (Disconnected, dist.DistError)) or bool(_BROKEN.search(str(error)))


def _as_error(verdict: str) -> CommunicationError:
    kind, text = json.loads(verdict)
    return RankLost(text) if kind == "lost" else RankMismatch(text)
