"""How ranks come by memory of each other: all that they need is asked for and tried before anything relies on it.

connect(group, device, exchange=..)     a PeerMemory on every rank of the group, or Unavailable on every one
"""

from __future__ import annotations

import time
from typing import cast

import torch

from runtime.communication.channels import OwnRows
from runtime.communication.group_collectives import Group
from runtime.communication.peer_memory.choice import Way
from runtime.communication.peer_memory.mapped_memory import (
    Exchange,
    Unavailable,
    first_obstacle,
    mapped,
    obstacle,
    standing,
)
from runtime.communication.peer_memory.peer_memory import PeerMemory
from runtime.communication.peer_memory.rows.copy_rows import PeerCopies
from runtime.communication.peer_memory.rows.push_rows import PeerRows

__all__ = ["Exchange", "Unavailable", "connect"]


def connect(group: Group, device: torch.device, *, exchange: Exchange, timeout_s: float) -> PeerMemory:
    """Called by all ranks of `group` at once; `exchange(x)` brings every rank's x, plain data, to all, in order."""
    everyone = exchange(standing(device))
    why = obstacle(group.ranks, everyone, device)
    if why := first_obstacle(group.ranks, exchange({"why": why})):
        raise Unavailable(why, several_hosts=len({each["host"] for each in everyone}) > 1)
    # not by the name of the group, which torch uses again after the group is gone
    name = f"partitioner {everyone[0]['token']}"
    made: PeerMemory | None = None
    try:
        made = PeerMemory(group, *mapped(group, device, name), timeout_s=timeout_s)
    except (RuntimeError, AttributeError, ImportError, TypeError) as error:  # it is not torch's stable interface
        why = f"torch's symmetric memory: {str(error).partition(chr(10))[0]}"
    if why := first_obstacle(group.ranks, exchange({"why": why})):
        raise Unavailable(why)
    assert made is not None
    # a device that cannot do what its driver says would hang in the middle of a text: here, it is left alone
    if why := first_obstacle(group.ranks, exchange({"why": _trial(made, timeout_s)})):
        raise Unavailable(why)
    made.rows = PeerRows(made, name, exchange)
    made.copies = PeerCopies(made, PeerRows(made, f"{name} copied", exchange))
    return made


def _trial(peers: PeerMemory, timeout_s: float) -> str:
    """Why kernels do not sum as they should; "": they do."""
    count, own, device = peers.group.size, peers.group.coordinate, peers.device
    ranks = range(count)
    found = []
    for way, size in (("small", 4096), ("large", 4096), ("large", 300_000)):
        number = torch.arange(size, device=device) % 97
        out = torch.full((size,), torch.nan, device=device)
        peers.all_reduce((number + own).float(), out, cast("Way", way))
        found.append((out, (number * count + sum(ranks)).float()))
    rows = (torch.arange(16 * 256, device=device) % 97).view(16, 256)
    total = (rows * count + sum(ranks)).float()
    mine, normed = peers.row_sums.begin((rows + own).float(), None, None, 1e-6)()
    found.append((mine.rows, total[OwnRows.share(16, count, own)]))
    found.append(((normed * total.square().mean(-1, keepdim=True).sqrt()).round(), total))
    done = torch.cuda.Event()  # type: ignore[no-untyped-call]
    done.record()
    deadline = time.monotonic() + timeout_s
    while not (has_ended := bool(done.query())) and time.monotonic() < deadline:  # type: ignore[no-untyped-call]
        time.sleep(0.001)
    if not has_ended:
        peers.abandon()
        torch.cuda.synchronize(device)
        return "what one GPU wrote into another's memory did not come there"
    peers.forget_late()
    return "" if all(torch.equal(*each) for each in found) else "a sum over the GPUs' memory was wrong"
