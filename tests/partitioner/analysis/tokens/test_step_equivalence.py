"""Models whose tokens meet in more than attention continue texts as their own forward does without a cache."""

import re

import pytest
import torch

from partitioner import PlanError
from partitioner.analysis.tokens.step_equivalence import why_steps_differ
from partitioner.compile.generation import compile_steps
from partitioner.compile.partition import compile_program
from partitioner.compile.tracing.trace import trace, trace_step
from partitioner.program.plan import Plan
from partitioner.proof.float64 import in_float64
from runtime.kv_cache.cache import Cache
from tests.support import partitioned, reference, stepping, zoo

BY_POSITION = ["bloom", "gpt_neo", "gptj", "mpt", "falcon", "codegen", "gpt_neox_japanese", "deepseek_v32"]
BY_SEQUENCE = ["mamba", "lfm2_moe", "bamba"]
SLOW = ["mamba2", "falcon_mamba", "jamba", "falcon_h1", "granitemoehybrid", "lfm3", "glm_moe_dsa", "axk2", "hy_v4"]
QUICK = ["bloom", "gpt_neo"]  # what remembers a state per sequence is in tests/equivalence/test_prompts_with_states.py


@pytest.mark.parametrize("tp", [*(pytest.param(tp, marks=pytest.mark.slow) for tp in (1, 2)), 3])
@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in BY_POSITION + BY_SEQUENCE + SLOW]
)
def test_rows_of_all_lengths_are_continued_as_each_alone(name: str, tp: int) -> None:
    parts = stepping.compiled(name, tp)
    assert stepping.error(name, parts, prefill_step=4) < 1e-9
    assert stepping.error(name, parts) < 1e-9  # with what earlier texts left in the cache


def test_states_are_split_with_what_they_are_made_of() -> None:
    states = stepping.compiled("lfm2_moe", 2).program_of("decode").states
    assert {state.per_token for state in states.values()} == {True, False}
    assert all(any(state.layout.dims) for state in states.values())


def test_a_row_that_has_ended_changes_no_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control of `active`: without it the states count a repeated token twice."""
    write = Cache._write

    def every_row(self: Cache, state: str, value: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
        self.buffers[state] = value
        return value

    monkeypatch.setattr(Cache, "_write", every_row)
    with pytest.raises(AssertionError):
        stepping.error("lfm2_moe", stepping.parts_of(stepping.compiled("lfm2_moe", 1).program))
    monkeypatch.setattr(Cache, "_write", write)
    assert stepping.error("lfm2_moe", stepping.parts_of(stepping.compiled("lfm2_moe", 1).program)) < 1e-9


def test_keys_made_of_a_state_that_has_moved_on_are_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for keys: those of a repeated token are not the ones that its position has."""
    monkeypatch.setattr(Cache, "_active_rows", lambda self, x: x)
    with pytest.raises(AssertionError):
        stepping.error("lfm2_moe", stepping.parts_of(stepping.compiled("lfm2_moe", 1).program))


def test_a_plain_partition_finds_the_steps_by_itself() -> None:
    model, program = stepping.traced("bloom")
    whole = in_float64(trace(model))
    parts = compile_program(whole, Plan(tp=2), step=lambda: program)
    assert stepping.error("bloom", parts) < 1e-9
    without = compile_program(whole, Plan(tp=2))
    with pytest.raises(PlanError, match=r"BloomForCausalLM cannot generate with a cache: .*"):
        _ = without.program_of("decode")


def test_a_model_without_a_cache_is_refused_with_both_reasons() -> None:
    model, program = partitioned.traced("openai-gpt")
    parts = compile_program(program, Plan(tp=2), step=lambda: trace_step(model))
    with pytest.raises(
        PlanError, match=r"cannot generate with a cache: .*; and its own cache cannot be captured: .*takes no"
    ):
        _ = parts.program_of("decode")


def test_positions_counted_from_the_cache_are_refused() -> None:
    """Inkling numbers the tokens by how long its cache is: wrong for rows of different lengths."""
    program = trace_step(zoo.tiny("inkling_text")[0])
    assert re.search("reads '.*', whose values change with the number of slots", why_steps_differ(program) or "")


@pytest.mark.slow
@pytest.mark.parametrize("tp", [*(pytest.param(tp, marks=pytest.mark.slow) for tp in (1, 2)), 3])
def test_a_cache_class_of_the_models_own(tp: int) -> None:
    name = "minimax"
    model = zoo.tiny(name)[0]
    for module in model.modules():  # the zoo's noise on these buffers would let tokens see later ones
        if hasattr(module, "decay_factors"):
            module.slope_rate.copy_(module.get_slope_rate())
            decays = module.decay_factors(module.slope_rate)
            for buffer, value in zip(
                (module.query_decay, module.key_decay, module.diagonal_decay), decays, strict=True
            ):
                buffer.copy_(value)
    ids = torch.arange(3, 12)[None]
    parts = stepping.parts_of(*compile_steps(in_float64(trace_step(model)), Plan(tp=tp)))
    text = ids
    for _ in range(stepping.NEW):
        logits = reference.forward(model, lifted=True, input_ids=text)
        text = torch.cat([text, logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(parts.generate(ids, max_new_tokens=stepping.NEW, eos_token_id=[]), text)
