"""What a rank has to continue sequences on its stage: its programs, and what it reaches the other stages by."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from runtime.communication.channels import Channel
from runtime.communication.communicator import Communicator
from runtime.generation.steps import Steps
from runtime.program.rank_program import Stage

__all__ = ["Part"]


@dataclass(frozen=True)
class Part:
    """run: the programs over the cache; stage: as that for single tokens has it; channel: to all stages."""

    run: Steps
    stage: Stage
    channel: Channel
    communicator: Communicator
    device: torch.device

    @property
    def is_last(self) -> bool:
        return self.stage.index + 1 == self.stage.count

    @property
    def shares_head(self) -> bool:
        """Whether all stages share out the vocabulary head."""
        return self.run.shares_head
