"""A summary's expressions with numbers put in: what a rank holds under a plan, rows, lengths; each computed once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import sympy

from partitioner.analysis.cost.expressions import EXPERTS, MET, PAST, ROUTED
from partitioner.planning.summary import Summary
from partitioner.program.plan import Plan

__all__ = ["Evaluated"]


class Evaluated:
    """See the module's docstring."""

    def __init__(self, summary: Summary) -> None:
        self.summary = summary
        self._functions: dict[Any, Callable[..., Any]] = {}
        self._costs: dict[Any, Any] = {}

    def _values(self, plan: Plan, rows: float, length: float, past: float, *, alike: bool = False) -> dict[Any, float]:
        """alike: whether the ranks of sp have the same tokens, as of a step; otherwise `length` are a rank's own."""
        summary = self.summary
        etp = plan.etp if plan.ep * plan.etp > 1 else plan.tp
        degrees = ("held", plan.tp, plan.ep, etp)
        if degrees not in self._costs:
            self._costs[degrees] = summary.values(tp=plan.tp, ep=plan.ep, etp=etp)
        found = dict(self._costs[degrees])
        experts = summary.experts
        found |= {summary.batch: rows, summary.sequence: length}
        found[PAST], found[MET], found[ROUTED] = past, 1, 1
        if experts is not None:
            # ranks whose tokens meet at the experts, and are not the same
            groups = max(1, plan.ep * etp // (plan.tp * plan.sp if alike else plan.tp))
            tokens = rows * length * groups
            chance = 1 - (1 - experts.chosen / experts.count) ** tokens
            found[MET] = max(min(found[EXPERTS], found[EXPERTS] * chance), min(found[EXPERTS], 1e-9))
            found[ROUTED] = groups / plan.ep
        return found

    def _over_stages(self, plan: Plan, values: Mapping[Any, float]) -> dict[Any, float]:
        """The same where the rows of the vocabulary head are shared out over all stages, too."""
        heads = {symbol: kind for symbol, (kind, role) in self.summary.classes.items() if role == "vocabulary"}
        return {**values, **{symbol: kind.held(plan.tp * plan.pp) for symbol, kind in heads.items()}}

    def _given(self, values: Mapping[Any, float]) -> list[float]:
        return [values[symbol] for symbol in self.summary.arguments]

    def _number(self, key: Any, expression: Any, values: Mapping[Any, float]) -> float:
        return float(self._function(key, [expression])(*self._given(values))[0])

    def _function(self, key: Any, wanted: list[Any]) -> Callable[..., Any]:
        if key not in self._functions:
            modules: list[Any] = [{"Min": min, "Max": max, "floor": math.floor}, "math"]
            self._functions[key] = sympy.lambdify(self.summary.arguments, wanted, modules=modules, cse=True)
        return self._functions[key]
