"""What ranks tell each other beside their tensors, and who may listen.

    exchange_json(x, group=.., num_ranks=..)    every rank's x, plain data, in their order: JSON, never pickle
    HostGather(heartbeat, ranks, ..)            small messages of ranks with GPUs, gathered on their hosts
    shut_out_strangers(before, heartbeat, ..)   once all groups are made: nobody else is in them, or can come

gloo listens on one port per group and process. It takes the first connection that names a peer's number, a small
integer, for that peer. So every pair of ranks proves to each other that both have the key of this meeting, and the
ports are shut.
"""

from __future__ import annotations

import hmac
import json
import logging
import os
import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import distributed as dist

from partitioner.errors import CommunicationError
from runtime.processes.authenticated_links import LONGEST
from runtime.processes.heartbeat import Heartbeat
from runtime.processes.listening import listening_sockets, shut

__all__ = ["HostGather", "exchange_json", "shut_out_strangers"]

_LARGEST = 1 << 20
_PROOF_BYTES = 32
_PAUSE_S = 0.004
"""At most, between two looks whether all have said what they have to say."""
_log = logging.getLogger("partitioner")


def exchange_json(
    mine: Any, *, group: dist.ProcessGroup, num_ranks: int, device: torch.device | str = "cpu"
) -> list[Any]:
    """`device`: where the group's collectives run."""
    text = torch.frombuffer(bytearray(json.dumps(mine).encode()), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(num_ranks)]
    dist.all_gather(sizes, torch.tensor([text.numel()], device=device), group=group)
    longest = max(map(int, sizes))
    if longest > _LARGEST or min(map(int, sizes)) < 0:
        raise CommunicationError(f"a rank sent {longest} bytes where a few hundred are expected")
    padded = torch.zeros(longest, dtype=torch.uint8, device=device)
    padded[: text.numel()] = text.to(device)
    texts = [torch.empty_like(padded) for _ in range(num_ranks)]
    dist.all_gather(texts, padded, group=group)
    return [json.loads(each[: int(size)].cpu().numpy().tobytes()) for each, size in zip(texts, sizes, strict=True)]


class HostGather:
    """Gathers what ranks say on their hosts, over the connections of the heartbeat.

    Rank 0, which passes everything on, must be one of them: it may be through, and gone, while others still compare.

    A host that waits for its device can only be ended, and never learns whom the device waits for. One that waits here
    gives up when a rank is lost, or after `timeout_s`, with a DistError. What it means, the failure verdict says.
    """

    def __init__(self, heartbeat: Heartbeat, ranks: Sequence[int], *, timeout_s: float) -> None:
        self._heartbeat, self._ranks, self._timeout_s = heartbeat, tuple(ranks), timeout_s
        self._rounds: dict[tuple[int, ...], int] = {}

    def gather(self, mine: bytes, ranks: Sequence[int] | None = None) -> list[bytes]:
        """What each of `ranks` has given, in their order: all of the group, or two of it. Each of them calls this."""
        among = self._ranks if ranks is None else tuple(ranks)
        number = self._rounds[among] = self._rounds.get(among, 0) + 1
        first, others = among[0], among[1:]
        topic = f"said {'-'.join(map(str, among))} {number}"
        # all to the first one, and it to all: rank 0, which passes everything on, sends no more than that
        if self._heartbeat.rank == first:
            everything = " ".join([mine.hex(), *(self._hear(topic, rank) for rank in others)])
            self._say(topic, everything, others)
        else:
            self._say(topic, mine.hex(), [first])
            everything = self._hear(topic, first)
        return [bytes.fromhex(each) for each in everything.split(" ")]

    def _say(self, topic: str, text: str, to: Sequence[int]) -> None:
        most = LONGEST - 1
        for at in range(0, max(1, len(text)), most):
            piece = (".", "+")[len(text) > at + most] + text[at : at + most]
            self._heartbeat.tell(f"{topic} from {self._heartbeat.rank} {at}", piece, to=to)

    def _hear(self, topic: str, rank: int) -> str:
        text, goes_on = "", "+"
        while goes_on == "+":
            piece = self._piece(f"{topic} from {rank} {len(text)}", rank)
            goes_on, text = piece[0], text + piece[1:]
        return text

    def _piece(self, kind: str, rank: int) -> str:
        heartbeat, deadline, pause_s = self._heartbeat, time.monotonic() + self._timeout_s, 0.0002
        while True:
            is_over = not heartbeat.is_well or rank in heartbeat.known("left")
            if (piece := heartbeat.taken(kind)) is not None:  # looked for last: it may be the last word of a rank
                return piece
            if is_over:
                raise dist.DistNetworkError("connection lost")
            if time.monotonic() > deadline:
                raise dist.DistNetworkError(f"timed out, waiting for {heartbeat.names([rank])}")
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _PAUSE_S)


def shut_out_strangers(
    before: frozenset[tuple[int, int]], heartbeat: Heartbeat, groups: Iterable[tuple[Sequence[int], dist.ProcessGroup]]
) -> None:
    """`before`: the sockets that listened before `groups` (of ranks, in order) were made."""
    if os.environ.get("TORCH_GLOO_LAZY_INIT", "").lower() in ("1", "true", "yes", "y", "on"):
        _log.warning("TORCH_GLOO_LAZY_INIT is set: the ports of gloo stay open to anyone who reaches them")
        return
    try:
        shut(listening_sockets() - before)
    except OSError as error:
        _log.warning("the ports of gloo cannot be shut, and stay open to anyone who reaches them: %s", error)
    for ranks, group in groups:
        if len(ranks) > 1:
            _prove(heartbeat, ranks, group)


def _prove(heartbeat: Heartbeat, ranks: Sequence[int], group: dist.ProcessGroup) -> None:
    """Every pair in both directions: over each goes what only a rank of this meeting can know."""
    me = heartbeat.rank
    mine = b"".join(heartbeat.proof(me, other) for other in ranks)
    sent = torch.frombuffer(bytearray(mine), dtype=torch.uint8)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    proofs = received.numpy().tobytes()
    for place, other in enumerate(ranks):
        got = proofs[place * _PROOF_BYTES : (place + 1) * _PROOF_BYTES]
        if not hmac.compare_digest(got, heartbeat.proof(other, me)):
            raise CommunicationError(
                f"rank {me}: who is connected in the place of rank {other} is not that rank. A stranger came first to "
                "gloo's port: see who else may connect to this host (docs/security.md)"
            )
