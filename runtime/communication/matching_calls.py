"""What one rank is about to do in a collective, and the check that all ranks of the group are about to do the same.

    Call.agreed()             what must be equal on all ranks: operation, axis, dtype, options, shape
    Call.encode(), .decode()  a fingerprint of FINGERPRINT_BYTES, so that the check is itself one fixed-size gather

An uneven all_gather may differ in the gathered dim; everything else must be equal. Checking the order and the
arguments of collectives at run time follows MUST (Hilbrich et al., "MPI Runtime Error Detection with MUST", 2013).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from partitioner.errors import RankMismatch

__all__ = ["FINGERPRINT_BYTES", "Call", "check_agreement"]

FINGERPRINT_BYTES = 512
"""Large enough for all that an error shows; longer fields are shortened, and the digest still tells them apart."""


@dataclass(frozen=True)
class Call:
    """One rank's side of a collective: the node, and what it brings."""

    rank: int
    node: str
    op: str
    axis: str
    options: Mapping[str, Any] = field(default_factory=dict)
    shape: tuple[int, ...] = ()
    dtype: str = ""
    digest: str = ""
    """Set on calls that came over the wire, whose fields may have been shortened."""

    def on(self, x: Tensor) -> Call:
        return replace(self, shape=tuple(x.shape), dtype=str(x.dtype).removeprefix("torch."))

    def agreed(self) -> str:
        """A digest of what must be equal on every rank of the group."""
        if self.digest:
            return self.digest
        shape: list[int | None] = list(self.shape)
        if self.options.get("sizes") is not None:
            shape[self.options["dim"]] = None
        parts = [self.op, self.axis, self.dtype, shape, sorted(self.options.items())]
        return hashlib.blake2b(json.dumps(parts).encode(), digest_size=12).hexdigest()

    def encode(self) -> bytes:
        shape = list(self.shape) if len(self.shape) <= 12 else [*self.shape[:11], -1]
        options = json.dumps(dict(self.options))
        options = options if len(options) <= 100 else f"{options[:97]}..."
        fields = [self.rank, self.node[:100], self.op, self.axis, options, shape, self.dtype, self.agreed()]
        return json.dumps(fields, separators=(",", ":")).encode()[:FINGERPRINT_BYTES].ljust(FINGERPRINT_BYTES)

    @classmethod
    def decode(cls, fingerprint: bytes) -> Call:
        rank, node, op, axis, options, shape, dtype, digest = json.loads(fingerprint)
        return cls(rank, node, op, axis, {"": options} if options != "{}" else {}, tuple(shape), dtype, digest)

    def __str__(self) -> str:
        options = "".join(f", {value if not name else f'{name}={value}'}" for name, value in self.options.items())
        shape = "x".join(map(str, self.shape)) or "scalar"
        return f"rank {self.rank}: node {self.node!r}, {self.op} over {self.axis!r}, {self.dtype} [{shape}]{options}"


def check_agreement(calls: Sequence[Call]) -> None:
    """Raise RankMismatch, naming both nodes, where two ranks disagree."""
    first = calls[0]
    for other in calls[1:]:
        if other.agreed() != first.agreed():
            raise RankMismatch(
                f"ranks {first.rank} and {other.rank} disagree on a collective:\n  {first}\n  {other}\n"
                "All ranks must reach the same operations in the same order with the same shapes and dtypes: "
                "give every rank the same inputs and the same program"
            )
