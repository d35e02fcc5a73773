"""The other design that is held to the same rows: a closed formula of queues, without the scheduler's steps.

    tpot       decode(running) + (1 - 1 / 2w) x (running - 1) / new x prefill     each waits for the others' prompts
    ttft       prefill x ((w - 1) x queue + (running + together) / 2) / w + decode, and the wait for room in the cache

While a request writes its tokens, every other one running is replaced once, and its prompt computed. The first of w
waves of requests comes at once, and each of them waits for half of the others, `together` of which are one run of
`RUN_TOKENS` tokens. Later ones queue as mean value analysis says (Reiser and Lavenberg, JACM 27, 1980): a server of
prompts, which those that write do not ask. A request that finds no room waits as long as Little's law says.
"""

from __future__ import annotations

from partitioner.planning.pricing.batching import Served
from partitioner.planning.pricing.continuous import SharedSteps
from partitioner.planning.quantities import RUN_TOKENS

__all__ = ["by_queues", "queue_seconds"]

WAVES = 10


def by_queues(steps: SharedSteps) -> Served:
    """Means over requests of the default load."""
    seconds, new = steps.seconds, steps.new
    running = min(steps.slots, steps.requests)
    decode = seconds.tokens(running, steps.prompt + new / 2)
    prefill = seconds.prompts(steps.prompt) + seconds.drain
    together = min(running, max(1, RUN_TOKENS // steps.prompt))
    tpot = decode + (1 - 0.5 / WAVES) * (running - 1) / new * seconds.prompts(steps.prompt)
    first = prefill * (running + together) / 2
    ttft = ((WAVES - 1) * queue_seconds(running, prefill, new * tpot) + first) / WAVES + decode
    if steps.requests > running:
        ttft += (steps.requests / running - 1) * new * tpot
    return Served(ttft, tpot, running * steps.worlds)


def queue_seconds(customers: int, service: float, thinking: float) -> float:
    """Seconds that a customer is at the one server, each thinking between two visits."""
    waiting = found = 0.0
    for count in range(1, customers + 1):
        found = service * (1 + waiting)
        waiting = found * count / (found + thinking)
    return found
