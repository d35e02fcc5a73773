"""How busy the replicas are, as `Launched.status()` says it: requests, the cache, and what was run since the start.

    status = llm.status()
    status.replicas[0].running       rows that are being continued; one prompt of a call is one row
    status.running, status.waiting   of all replicas together

A replica's numbers are those after its latest step. Those that count only grow.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["ReplicaStatus", "ServingStatus"]


@dataclass(frozen=True, kw_only=True)
class ReplicaStatus:
    """One replica; tokens are counted once, however many ranks it has."""

    running: int = 0
    """Rows that have a place in the cache."""
    waiting: int = 0
    """Rows that wait for one."""
    tokens_cached: int = 0
    """Tokens in the cache, of running rows and of prefixes that are kept; what several rows share counts once."""
    tokens_that_fit: int | None = None
    """How many tokens the cache has room for; None: any number, or no request has come yet."""
    longest_that_fits: int | None = None
    """Tokens of the longest text, prompt and new ones, that the cache has room for; None as above."""
    prefix_hits: int = 0
    """Prompt tokens that were not run, because the cache had them from another row."""
    prefill_tokens: int = 0
    """Prompt tokens that were run, those of pre-empted rows again."""
    decode_tokens: int = 0
    """New tokens that were run, one at a time."""
    preemptions: int = 0
    """How often a row gave its place in a full cache to an older one."""
    blocks_behind: int = 0
    """Blocks of the cache that running rows gave back, because no layer of the model looks back so far."""
    prefixes_kept: bool = True
    """Whether equal prefixes are kept once."""
    why_not_kept: str = ""
    why_not_packed: str = ""
    """Why pieces of prompts and single tokens of others run in different steps; "": they run in one."""
    why_eager: str = ""
    """Why decode steps are neither compiled nor captured, though that was asked for."""
    why_chosen_behind: str = ""
    """The option for which the host chose tokens behind captured steps, the last such; "": they chose them all."""
    lost: str | None = None
    """Why the replica is lost; None: it is not."""

    @classmethod
    def of(cls, said: Mapping[str, Any], *, rows: int = 0, lost: str | None = None) -> ReplicaStatus:
        """From what rank 0 has said after a step. rows: that it is to continue now, of some of which it may not know
        yet that they have come, or gone.
        """
        running = min(rows, said.get("running", 0))
        given = {**said, "running": running, "waiting": rows - running, "lost": lost}
        return cls(**given if lost is None else {**given, "tokens_cached": 0})


@dataclass(frozen=True)
class ServingStatus:
    """One entry per replica that was started, in their order."""

    replicas: tuple[ReplicaStatus, ...]

    @property
    def running(self) -> int:
        return sum(each.running for each in self.replicas)

    @property
    def waiting(self) -> int:
        return sum(each.waiting for each in self.replicas)

    @property
    def is_lost(self) -> bool:
        """Whether no replica is left."""
        return all(each.lost is not None for each in self.replicas)
