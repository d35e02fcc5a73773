"""Whether a mixture of experts computes the same with its experts dealt out: whole texts and generation, in float64.

    plans       ep=2, 3 and 4, tp=2 with ep=2; tokens replicated or gathered, and sent to their experts
    texts       1, 5 and 40 tokens, two of each
    generation  prompts of 1 and 11 tokens, 6 new ones, against the model's own forward; over dp each rank has its own
                requests. Where a model's own cache says something else than its forward, against one rank, with a note

"equal", "wrong", or "refused" with the reason; "no experts" where none were captured as such: routed experts that a
model writes out by itself stay whole, or are divided by tp.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from transformers import CONFIG_MAPPING

from partitioner.compile.compare import difference
from partitioner.compile.partition import compile_program
from partitioner.compile.tracing.trace import trace_step
from partitioner.errors import CaptureError, InputError, PlanError
from partitioner.program.plan import Plan
from partitioner.program.program import Program
from partitioner.proof.float64 import in_float64
from runtime.ops.experts import expert_dispatch
from tests.support import reference

__all__ = ["PLANS", "compare_experts", "may_have_experts"]

PLANS = (
    "ep=2",
    "ep=3",
    "ep=4",
    "tp=2,ep=2",
    "ep=2,expert-parallel.exchange=exchange",
    "tp=2,ep=2,expert-parallel.exchange=exchange",
)
LENGTHS, PROMPTS, NEW = (1, 5, 40), (1, 11), 6
TOLERANCE = 1e-10
_FIELDS = {"num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts", "num_experts_per_tok"}


def may_have_experts(name: str) -> bool:
    """Whether its configuration has a number of experts."""
    cls = CONFIG_MAPPING[name.removeprefix("masked:")]
    return any(field.name in _FIELDS for field in dataclasses.fields(cls))


def compare_experts(model: Any, traced: Program, lengths: list[int]) -> dict[str, Any]:
    """`model` and `traced` in float64. The row's verdict is that of its worst plan."""
    layers = sum(node.target is expert_dispatch for node in traced.graph.nodes)
    if not layers:
        return {"verdict": "no experts", "why": "no routed experts were captured as such"}
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(3, vocabulary, (2, max(LENGTHS)), generator=torch.Generator().manual_seed(0))
    expected = {n: reference.forward(model, lifted=True, input_ids=ids[:, :n]) for n in lengths}
    row: dict[str, Any] = {"verdict": "equal", "layers": layers, "plans": {}, "generates": {}}

    @functools.cache
    def step() -> Program:
        return in_float64(trace_step(model))

    @functools.cache
    def alone() -> Any:
        return _generated(compile_program(traced, Plan(), step=step), ids)

    for text in PLANS:
        try:
            parts = compile_program(traced, Plan.parse(text), step=step)
            whole = [note for note in parts.report.notes if note.startswith("the experts of")]
            worst = max(difference(parts.simulate(input_ids=ids[:, :n]), logits) for n, logits in expected.items())
            row["plans"][text] = worst
            if whole:
                row.setdefault("whole", whole[0])
            if worst > TOLERANCE:
                return {**row, "verdict": "wrong", "why": f"{text}: off by {worst:.1e}"}
        except PlanError as error:
            return {**row, "verdict": "refused", "why": f"{text}: {error}"}
        try:
            found = _generated(parts, ids)
            row["generates"][text] = off = _from_its_forward(model, found, ids)
            if off > TOLERANCE and torch.equal(found.sequences, alone().sequences):
                row["own cache"] = f"one rank is {off:.1e} from the model's forward"
                off = float((found.logprobs - alone().logprobs).abs().max())
            if off > TOLERANCE:
                return {**row, "verdict": "wrong", "why": f"{text}, generating: off by {off:.1e}"}
        except (PlanError, InputError, CaptureError) as error:
            row["generates"][text] = f"refused: {error}"
    return row


def _prompts(ids: torch.Tensor) -> list[list[int]]:
    return [ids[0, :n].tolist() for n in PROMPTS]


def _generated(parts: Any, ids: torch.Tensor) -> Any:
    return parts.generate(_prompts(ids), max_new_tokens=NEW, eos_token_id=[], logprobs=True)


def _from_its_forward(model: Any, found: Any, ids: torch.Tensor) -> float:
    """The largest difference of a log-probability; infinite where another token is likelier."""
    worst = 0.0
    for row, prompt in enumerate(_prompts(ids)):
        said = found.sequences[row, -NEW:]
        text = torch.cat([torch.tensor(prompt), said])[None]
        logits = reference.forward(model, lifted=True, input_ids=text)[0, len(prompt) - 1 : -1].double()
        scores = torch.log_softmax(logits, dim=-1)
        of_new = scores.gather(1, said[:, None])[:, 0]
        if bool((of_new < scores.amax(1) - 1e-9).any()):
            return float("inf")
        worst = max(worst, float((found.logprobs[row] - of_new).abs().max()))
    return worst
