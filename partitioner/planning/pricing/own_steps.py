"""How fast this product's own steps are, in 16 bits, on devices where they were measured.

    captured steps    weights and caches at a share of the memory's speed, and a time for each kernel besides; steps of
                      one row and of several have kernels of their own (`StepShares`)
    prompts           at a share of the tables' speed; what is not captured takes its host a time for each op
    between ranks     what a collective, a stage's turn and its message, and tokens that ranks tell each other take
                      beside what crosses

A kernel asks for its weights while the one before it runs, so that a product takes what its bytes take and a
microsecond or two; norms stand in products, but for those of each head, which are kernels of their own.
`benchmarks/planning/own_steps.py` fits all of it on shapes of its own.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any, ClassVar

__all__ = ["OWN_STEPS", "OwnSteps", "StepShares", "met_of_fullest", "own_steps"]

OWN_STEPS = Path(__file__).parents[1] / "tables" / "own_steps.json"


@dataclass(frozen=True)
class StepShares:
    """Of a captured step. streamed, attention, experts: shares of the memory's speed, at which weights of linears,
    caches, and weights of the experts that are met come.

    product_s, attention_s, experts_s, norm_s: of each product, attention, layer of experts, and norm between a product
    and an attention, besides. step_s: of a step: its tokens' embeddings, their choice, its launch.
    """

    streamed: float
    attention: float = 1.0
    experts: float = 1.0
    product_s: float = 0.0
    attention_s: float = 0.0
    experts_s: float = 0.0
    norm_s: float = 0.0
    step_s: float = 0.0


@dataclass(frozen=True)
class OwnSteps:
    """one, several: of steps of one row, and of several. prefill: of prompts, over the tables' speed.

    first_s: until first tokens, besides. op_s: the host's, of each op of a prompt that is not captured.
    reduces: of all-reduces of captured steps, over the tables' speed. message_s: from a stage to the next one. turn_s:
    the host's, of a group's turn on a stage.
    """

    prefill: float
    one: StepShares
    several: StepShares
    first_s: float = 0.0
    op_s: float = 0.0
    reduces: float = 1.0
    message_s: float = 0.0
    turn_s: float = 0.0
    DTYPES: ClassVar = ("bfloat16", "float16")
    MOST_ROWS: ClassVar = 64

    def of_step(self, entry: str, rows: int, dtype: str) -> StepShares | None:
        """None where a step does not stream its weights."""
        if entry != "decode" or rows > self.MOST_ROWS or dtype not in self.DTYPES:
            return None
        return self.one if rows == 1 else self.several

    def __str__(self) -> str:
        return (
            f"prompts at {self.prefill:g} of the tables' speed, weights of steps of one row and of several at "
            f"{self.one.streamed:.2f} and {self.several.streamed:.2f} of the memory's"
        )

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> OwnSteps:
        return cls(**{**told, "one": StepShares(**told["one"]), "several": StepShares(**told["several"])})

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@functools.cache
def own_steps(fitted: str) -> OwnSteps | None:
    """fitted: the name of a device's tables. None where they were not measured."""
    told = json.loads(OWN_STEPS.read_text(encoding="utf-8"))["devices"] if OWN_STEPS.is_file() else {}
    return OwnSteps.from_json(told[fitted]) if fitted in told else None


def met_of_fullest(met: float, held: float, ranks: int) -> float:
    """Experts with a row on the one of `ranks` that has the most of them, for which the others wait in each layer.

    met: in the mean, of `held` on each. As of so many numbers that are drawn: Blom (1958), the largest of n.
    """
    if ranks < 2 or not 0 < met < held:
        return met
    most = NormalDist().inv_cdf((ranks - 0.375) / (ranks + 0.25))
    return min(held, met + most * math.sqrt(met * (1 - met / held)))
