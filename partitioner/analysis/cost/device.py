"""Six numbers of a machine, measured at start, and the seconds that follow from them.

    bytes_per_s       read or written in memory          a large copy
    flops_per_s       of products, by dtype              a matmul
    inside, between   alpha (s) and beta (s per byte)    all-reduces of two sizes, between ranks of one host and of two

    node              max(bytes / bytes_per_s, flops / flops_per_s)
    all_reduce        2 (n - 1) alpha + 2 (n - 1) / n  m beta      ring: reduce-scatter, then all-gather
    reduce_scatter    (n - 1) alpha + (n - 1) / n  m beta          m: bytes that a rank brings, the largest of them
    all_gather        (n - 1) (alpha + m beta)
    all_to_all        (n - 1) alpha + (n - 1) / n  m beta          pairwise exchange
    permute, send, receive    alpha + m beta

The larger of two times is the roofline model (Williams, Waterman, Patterson 2009). The costs of the primitives are
those of Thakur, Rabenseifner, Gropp: "Optimization of Collective Communication Operations in MPICH" (2005), sections 3
and 4, without the term for adding. Alpha and beta are what these formulas give back for the two measured sizes, so
that they hold what a call costs beside the link. A group that crosses hosts is priced as if all its links did.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from partitioner.analysis.cost.node_cost import MeetingCost
from partitioner.errors import InputError
from runtime.communication.channels import Channel

__all__ = ["Device", "Link", "measure_device", "measure_link", "sent_share"]

SMALL_BYTES, LARGE_BYTES = 1 << 10, 1 << 22
_REPEATS = 5


@dataclass(frozen=True)
class Link:
    """alpha_s: of one message of no bytes; beta_s_per_byte: of each byte."""

    alpha_s: float
    beta_s_per_byte: float

    def __post_init__(self) -> None:
        if not all(math.isfinite(number) and number >= 0 for number in (self.alpha_s, self.beta_s_per_byte)):
            raise InputError(f"alpha and beta of a link must be finite and at least 0; got {self}")

    def seconds(self, meeting: MeetingCost) -> float:
        n, size = len(meeting.ranks), meeting.most
        if n == 1:
            return 0.0
        messages, sent = _COST[meeting.kind](n)
        return messages * self.alpha_s + sent * size * self.beta_s_per_byte


_COST: dict[str, Callable[[int], tuple[float, float]]] = {
    "all_reduce": lambda n: (2 * (n - 1), 2 * (n - 1) / n),
    "reduce_scatter": lambda n: (n - 1, (n - 1) / n),
    "all_gather": lambda n: (n - 1, n - 1),
    "all_to_all": lambda n: (n - 1, (n - 1) / n),
    "permute": lambda n: (1, 1),
    "send": lambda n: (1, 1),
    "receive": lambda n: (1, 1),
}
"""Of n ranks, by primitive: messages one after the other, and how often a rank's bytes are sent."""


def sent_share(kind: str, ranks: int) -> float:
    """How often a rank sends as many bytes as it brings, in a primitive over so many ranks."""
    return _COST[kind](ranks)[1] if ranks > 1 else 0.0


@dataclass(frozen=True)
class Device:
    """See the module's docstring. inside, between: None where they were not measured."""

    name: str
    bytes_per_s: float
    flops_per_s: Mapping[str, float]
    inside: Link | None = None
    between: Link | None = None

    def __post_init__(self) -> None:
        rates = [self.bytes_per_s, *self.flops_per_s.values()]
        if not all(math.isfinite(rate) and rate > 0 for rate in rates):
            raise InputError(f"the rates of a device must be finite and above 0; got {self}")

    def read_seconds(self, num_bytes: int) -> float:
        return num_bytes / self.bytes_per_s

    def product_seconds(self, flops: int, dtype: str) -> float:
        if not flops:
            return 0.0
        if dtype not in self.flops_per_s:
            raise InputError(
                f"products of {dtype} were not measured on {self.name!r}, only of {', '.join(self.flops_per_s)}: "
                f"measure_device(device, dtypes=[torch.{dtype}])"
            )
        return flops / self.flops_per_s[dtype]

    def meeting_seconds(self, meeting: MeetingCost, *, ranks_per_host: int | None = None) -> float:
        """ranks_per_host: ranks are on hosts in order, so many on each; None: all on one."""
        if len(meeting.ranks) == 1:
            return 0.0
        one_host = ranks_per_host is None or len({rank // ranks_per_host for rank in meeting.ranks}) == 1
        link = self.inside if one_host else self.between
        if link is None:
            field = "inside" if one_host else "between"
            raise InputError(
                f"the link {field} hosts of {self.name!r} was not measured: "
                f"dataclasses.replace(device, {field}=measure_link(channel, device))"
            )
        return link.seconds(meeting)

    def to_json(self) -> str:
        return json.dumps({**dataclasses.asdict(self), "flops_per_s": dict(self.flops_per_s)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Device:
        """Raises `InputError` where it is not what `to_json` wrote."""
        try:
            found: dict[str, Any] = json.loads(text)
            links = {name: Link(**found[name]) if found[name] else None for name in ("inside", "between")}
            return cls(**{**found, **links})
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f"this is no device as Device.to_json writes it: {error}") from error


def measure_device(device: torch.device, *, dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> Device:
    """The best of a few large copies, and of a few matmuls per dtype."""
    on_cpu = device.type == "cpu"
    size = 1 << (24 if on_cpu else 28)
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    copy_s = _best(lambda: target.copy_(source), device)
    width = 512 if on_cpu else 4096
    rates = {}
    for dtype in dtypes:
        matrix = torch.ones(width, width, dtype=dtype, device=device)
        product_s = _best(lambda matrix=matrix: matrix @ matrix, device)  # type: ignore[misc]
        rates[str(dtype).removeprefix("torch.")] = 2 * width**3 / product_s
    return Device(str(device), 2 * size / copy_s, rates)


def measure_link(channel: Channel, device: torch.device) -> Link:
    """Over the group of `channel`; every rank of it calls this, and all get the same numbers: the means of theirs."""
    n = len(channel.ranks)
    if n == 1:
        raise InputError(f"a link is measured between ranks, and the group over {channel.axes} has one rank")
    seconds = []
    for size in (SMALL_BYTES, LARGE_BYTES):
        x = torch.zeros(size // 4, dtype=torch.float32, device=device)
        seconds.append(_best(lambda x=x: channel.all_reduce(x), device))  # type: ignore[misc]
    small, large = (channel.all_reduce(torch.tensor(seconds, dtype=torch.float64, device=device)) / n).tolist()
    return fit_link(n, small, large)


def fit_link(n: int, small_s: float, large_s: float) -> Link:
    """The link on which all-reduces over n ranks take so long; neither number below 0, whatever noise says."""
    messages, sent = _COST["all_reduce"](n)
    beta = max(0.0, (large_s - small_s) / (sent * (LARGE_BYTES - SMALL_BYTES)))
    return Link(max(0.0, (small_s - sent * SMALL_BYTES * beta) / messages), beta)


def _best(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest run; the first, which may set things up, does not count."""
    times = []
    for _ in range(1 + _REPEATS):
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        times.append(time.perf_counter() - start)
    return max(min(times[1:]), 1e-9)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
