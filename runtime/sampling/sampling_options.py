"""How tokens are chosen: the options, their defaults and the order they act in are transformers'.

    repetition_penalty   every token so far, once (in greedy search too)
    temperature          then, with do_sample, on what the ones before left:
    top_k, top_p, min_p  the k most probable; the fewest with that much mass; those with that ratio to the most probable
    typical_p            those whose information is nearest to the entropy, with that much mass
    epsilon_cutoff, eta_cutoff    those with that probability; eta: with less where the entropy is high

`runtime/sampling/sampler.py` carries them out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from partitioner.errors import SamplingError

__all__ = ["Sampling"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to choose tokens; the names and defaults of transformers' GenerationConfig, and a seed."""

    do_sample: bool = False
    """False: the most probable token. Only `repetition_penalty` counts then."""
    temperature: float = 1.0
    top_k: int | None = 50
    """None or 0: off."""
    top_p: float | None = 1.0
    """None or 1: off."""
    min_p: float | None = None
    typical_p: float | None = 1.0
    """None or 1: off."""
    epsilon_cutoff: float | None = 0.0
    """None or 0: off; so is eta_cutoff."""
    eta_cutoff: float | None = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        _require(isinstance(self.do_sample, bool), "do_sample", "True or False", self.do_sample)
        for name in ("temperature", "repetition_penalty"):
            value: Any = {"temperature": self.temperature, "repetition_penalty": self.repetition_penalty}[name]
            hint = "; for greedy search set do_sample=False" if name == "temperature" and value == 0 else ""
            _require(_is_number(value) and 0 < value < math.inf, name, "a number above 0", value, hint)
        _require(
            self.top_k is None or (_is_whole(self.top_k) and self.top_k >= 0),
            "top_k",
            "None or a whole number, 0 for off",
            self.top_k,
        )
        for name, share in (("top_p", self.top_p), ("min_p", self.min_p)):
            _require(share is None or (_is_number(share) and 0 <= share <= 1), name, "None or from 0 to 1", share)
        typical = self.typical_p
        right = typical is None or (_is_number(typical) and 0 < typical <= 1)
        _require(right, "typical_p", "None or above 0 up to 1", typical)
        for name, least in (("epsilon_cutoff", self.epsilon_cutoff), ("eta_cutoff", self.eta_cutoff)):
            right = least is None or (_is_number(least) and 0 <= least < 1)
            _require(right, name, "None or from 0 to less than 1", least)
        _require(_is_whole(self.seed) and 0 <= self.seed < 2**64, "seed", "a whole number of 64 bits", self.seed)

    @property
    def filters(self) -> dict[str, Any]:
        """The filters by name, None where one is off."""
        top_p = None if self.top_p == 1 else self.top_p
        return {"top_k": self.top_k or None, "top_p": top_p, "min_p": self.min_p}

    @property
    def cutoffs(self) -> dict[str, Any]:
        """Those that need all that the filters leave, by name, None where one is off."""
        return {
            "typical_p": None if self.typical_p == 1 else self.typical_p,
            "epsilon": self.epsilon_cutoff or None,
            "eta": self.eta_cutoff or None,
        }


def _require(right: bool, field: str, required: str, got: object, hint: str = "") -> None:
    if not right:
        raise SamplingError(f"Sampling.{field} must be {required}, got {got!r}{hint}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
