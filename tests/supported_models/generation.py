"""Whether a partitioned model continues texts as the model's own forward does, without a cache.

    prompts   1, 5, 11 and 40 tokens in one batch, at tp = 1, 2 and 3
    greedy    64 new tokens, prompts run 16 tokens at a time
    sampled   24 new tokens, prompts run at once; the same on all plans, at a temperature at which there are several

Each text that comes out, prompt and new tokens, then goes through the model's own code once, alone, in one pass. Row i
of that pass must choose token i + 1 (greedy), and its log_softmax must be the log-probability that generation told
(both).

One pass says as much as a loop. In a causal model, row i depends on tokens 0 to i only: it is what the loop computes
when its text has become i + 1 tokens. If the loop and the text agree up to token i, and row i chooses token i + 1, they
agree up to token i + 1; so by induction the loop writes the same text. The log-probabilities ask for more than the
loop: tiny models with random weights tend to repeat a token, which wrong logits would choose too. That the model is
causal is not assumed: the rows of each prompt run by itself must be those of the whole text.

Where two logits are equal to within rounding, either token will do. All in float64, with internal float32
casts raised to float64 in both models.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from partitioner.compile.partition import compile_program
from partitioner.compile.parts import Parts
from partitioner.compile.tracing.trace import trace_step
from partitioner.errors import InputError, PlanError
from partitioner.program.plan import Plan
from partitioner.program.program import Program
from partitioner.proof.float64 import in_float64
from runtime.generation.generation_request import Generated
from tests.support import reference

__all__ = [
    "MODEL_IS_WRONG",
    "NEW",
    "PREFILL_STEP",
    "PROMPTS",
    "Own",
    "compare_generation",
    "generate",
    "positions",
    "prompts_for",
]

PROMPTS = (1, 5, 11, 40)
ALONE = str(Plan())
PLANS = (ALONE, "tp=2", "tp=3")
NEW, SAMPLED, PREFILL_STEP = 64, 24, 16
TOLERANCE = 1e-9
_SMALL_SPLIT = 1e-3


class _Wrong(Exception):
    pass


MODEL_IS_WRONG = _Wrong
"""What `Own.judge` raises."""


def compare_generation(model: Any, traced: Program, *, new: int = NEW, plans: Sequence[str] = PLANS) -> dict[str, Any]:
    """The verdict on a model in float64 and its trace in float64: "equal", "refused" or "wrong", and why.

    tokens: how many were generated, fewer than `new` where the model has no more positions. logprob_error: the largest
    difference of a log-probability. plans: the first one is that of one rank.
    """
    row: dict[str, Any] = {"verdict": "equal", "tokens": 0, "logprob_error": 0.0}
    own = Own(model)
    prompts = prompts_for(model)
    drawn: dict[str, Tensor] = {}

    @functools.cache
    def step() -> Program:
        return in_float64(trace_step(model))

    try:
        for plan in plans:
            parts = compile_program(traced, Plan.parse(plan), step=step)
            count = min(new, positions(parts) - max(PROMPTS) + 1)
            temperature = max(1.0, float(own.logits(prompts[-1])[-1].std()))  # some models' logits are far apart
            greedy = generate(parts, prompts, count, prefill_step=PREFILL_STEP)
            sampled = generate(
                parts, prompts, min(SAMPLED, count), do_sample=True, top_k=None, seed=1, temperature=temperature
            )
            row["tokens"], drawn[plan] = count, sampled.sequences
            errors = (
                own.judge(prompts, greedy, f"{plan}, greedy"),
                own.judge(prompts, sampled, f"{plan}, sampled", temperature=temperature),
            )
            row["logprob_error"] = max(row["logprob_error"], *errors)
            if not torch.equal(drawn[plan], drawn[ALONE]):
                raise _Wrong(f"{plan}, sampled: other tokens than on one rank with the same seed")
    except (PlanError, InputError) as error:
        return {"verdict": "refused", "why": str(error)}
    except _Wrong as error:
        return {**row, "verdict": "wrong", "why": str(error)}
    if own.split > TOLERANCE:
        row["why"] = (
            f"as with the model's own cache, whose logits are up to {own.split:.0e} from those of the whole text"
        )
    distinct = drawn[ALONE][:, max(PROMPTS) :].unique().numel()
    if distinct < 5:
        return {**row, "verdict": "wrong", "why": f"sampled: only {distinct} tokens, which proves little"}
    return row


def prompts_for(model: Any) -> list[list[int]]:
    vocabulary = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, vocabulary, (length,), generator=generator).tolist() for length in PROMPTS]


def generate(parts: Parts[Any], prompts: list[list[int]], new: int, **options: Any) -> Generated:
    found = parts.generate(prompts, max_new_tokens=new, eos_token_id=[], logprobs=True, **options)
    assert isinstance(found, Generated)
    return found


def positions(parts: Parts[Any]) -> int:
    """How many tokens of a text the model has positions for."""
    program = parts.program_of("decode")
    _, longest = program.limits.get("positions", (1, None))
    tables = [given.bound.high + 1 for given in program.inputs if given.name == "position_ids" and given.bound]
    return min(tables + [NEW + max(PROMPTS)] + ([] if longest is None else [longest]))


class Own:
    """What the model's own forward says of a text; each text is run once, as different plans write the same."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.split = 0.0
        """How far the model's own cached logits are from those of the whole text, where that was asked."""
        self._known: dict[tuple[int, ...], Tensor] = {}

    def logits(self, text: list[int]) -> Tensor:
        """[tokens, V]"""
        key = tuple(text)
        if key not in self._known:
            self._known[key] = reference.forward(self.model, lifted=True, input_ids=torch.tensor([text]))[0]
        return self._known[key]

    def judge(self, prompts: list[list[int]], found: Generated, run: str, *, temperature: float | None = None) -> float:
        """The largest difference of a log-probability; raises _Wrong beyond the tolerance. Greedy: no temperature.

        Where the model's own whole-text logits are not those of its own cache, the cache's count, to within as much as
        the two differ, and `split` says how much that is.
        """
        worst = 0.0
        for row, prompt in enumerate(prompts):
            new, told = found.sequences[row, max(PROMPTS) :], found.logprobs[row]
            where = f"{run}, prompt of {len(prompt)}"
            text = [*prompt, *new[:-1].tolist()]
            rows = self.logits(text)
            if (self.logits(prompt) - rows[: len(prompt)]).abs().max() > TOLERANCE * rows.abs().max():
                raise _Wrong(f"prompt of {len(prompt)}: the model's own logits depend on later tokens")
            try:
                error = _judge(rows, len(prompt), new, told, where, temperature)
            except _Wrong:
                try:
                    by_token = reference.forward_by_token(self.model, torch.tensor([text]))[0]
                except Exception:  # a model that has no cache of its own
                    by_token = rows
                split = float((by_token - rows).abs().max())
                self.split = max(self.split, split)
                # a first token by itself may go either of its ways
                within = max(TOLERANCE, 10 * split) if split < _SMALL_SPLIT else TOLERANCE
                error = _judge(by_token, len(prompt), new, told, where, temperature, within)
            worst = max(worst, error)
        return worst


def _judge(
    rows: Tensor,
    length: int,
    new: Tensor,
    told: Tensor,
    where: str,
    temperature: float | None,
    within: float = TOLERANCE,
) -> float:
    """`rows` [tokens, V]: the model's own logits of prompt and new tokens."""
    scores = (rows[length - 1 :] / (temperature or 1)).log_softmax(-1)
    of_new = scores.gather(1, new[:, None])[:, 0]
    if temperature is None:
        other = (of_new < scores.amax(1) - within).nonzero()
        if len(other):
            at = int(other[0])
            raise _Wrong(f"{where}: new token {at} is {int(new[at])}, and the model chooses {int(scores[at].argmax())}")
    errors = (told - of_new).abs().nan_to_num(nan=torch.inf)
    if float(errors.max()) > within:
        at = int((errors > within).nonzero()[0])
        raise _Wrong(f"{where}: the log-probability of new token {at} is off by {errors[at]:.1e}")
    return float(errors.max())
