"""A warning where tensor parallelism crosses hosts, with what that costs: measured when the ranks connect.

Tensor parallelism has two collectives per layer and token, each of which waits for the slowest link. Between hosts
these are one to two orders of magnitude slower than inside one (Megatron-LM, arXiv:2104.04473, section 3.2).
"""

from __future__ import annotations

import logging
import time

import torch

from partitioner.sharding.mesh import Mesh
from runtime.communication.process_groups import ProcessGroups
from runtime.ops.communicating import COMMUNICATING, axes_text
from runtime.program.rank_program import RankProgram

__all__ = ["warn_cross_host"]

_log = logging.getLogger("partitioner")
_MESSAGE_BYTES = 16 * 1024  # one token's hidden state, of a model of 8192 in bfloat16
_TIMES = 5
_WITHIN_HOST = {"tp", "etp"}
"""Axes whose ranks meet in every layer."""


def warn_cross_host(program: RankProgram, communicator: ProcessGroups) -> None:
    """A collective of the groups that cross hosts. Rank 0 logs the warning, for the groups that it is in."""
    for axes, hosts in sorted(communicator.hosts.items()):
        if hosts < 2 or not _WITHIN_HOST & set(axes):
            continue
        count = _num_collectives(program, axes)
        if not count:
            continue
        seconds = _measured(communicator, axes)
        if communicator.rank == 0:
            _log.warning(
                "the %d ranks along %r are on %d hosts: a step has %d collectives there, each of which takes %.2g ms "
                "for %d KB, so that a token takes at least %.2g ms more. %s",
                program.mesh.size(*axes),
                axes_text(axes),
                hosts,
                count,
                seconds * 1e3,
                _MESSAGE_BYTES >> 10,
                count * seconds * 1e3,
                _instead(program.mesh, hosts),
            )


def _num_collectives(program: RankProgram, axes: tuple[str, ...]) -> int:
    """How many meetings over `axes` one run of the rank's graph has."""
    found = (
        meeting
        for node in program.graph.nodes
        if node.target in COMMUNICATING
        for meeting in COMMUNICATING[node.target].meetings(node)
    )
    return sum(set(meeting.axes) == set(axes) for meeting in found)


def _instead(mesh: Mesh, hosts: int) -> str:
    tp, pp = mesh.size("tp"), mesh.size("pp")
    if tp % hosts:
        return "Keep tp inside a host, and divide over hosts by pp, which sends one hidden state per token"
    return (
        f"Keep tp inside a host: tp={tp // hosts},pp={pp * hosts} has as many ranks, and sends one hidden state per "
        "token between hosts"
    )


def _measured(communicator: ProcessGroups, axes: tuple[str, ...]) -> float:
    """Seconds of one all-reduce, the median of some."""
    channel = communicator.channel(axes, node="crossing")
    content = torch.zeros(_MESSAGE_BYTES // 4, device=communicator.device)
    communicator.begin_run(new_shapes=True)
    channel.all_reduce(content)  # the first compares, and connects
    communicator.begin_run(new_shapes=False)
    times = []
    for _ in range(_TIMES):
        started = time.perf_counter()
        channel.all_reduce(content)
        if content.is_cuda:
            torch.cuda.synchronize(content.device)
        times.append(time.perf_counter() - started)
    return sorted(times)[_TIMES // 2]
