"""What the equivalence tests share: a zoo model traced once, compiled for several plans, compared with the model's
own code.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING

from partitioner import Parts, Plan
from partitioner.compile.compare import difference
from partitioner.compile.partition import compile_program
from partitioner.compile.tracing.trace import trace
from partitioner.errors import PlanError
from partitioner.program.program import Program
from partitioner.proof.float64 import in_float64
from tests.support import reference, zoo

EXACT = 1e-10


_SPELLINGS = {
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("n_head", "n_heads"),
    "num_key_value_heads": (),
    "hidden_size": ("n_embd", "d_model"),
    "head_dim": (),
    "intermediate_size": ("ffn_dim", "n_inner", "moe_intermediate_size", "shared_expert_intermediate_size"),
    "vocab_size": (),
}


def sized(name: str, **sizes: int) -> Any:
    """A zoo model of these sizes, however its config spells them."""
    fields = {field.name for field in dataclasses.fields(CONFIG_MAPPING[name.removeprefix("masked:")])}
    given = {
        spelling: sizes[size]
        for size, spellings in _SPELLINGS.items()
        for spelling in (size, *spellings)
        if spelling in fields
    }
    if "kv_lora_rank" in fields:
        given["num_key_value_heads"] = sizes["num_attention_heads"]
    return zoo.tiny(name, **given)[0]


def traced(name: str, *, odd: bool = False) -> tuple[Any, Program]:
    """A small model in float64, and its trace without detours through float32; one of each, whoever asks."""
    return _traced(name, odd)


@functools.cache
def _traced(name: str, odd: bool) -> tuple[Any, Program]:
    model, _ = zoo.odd(name) if odd else zoo.tiny(name)
    return model, in_float64(trace(model))


def compiled(name: str, tp: int, *, odd: bool = False, **plan: Any) -> Parts[Any]:
    """Parts of the test's own, of what was compiled once for all who ask for the same."""
    return compiled_for(name, Plan(tp=tp, **plan), odd=odd)


def compiled_for(name: str, plan: Plan | str, *, odd: bool = False) -> Parts[Any]:
    asked = Plan.parse(plan) if isinstance(plan, str) else plan
    if not _can_be_written(asked):
        return compile_program(traced(name, odd=odd)[1], asked)
    return _copied(_compiled_once(name, str(asked), odd), asked)


def _can_be_written(plan: Plan) -> bool:
    """Not one with passes of the test's own."""
    try:
        return Plan.parse(str(plan)) == plan
    except PlanError:
        return False


def compiled_once(name: str, tp: int, *, odd: bool = False, **plan: Any) -> Parts[Any]:
    """The same, with its engines, for tests that change nothing of it."""
    asked = Plan(tp=tp, **plan)
    assert _can_be_written(asked)
    return _compiled_once(name, str(asked), odd)


@functools.cache
def _compiled_once(name: str, plan: str, odd: bool) -> Parts[Any]:
    return compile_program(traced(name, odd=odd)[1], Plan.parse(plan))


def _copied(parts: Parts[Any], plan: Plan) -> Parts[Any]:
    def generation() -> tuple[Program, Program]:
        prefill, decode = (parts.program_of(entry) for entry in ("prefill", "decode"))
        own = prefill.copy()
        return own, own if decode is prefill else decode.copy()

    program = parts.program.copy()
    return Parts(program, parts.report, traced=parts.traced, generation=generation, plan=plan)


def tokens(name: str, length: int, *, batch: int = 2, odd: bool = False) -> Tensor:
    vocabulary = traced(name, odd=odd)[0].get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(length)
    return torch.randint(3, vocabulary, (batch, length), generator=generator)


def error(name: str, parts: Parts[Any], length: int, *, batch: int = 2, odd: bool = False) -> float:
    """Of the simulated ranks against the model's own code, relative to the largest logit."""
    ids = tokens(name, length, batch=batch, odd=odd)
    expected = reference.forward(traced(name, odd=odd)[0], lifted=True, input_ids=ids)
    return difference(parts.simulate(input_ids=ids), expected)
