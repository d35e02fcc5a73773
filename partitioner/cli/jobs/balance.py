"""What `partitioner balance` is asked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partitioner.cli.jobs.job import Job
from partitioner.errors import InputError
from partitioner.program.plan import Plan
from partitioner.storage.dtypes import require_asked
from runtime.processes.choose_device import choose_device

if TYPE_CHECKING:
    import torch

__all__ = ["PASS", "TextCase", "options_of", "read_text"]

PASS = "expert-parallel"
"""The pass whose option `owners` is."""


@dataclass(frozen=True)
class TextCase(Job):
    """tokens: of the text, which is run in pieces of `length`. dtype: None for that of the weights."""

    tokens: tuple[int, ...] = ()
    length: int = 512
    dtype: str | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.plan.ep < 2:
            raise InputError("experts are balanced over the ranks of ep, of which there is one: give --ep, at least 2")
        require_asked(self.dtype)
        if self.length < 1:
            raise InputError(f"--length must be at least 1, got {self.length}")
        if "capacity" in options_of(self.plan)[0]:
            raise InputError(
                f"{PASS}.capacity leaves out what full experts refuse, so that the hottest ones would not be counted: "
                "measure without it, and add it to the plan that is printed"
            )
        self.placed  # noqa: B018 - checks the device

    @property
    def placed(self) -> torch.device:
        return choose_device(self.device, num_ranks=self.plan.mesh.world_size)

    @property
    def pieces(self) -> list[list[int]]:
        return [list(self.tokens[at : at + self.length]) for at in range(0, len(self.tokens), self.length)]


def read_text(model: str, file: str) -> str:
    """Of the file, for the tokenizer of the folder `model`."""
    if not Path(model).is_dir():
        raise InputError(f"{model!r} is not a folder: give a checkpoint folder with its tokenizer")
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the text {file}: {error}") from error


def options_of(plan: Plan) -> tuple[dict[str, Any], list[Any]]:
    """Those of the pass, and the plan's other passes."""
    options: dict[str, Any] = {}
    others: list[Any] = []
    for chosen in plan.passes:  # as a plan holds them that was read
        if isinstance(chosen, tuple) and chosen[0] == PASS:
            options = dict(chosen[1])
        elif chosen != PASS:
            others.append(chosen)
    return options, others
