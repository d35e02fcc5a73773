"""What one rank is about to do together with others, and the check that they are about to do the same.

    Call.agreed()             what must be equal on all ranks that meet
    Call.encode(), .decode()  a fingerprint of FINGERPRINT_BYTES, so that the check is itself one fixed-size exchange

    kind                     must be equal                                     may differ
    all_reduce, permute      kind, axes, options, dtype, shape
    all_gather               the same                                          the gathered dim, if sizes are given
    reduce_scatter           the same
    all_to_all               kind, axes, dtype, row shape, sizes_from          the counts, which must fit each other
    send, receive            sender, receiver, axes, dtype, shape              the kind: one sends, one receives

Checking the order and the arguments of collectives at run time follows MUST (Hilbrich et al., "MPI Runtime Error
Detection with MUST", 2013).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from partitioner.errors import RankMismatch

__all__ = ["FINGERPRINT_BYTES", "Call", "check_agreement", "check_counts"]

FINGERPRINT_BYTES = 512
"""Large enough for all that an error shows; longer fields are shortened, and the digest still tells them apart."""


@dataclass(frozen=True)
class Call:
    """One rank's side of a meeting: the node, and what it brings."""

    rank: int
    node: str
    kind: str
    axis: str
    """The axes of the group, as text."""
    options: Mapping[str, Any] = field(default_factory=dict)
    shape: tuple[int, ...] = ()
    dtype: str = ""
    digest: str = ""
    """Set on calls that came over the wire, whose fields may have been shortened."""
    peer: int | None = None
    """The other rank of a send or receive."""
    sizes_from: str | None = None
    """The node that the counts of an all_to_all were read from."""
    counts: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    """What an all_to_all sends to each rank of the group, and receives from each."""

    def on(self, x: Tensor) -> Call:
        return self.of(tuple(x.shape), x.dtype)

    def of(self, shape: Sequence[int], dtype: torch.dtype) -> Call:
        return replace(self, shape=tuple(shape), dtype=str(dtype).removeprefix("torch."))

    def agreed(self) -> str:
        """A digest of what must be equal on every rank that takes part."""
        if self.digest:
            return self.digest
        shape: list[int | None] = list(self.shape)
        if self.kind == "all_gather" and self.options.get("sizes") is not None:
            shape[self.options["dim"]] = None
        if self.kind == "all_to_all":
            shape[0] = None
        kind, pair = self.kind, None
        if self.peer is not None:
            pair = (self.rank, self.peer) if kind == "send" else (self.peer, self.rank)
            kind = "send and receive"
        options = sorted(self.options.items())
        parts = [kind, self.axis, self.dtype, shape, options, pair, self.sizes_from]
        return hashlib.blake2b(json.dumps(parts).encode(), digest_size=12).hexdigest()

    def encode(self) -> bytes:
        shape = list(self.shape) if len(self.shape) <= 12 else [*self.shape[:11], -1]
        options = json.dumps(dict(self.options))
        options = options if len(options) <= 100 else f"{options[:97]}..."
        sizes_from = self.sizes_from and self.sizes_from[:40]
        fields = [self.rank, self.node[:100], self.kind, self.axis, options, shape, self.dtype, self.agreed()]
        fields += [self.peer, sizes_from]
        return json.dumps(fields, separators=(",", ":")).encode()[:FINGERPRINT_BYTES].ljust(FINGERPRINT_BYTES)

    @classmethod
    def decode(cls, fingerprint: bytes) -> Call:
        rank, node, kind, axis, options, shape, dtype, digest, peer, sizes_from = json.loads(fingerprint)
        given = {"": options} if options != "{}" else {}
        return cls(rank, node, kind, axis, given, tuple(shape), dtype, digest, peer, sizes_from)

    def __str__(self) -> str:
        options = "".join(f", {value if not name else f'{name}={value}'}" for name, value in self.options.items())
        if self.sizes_from is not None:
            options += f", counts of {self.sizes_from!r}"
        if self.counts is not None:
            options += f", sends {list(self.counts[0])}, receives {list(self.counts[1])}"
        peer = "" if self.peer is None else f" {'to' if self.kind == 'send' else 'from'} rank {self.peer}"
        shape = "x".join(map(str, self.shape)) or "scalar"
        what = f"{self.kind}{peer} over {self.axis!r}, {self.dtype} [{shape}]{options}"
        return f"rank {self.rank}: node {self.node!r}, {what}"


def check_agreement(calls: Sequence[Call]) -> None:
    """Raise RankMismatch, naming both nodes, where two ranks disagree; `calls` in order of coordinate."""
    first = calls[0]
    for other in calls[1:]:
        if other.agreed() != first.agreed():
            raise _mismatch(
                first,
                other,
                "All ranks must reach the same operations in the same order with the same shapes and dtypes: "
                "give every rank the same inputs and the same program",
            )


def check_counts(calls: Sequence[Call]) -> None:
    """Raise RankMismatch where one rank of an all_to_all sends another count than its receiver expects."""
    for i, sender in enumerate(calls):
        for j, receiver in enumerate(calls):
            if sender.counts is None or receiver.counts is None:
                continue
            sent, expected = sender.counts[0][j], receiver.counts[1][i]
            if sent != expected:
                why = (
                    f"Rank {sender.rank} sends {sent} rows to rank {receiver.rank}, which expects {expected}: both "
                    "must read one exchange of counts"
                )
                raise _mismatch(sender, receiver, why)


def _mismatch(one: Call, other: Call, why: str) -> RankMismatch:
    is_collective = one.peer is None and other.peer is None
    what = "a collective" if is_collective else "what they do together"
    return RankMismatch(f"ranks {one.rank} and {other.rank} disagree on {what}:\n  {one}\n  {other}\n{why}")
