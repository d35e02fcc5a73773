"""A plan under steady load: its steps by how much is in them, and what requests that come as others end have of them.

    requests    those that share steps: of one replica, or of all where experts span them, which then run in step
    slots       of these, so many have room in the cache; the rest waits until one ends

`batching` plays such requests through. Steps are priced at a few sizes, and linear between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from partitioner.planning.pricing.batching import Curve, FrontEnd, Load, Scheduler, Served, StepSeconds, play
from partitioner.planning.pricing.price import Pricer
from partitioner.planning.quantities import RUN_TOKENS, Workload
from partitioner.program.plan import Plan

__all__ = ["SharedSteps", "shared_steps"]

KEPT_FREE = 0.1
"""Of a device's memory, what engines leave to others."""
MOST_TOKENS = 4 * RUN_TOKENS
"""Of a step, that are priced; more go on as the last ones."""


@dataclass(frozen=True)
class SharedSteps:
    """See the module's docstring. replicas: that run in step. worlds: that have nothing to tell each other."""

    seconds: StepSeconds
    prompt: int
    new: int
    requests: int
    slots: int
    replicas: int = 1
    worlds: int = 1

    def served(
        self, scheduler: Scheduler | None = None, load: Load | None = None, front_end: FrontEnd | None = None
    ) -> Served:
        """Of all worlds; by default steps of 8192 tokens, prompts cut and mixed with tokens, ten waves of requests."""
        rule = Scheduler() if scheduler is None else scheduler
        found = play(
            self.seconds,
            self.prompt,
            self.new,
            self.requests,
            self.slots,
            scheduler=replace(
                rule,
                budget=rule.budget * self.replicas,
                most=None if rule.most is None else rule.most * self.replicas,
            ),
            load=Load() if load is None else load,
            front_end=front_end,
        )
        return replace(found, running=found.running * self.worlds)


def shared_steps(pricer: Pricer, plan: Plan, workload: Workload) -> SharedSteps:
    """workload.batch: requests at a time, of all replicas."""
    of_all = plan.mesh.size("dp")
    local = max(1, workload.batch // of_all)
    layers = pricer.even_stages(plan)
    running = min(local, _room(pricer, plan, workload, layers))
    replicas, worlds = (of_all, 1) if plan.ep > 1 else (1, of_all)
    counts = _doubling(running)
    # a step is linear in what caches hold, and kernels are measured from some tokens on
    far = workload.prompt + workload.new
    near = max(1, far // 2)
    at_near, at_far = ([pricer.step_seconds(plan, n, past, layers) for n in counts] for past in (near, far))
    slopes = [max(0.0, b - a) / (far - near) for a, b in zip(at_near, at_far, strict=True)]
    sizes = sorted({*_doubling(MOST_TOKENS)[6:], workload.prompt})
    runs = [pricer.run_seconds(plan, *_run(size, workload.prompt), layers) for size in sizes]
    whole, slowest = pricer.run_seconds(plan, *_run(workload.prompt, workload.prompt), layers)
    spread = [float(count * replicas) for count in counts]
    seconds = StepSeconds(
        Curve(spread, [b - far * slope for b, slope in zip(at_far, slopes, strict=True)]),
        Curve(spread, [1000 * slope for slope in slopes]),
        # of several replicas each has a prompt of its own before one has two
        Curve(
            [float(size if size <= workload.prompt else size * replicas) for size in sizes], [run[1] for run in runs]
        ),
        drain=whole - slowest,
        kernels=pricer.summary.num_ops,
    )
    return SharedSteps(seconds, workload.prompt, workload.new, local * replicas, running * replicas, replicas, worlds)


def _room(pricer: Pricer, plan: Plan, workload: Workload, layers: Sequence[int]) -> int:
    """Requests of a replica that the cache has room for, half of their new tokens written."""
    half = replace(workload, new=max(1, workload.new // 2))
    one, two = (pricer.memory(plan, replace(half, batch=each * plan.mesh.size("dp")), layers) for each in (1, 2))
    room = (1 - KEPT_FREE) * pricer.cluster.weakest.memory_bytes - one.weights - one.activations
    return max(1, int(room / max(1.0, two.cache - one.cache)))


def _run(tokens: int, prompt: int) -> tuple[int, int, int]:
    """Rows, length and past of a step with so many tokens of prompts: a part of one, or several."""
    if tokens <= prompt:
        return 1, tokens, (prompt - tokens) // 2
    return max(1, round(tokens / prompt)), prompt, 0


def _doubling(most: int) -> list[int]:
    """1, 2, 4, ... until `most` is reached."""
    found = [1]
    while found[-1] < most:
        found.append(2 * found[-1])
    return found
