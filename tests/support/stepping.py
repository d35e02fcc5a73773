"""What the tests of generation by steps share: a model traced with its own cache, compiled, and its prompts continued
one by one by the model's own forward, which has no cache.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from partitioner import Parts, Plan
from partitioner.capture import states_found_once
from partitioner.compile.generation import compile_steps
from partitioner.compile.tracing.trace import trace, trace_piece, trace_step
from partitioner.errors import CaptureError
from partitioner.program.program import Program
from partitioner.proof.float64 import in_float64
from tests.support import reference, zoo

LENGTHS = (1, 5, 11, 23)
NEW = 6
INDEXED = {"deepseek_v32", "glm_moe_dsa", "axk2", "hy_v4", "dots3_note_text"}
"""Models that choose by an index which tokens to attend to."""


@functools.cache
def traced(name: str) -> tuple[Any, Program]:
    """A small model in float64, and the trace of its steps without detours through float32."""
    # a few index heads score many tokens exactly 0, and which of equals are the best is not defined
    model, _ = zoo.tiny(name, **({"index_n_heads": 24} if name in INDEXED else {}))
    return model, in_float64(trace_step(model))


def parts_of(prefill: Program, decode: Program | None = None) -> Parts[None]:
    return Parts(prefill, None, generation=lambda: (prefill, decode or prefill))


@functools.cache
def compiled(name: str, tp: int) -> Parts[None]:
    return parts_of(*compile_steps(traced(name)[1], Plan(tp=tp)))


@functools.cache
def pieces(name: str) -> Program:
    """The trace of several tokens behind what is remembered, of a model with a state per sequence."""
    return in_float64(trace_piece(traced(name)[0]))


@functools.cache
def whole(name: str) -> Program | None:
    """The trace of whole texts; None where there is none of all lengths."""
    try:
        return in_float64(trace(traced(name)[0]))
    except CaptureError:
        return None


@functools.cache
def compiled_in_pieces(name: str, tp: int) -> Parts[None]:
    """Prompts by pieces, further tokens by steps."""
    with states_found_once():
        traced(name)
        pieces(name)
    return parts_of(*compile_steps(traced(name)[1], Plan(tp=tp), piece=lambda: pieces(name), whole=lambda: whole(name)))


def prompts(name: str) -> list[list[int]]:
    vocabulary = traced(name)[0].get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, vocabulary, (length,), generator=generator).tolist() for length in LENGTHS]


@functools.cache
def expected(name: str) -> tuple[list[list[int]], Tensor]:
    """The tokens that follow each prompt, and their log-probabilities [prompts, NEW]."""
    model = traced(name)[0]
    found, scores = [], []
    for prompt in prompts(name):
        text, said = list(prompt), []
        for _ in range(NEW):
            logits = reference.forward(model, lifted=True, input_ids=torch.tensor([text]))[0, -1]
            text.append(int(logits.argmax()))
            said.append(logits.log_softmax(-1)[text[-1]])
        found.append(text[len(prompt) :])
        scores.append(torch.stack(said))
    return found, torch.stack(scores)


def error(name: str, parts: Parts[Any], **options: Any) -> float:
    """Of the log-probabilities, against the model's own; asserts that the tokens are the same."""
    result = parts.generate(prompts(name), max_new_tokens=NEW, eos_token_id=[], logprobs=True, **options)
    tokens, scores = expected(name)
    assert result.sequences[:, -NEW:].tolist() == tokens
    return ((result.logprobs - scores) / scores.abs().max()).abs().max().item()
