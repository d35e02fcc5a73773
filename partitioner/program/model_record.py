"""What a model was partitioned from, as far as it takes to partition it again: class, configuration, lengths."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # its import takes a process seconds, and ranks need none of it
    from transformers import PreTrainedModel

__all__ = ["ModelRecord"]


@dataclass(frozen=True)
class ModelRecord:
    """`config`: as config.json has it. `max_length`, `fixed_length`: as `partition` was given them."""

    class_name: str
    config: dict[str, Any]
    max_length: int | None = None
    fixed_length: int | None = None

    @classmethod
    def of(
        cls, model: PreTrainedModel, *, max_length: int | None = None, fixed_length: int | None = None
    ) -> ModelRecord:
        config = json.loads(model.config.to_json_string(use_diff=False))
        return cls(type(model).__name__, {**config, "architectures": [type(model).__name__]}, max_length, fixed_length)
