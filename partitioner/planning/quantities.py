"""What is asked of a plan, and what it costs: a workload, bytes of the fullest rank, seconds by what they go to."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from partitioner.errors import InputError
from partitioner.program.plan import Plan

__all__ = ["GOALS", "Memory", "Price", "Seconds", "Workload", "runs_of"]

RUN_TOKENS = 8192
GOALS = ("latency", "throughput", "context")
"""What plans are ranked by."""


@dataclass(frozen=True)
class Workload:
    """prompt, new: tokens of a request. batch: requests at the same time, over the whole cluster. ttft_s, tpot_s:
    limits.
    """

    prompt: int
    new: int
    batch: int = 1
    ttft_s: float | None = None
    tpot_s: float | None = None

    def __post_init__(self) -> None:
        if min(self.prompt, self.new, self.batch) < 1:
            raise InputError(f"prompt, new and batch are at least 1; got {self.prompt}, {self.new}, {self.batch}")
        if any(limit is not None and not limit > 0 for limit in (self.ttft_s, self.tpot_s)):
            raise InputError("limits of ttft and tpot are seconds above 0")


@dataclass(frozen=True)
class Memory:
    """Bytes of the fullest rank."""

    weights: float
    cache: float
    activations: float
    buffers: float
    usable: float

    @property
    def total(self) -> float:
        return self.weights + self.cache + self.activations + self.buffers

    @property
    def fits(self) -> bool:
        return self.total <= self.usable


@dataclass
class Seconds:
    """By what they are spent on."""

    memory: float = 0.0
    products: float = 0.0
    links: float = 0.0
    waiting: float = 0.0
    """For other stages, for launches and the host."""
    by_collective: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        return self.memory + self.products + self.links + self.waiting

    @property
    def binds(self) -> str:
        names = {"memory": "memory bandwidth", "products": "products", "links": "links", "waiting": "waiting"}
        return names[max(names, key=lambda name: getattr(self, name))]

    def add(self, other: Seconds, times: float = 1.0) -> None:
        for name in ("memory", "products", "links", "waiting"):
            setattr(self, name, getattr(self, name) + times * getattr(other, name))
        for name, value in other.by_collective.items():
            self.by_collective[name] = self.by_collective.get(name, 0.0) + times * value

    def at_speed(self, share: float) -> Seconds:
        """With kernels that reach this share of the speed they were priced at; links and waiting as they are."""
        return replace(self, memory=self.memory / share, products=self.products / share)

    def link(self, name: str, seconds: float) -> None:
        self.links += seconds
        self.by_collective[name] = self.by_collective.get(name, 0.0) + seconds


@dataclass(frozen=True)
class Price:
    """Of one plan. refused: why it cannot be, or ""; times are None then. exchange: of experts, by entry. shares_head:
    whether its stages share out the rows of the vocabulary head.
    """

    plan: Plan
    memory: Memory
    refused: str = ""
    prefill: Seconds | None = None
    decode: Seconds | None = None
    workload: Workload | None = None
    exchange: str = ""
    layers: tuple[int, ...] = ()
    note: str = ""
    shares_head: bool = False

    @property
    def ttft_s(self) -> float:
        return self.prefill.total if self.prefill is not None else math.inf

    @property
    def tpot_s(self) -> float:
        return self.decode.total if self.decode is not None else math.inf

    @property
    def latency_s(self) -> float:
        """Until a request's last token."""
        return self.ttft_s + (self.workload.new - 1) * self.tpot_s if self.workload is not None else math.inf

    @property
    def tokens_per_s(self) -> float:
        """New tokens, of all requests."""
        return self.workload.batch * self.workload.new / self.latency_s if self.workload is not None else 0.0


def runs_of(workload: Workload, rows: int) -> tuple[int, int, int]:
    """Rows of a run, its tokens of each, and how many runs."""
    if workload.prompt >= RUN_TOKENS:
        return 1, RUN_TOKENS, rows * -(-workload.prompt // RUN_TOKENS)
    together = min(rows, RUN_TOKENS // workload.prompt)
    return together, workload.prompt, -(-rows // together)
