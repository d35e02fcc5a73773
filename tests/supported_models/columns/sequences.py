"""Whether ranks that share out the tokens of a sequence compute what the model's own code does, in float64.

    whole texts   lengths 1, 2, 5, 33 and 40, two rows, at sp=2, 3, 4 and tp=2 x sp=2, and at sp=2 by each way
    generation    prompts of 1, 2, 5 and 11 tokens in one batch, 6 new ones, at sp=2, 3, 4 and tp=2 x sp=2

"equal", "wrong", or "refused" with the reason: an op that is not attention looks from one token at another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from partitioner.compile.compare import difference
from partitioner.compile.partition import compile_program
from partitioner.errors import InputError, PlanError
from partitioner.program.plan import Plan
from partitioner.program.program import Program
from tests.support import reference

__all__ = ["LENGTHS", "compare_sequences"]

LENGTHS = (1, 2, 5, 33, 40)
WAYS = ("ring", "gather", "ulysses")
WHOLE = (*(f"sp=2,sp_attention={way}" for way in WAYS), "sp=3", "sp=4", "sp=4,sp_attention=ulysses", "tp=2,sp=2")
GENERATING = ("sp=2", "sp=3", "sp=4", "tp=2,sp=2")
PROMPTS, NEW = (1, 2, 5, 11), 6
EXACT = 1e-10


def compare_sequences(model: Any, traced: Program, lengths: Sequence[int], *, generates: bool) -> dict[str, Any]:
    """The verdict on a model in float64 and its trace in float64."""
    row: dict[str, Any] = {"verdict": "equal", "whole": {}, "generates": {}}
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(3, vocabulary, (2, max(lengths)), generator=torch.Generator().manual_seed(0))
    expected = {n: reference.forward(model, exact=True, lifted=True, input_ids=ids[:, :n]) for n in lengths}
    for text in WHOLE:
        try:
            parts = compile_program(traced, Plan.parse(text))
        except PlanError as error:
            return {**row, "verdict": "refused", "why": f"{text}: {error}"}
        worst = max(difference(parts.simulate(input_ids=ids[:, :n]), logits) for n, logits in expected.items())
        row["whole"][text] = worst
        if worst > EXACT:
            return {**row, "verdict": "wrong", "why": f"{text}: off by {worst:.1e}"}
    for text in GENERATING if generates else ():
        try:
            off = row["generates"][text] = _generates(model, compile_program(traced, Plan.parse(text)), ids)
        except (PlanError, InputError) as error:
            row["generates"][text] = f"refused: {error}"
            continue
        if off > EXACT:
            return {**row, "verdict": "wrong", "why": f"{text}, generating: off by {off:.1e}"}
    return row


def _generates(model: Any, parts: Any, ids: torch.Tensor) -> float:
    """The largest difference of a log-probability; infinite where another token is likelier."""
    prompts = [ids[0, :n].tolist() for n in PROMPTS]
    found = parts.generate(prompts, max_new_tokens=NEW, eos_token_id=[], logprobs=True)
    worst = 0.0
    for row, prompt in enumerate(prompts):
        said = found.sequences[row, -NEW:]
        text = torch.cat([torch.tensor(prompt), said])[None]
        logits = reference.forward(model, lifted=True, input_ids=text)[0, len(prompt) - 1 : -1].double()
        scores = torch.log_softmax(logits, dim=-1)
        of_new = scores.gather(1, said[:, None])[:, 0]
        if bool((of_new < scores.amax(1) - 1e-9).any()):
            return float("inf")
        worst = max(worst, float((found.logprobs[row] - of_new).abs().max()))
    return worst
