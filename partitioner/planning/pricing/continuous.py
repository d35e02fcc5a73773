"""What continuous batching makes of a plan's steps: times of requests that come as others end.

    running    requests at a time that the cache has room for; the rest waits
    tpot       decode(running) + (1 - 1 / 2w) x (running - 1) / new x prefill     each waits for the others' prompts
    ttft       prefill x ((w - 1) x queue + (running + together) / 2) / w + decode, and the wait for room in the cache

So many requests are in the system at any time (a closed loop): a new one comes when one ends. While a request writes
its tokens, every other one running is replaced once, and its prompt computed. The first of w waves of requests comes at
once, and each of them waits for half of the others, `together` of which are one run of `RUN_TOKENS` tokens. Later ones
queue as mean value analysis says (Reiser and Lavenberg, JACM 27, 1980): a server of prompts, and as long as a request
writes, it does not ask. A request that finds no room waits as long as Little's law says: for its share of the others.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from partitioner.planning.pricing.price import Pricer
from partitioner.planning.quantities import RUN_TOKENS, Workload
from partitioner.program.plan import Plan

__all__ = ["WAVES", "Served", "Steps", "steps_of"]

WAVES = 10.0
"""Ten times as many requests as there are at a time, as load generators ask by default."""
KEPT_FREE = 0.1
"""Of a device's memory, what engines leave to others."""


@dataclass(frozen=True)
class Served:
    """Means over requests, in seconds. running: of all requests at a time, how many have room."""

    ttft_s: float
    tpot_s: float
    running: int


@dataclass(frozen=True)
class Steps:
    """Seconds of the steps that requests share. decode: of a step of all that run; prefill: of one prompt; stall: how
    long it keeps others from their next token (its slowest stage); requests: at a time; running: of these; met: those
    whose prompts a token waits for (of its replica, or of all replicas where experts span them); together: prompts of
    one run.
    """

    decode: float
    prefill: float
    stall: float
    requests: int
    running: int
    met: int
    together: int
    new: int

    def served(self, *, waves: float = WAVES, efficiency: float = 1.0, overhead_s: float = 0.0) -> Served:
        """efficiency: the speed of the kernels over that of the tables; overhead_s: of a request before its prompt."""
        decode, prefill, stall = (each / efficiency for each in (self.decode, self.prefill, self.stall))
        tpot = decode + (1 - 0.5 / waves) * (self.met - 1) / self.new * stall
        queue = _queue(self.met, prefill, self.new * tpot)
        first = prefill * (self.met + self.together) / 2
        ttft = overhead_s + ((waves - 1) * queue + first) / waves + decode
        if self.requests > self.running:
            ttft += (self.requests / self.running - 1) * self.new * tpot
        return Served(ttft, tpot, self.running)


def steps_of(pricer: Pricer, plan: Plan, workload: Workload) -> Steps:
    """workload.batch: requests at a time. Steps are those of a cache half full of new tokens."""
    replicas = plan.mesh.size("dp")
    layers = pricer.even_stages(plan)
    one, two = (pricer.memory(plan, replace(workload, new=max(1, workload.new // 2), batch=each * replicas), layers)
                for each in (1, 2))  # fmt: skip
    room = (1 - KEPT_FREE) * pricer.cluster.weakest.memory_bytes - one.weights - one.activations
    capacity = max(1, int(room / max(1.0, two.cache - one.cache)))
    local = max(1, workload.batch // replicas)
    running = min(local, capacity)
    decode = pricer.step_seconds(plan, running, workload.prompt + workload.new // 2, layers)
    prefill, stall = pricer.prompt_seconds(plan, workload.prompt, layers)
    met = running * replicas if plan.ep > 1 else running
    together = min(met, max(1, RUN_TOKENS // workload.prompt))
    return Steps(decode, prefill, stall, local * replicas, running * replicas, met, together, workload.new)


def _queue(customers: int, service: float, thinking: float) -> float:
    """Seconds that a customer is at the one server, each thinking between two visits."""
    waiting = found = 0.0
    for count in range(1, customers + 1):
        found = service * (1 + waiting)
        waiting = found * count / (found + thinking)
    return found
