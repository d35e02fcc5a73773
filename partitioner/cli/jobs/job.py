"""What is done with MODEL, as the ranks that do it are told."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from partitioner.cli.jobs.compile import Compile
from partitioner.program.plan import Plan

__all__ = ["Job"]


@dataclass(frozen=True)
class Job:
    """Plain data, lists as tuples. What its fields say by themselves is checked when it is made."""

    model: str
    compile: Compile = field(default_factory=Compile)

    def __post_init__(self) -> None:
        self.plan  # noqa: B018 - checks the degrees

    @property
    def plan(self) -> Plan:
        return self.compile.plan

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        told: dict[str, Any] = json.loads(text)
        fields: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in told.items()}
        return cls(**{**fields, "compile": Compile.from_data(told["compile"])})
