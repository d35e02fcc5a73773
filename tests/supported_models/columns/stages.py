"""Whether pipeline stages compute what the model's own code does: whole texts, and 64 new tokens where it generates.

    whole texts   lengths 1, 5 and 40, two rows, at pp=2, pp=3 and tp=2 x pp=2, in float64
    generation    prompts of 1, 5, 11 and 40 tokens in one batch, greedy, at pp=2 and tp=2 x pp=2; see `generation`

The verdict "refused" has the reason: a model that has too few places to cut, or that a plan of one rank refuses too.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from partitioner.compile.compare import difference
from partitioner.compile.partition import compile_program
from partitioner.compile.tracing.trace import trace_step
from partitioner.errors import InputError, PlanError
from partitioner.program.plan import Plan
from partitioner.program.program import Program
from partitioner.proof.float64 import in_float64
from tests.support import reference
from tests.supported_models.generation import MODEL_IS_WRONG, NEW, PREFILL_STEP, PROMPTS, Own, generate, prompts_for
from tests.supported_models.generation import positions as positions_of

__all__ = ["compare_stages"]

WHOLE = ("pp=2", "pp=3", "tp=2,pp=2")
GENERATING = ("pp=2", "tp=2,pp=2")
EXACT = 1e-10


def compare_stages(model: Any, traced: Program, lengths: Sequence[int], *, generates: bool) -> dict[str, Any]:
    """The verdict on a model in float64 and its trace in float64: "equal", "wrong" or "refused", and why."""
    row: dict[str, Any] = {"verdict": "equal", "whole": {}, "tokens": 0}
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(3, vocabulary, (2, max(lengths)), generator=torch.Generator().manual_seed(0))
    expected = {n: reference.forward(model, exact=True, lifted=True, input_ids=ids[:, :n]) for n in lengths}

    @functools.cache
    def step() -> Program:
        return in_float64(trace_step(model))

    compiled = {}
    for text in WHOLE:
        try:
            parts = compiled[text] = compile_program(traced, Plan.parse(text), step=step)
        except PlanError as error:
            row["refused"] = f"{text}: {error}"
            continue
        found = [difference(parts.simulate(input_ids=ids[:, :n]), logits) for n, logits in expected.items()]
        row["whole"][text] = max(found)
    if any(error > EXACT for error in row["whole"].values()):
        return {**row, "verdict": "wrong", "why": "whole texts"}
    if not compiled:
        return {**row, "verdict": "refused", "why": row["refused"]}
    if not generates:
        return row
    own, prompts = Own(model), prompts_for(model)
    for text in GENERATING:
        if text not in compiled:
            continue
        try:
            new = min(NEW, positions_of(compiled[text]) - max(PROMPTS) + 1)
            own.judge(prompts, generate(compiled[text], prompts, new, prefill_step=PREFILL_STEP), text)
            row["tokens"] = new
        except (PlanError, InputError) as error:
            return {**row, "why": f"{text}: whole texts only; {error}"}
        except MODEL_IS_WRONG as error:
            return {**row, "verdict": "wrong", "why": str(error)}
    return row
