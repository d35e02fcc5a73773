"""How many threads a rank on a CPU computes with: one where its products are small.

Threads meet at the end of every product. Where one is over in a fraction of a millisecond, the meeting takes as long as
what it saves; and where other processes want the cores, such as the one that answers requests, each meeting waits until
the slowest thread has had its turn.
"""

from __future__ import annotations

import math
import os

import torch

from runtime.program.rank_program import RankProgram

__all__ = ["SMALL_PRODUCT", "product_of", "use_threads_for"]

SMALL_PRODUCT = 2e7
"""Operations of a product that a core does in about half a millisecond."""


def product_of(program: RankProgram, tokens: int) -> float:
    """Operations of the rank's average product with a matrix, for so many tokens; 0 where it has no matrix."""
    sizes = [math.prod(each.local_shape[-2:]) for each in program.weights if len(each.local_shape) >= 2]
    return 2 * tokens * sum(sizes) / len(sizes) if sizes else 0.0


def use_threads_for(program: RankProgram, tokens: int, device: torch.device) -> int:
    """Sets this process's threads for steps of `tokens` tokens, and says how many; what OMP_NUM_THREADS says holds."""
    asked = "OMP_NUM_THREADS" in os.environ
    if device.type == "cpu" and not asked and product_of(program, tokens) < SMALL_PRODUCT:
        torch.set_num_threads(1)
    return torch.get_num_threads()
