"""Prompts of models that remember states, several tokens at a time: in float64, against the model's own forward.

Prompts of 1, 5, 11 and 23 tokens are one batch, so that pieces end where a prompt does; and in pieces of other sizes.
"""

from __future__ import annotations

import operator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx

from partitioner import Plan, load, partition
from partitioner.compile.generation import compile_steps
from partitioner.program.program import Program, Value
from runtime.execution.prompts import tokens_as_rows
from runtime.execution.prompts.tokens_as_rows import loop_over_tokens
from runtime.ops.state import selective_scan, state_write
from tests.support import stepping, zoo

EXACT = 1e-9
QUICK = ["mamba"]  # lfm2_moe on two ranks is in tests/runtime/generation/test_in_turns.py
TWO_CODES = ["nemotron_h", "zamba2"]
"""Their code for several tokens limits a time step that their code for single tokens does not."""
SLOW = [
    "lfm2_moe", "mamba2", "bamba", "falcon_h1", "granitemoehybrid", "qwen3_next", "jamba", "olmo_hybrid", "zamba",
    "zaya", "bailing_hybrid", "qwen3_5_text", *TWO_CODES,
]  # fmt: skip
DIVIDED_OTHERWISE = {("falcon_h1", 3), ("zaya", 3)}
"""Four heads on three ranks: by heads in the code for single tokens, within heads in that for several."""


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
@pytest.mark.parametrize("tp", [*(pytest.param(tp, marks=pytest.mark.slow) for tp in (1, 2)), 3])
def test_prompts_in_pieces_say_what_the_model_says(name: str, tp: int) -> None:
    parts = stepping.compiled_in_pieces(name, tp)
    assert not [note for note in parts.program_of("prefill").notes if "token by token" in note]
    one_code = parts.program_of("prefill") is parts.program_of("decode")
    assert one_code == (name in TWO_CODES or (name, tp) in DIVIDED_OTHERWISE)
    assert one_code == any("single tokens run by" in note for note in parts.generation_report.notes)
    assert parts.generation_report.tokens_at_a_time is None
    for step in (None, 1, 7):
        assert stepping.error(name, parts, prefill_step=step) < EXACT


AS_ROWS = ["minimax", "recurrent_gemma", "rwkv"]
"""Whose code for several tokens loops over them: they run by that for single ones, as rows of its batch."""


@pytest.mark.parametrize("name", ["xlstm", *(pytest.param(name, marks=pytest.mark.slow) for name in AS_ROWS)])
@pytest.mark.parametrize("tp", [*(pytest.param(tp, marks=pytest.mark.slow) for tp in (1, 2)), 3])
def test_prompts_as_rows_say_what_the_model_says(name: str, tp: int) -> None:
    exact = 1e-8 if name == "minimax" else EXACT  # its own code for whole texts differs by so much
    programs = compile_steps(stepping.traced(name)[1], Plan(tp=tp))
    assert [program.tokens_as_rows for program in programs] == [True, False]
    parts = stepping.parts_of(*programs)
    assert parts.generation_report.tokens_at_a_time is None
    assert not parts.generation_report.notes
    assert stepping.error(name, parts) < exact
    for step in (1, 7):
        assert stepping.error(name, parts, prefill_step=step) < exact


def test_rows_that_forget_the_token_before_say_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each token of a loop begins at what was there before the first one."""
    programs = compile_steps(stepping.traced("xlstm")[1], Plan())

    def forgetful(body: Any, states: int) -> Any:
        own = loop_over_tokens(body, states)
        return lambda ids, before, *rest: (*before, *own(ids, before, *rest)[states:])

    monkeypatch.setattr(tokens_as_rows, "loop_over_tokens", forgetful)
    with pytest.raises(AssertionError):
        stepping.error("xlstm", stepping.parts_of(*programs))


def test_a_code_whose_rows_meet_runs_token_by_token_and_says_why() -> None:
    step = stepping.traced("xlstm")[1].copy()
    write = next(node for node in step.graph.nodes if node.target is state_write)
    with step.graph.inserting_before(write):
        mean = step.graph.call_function(torch.ops.aten.mean.dim, (write.args[0], [0], True))
        mean.meta = {**write.meta, "val": Value((1, *write.meta["val"].shape[1:]), torch.float64)}
        other = step.graph.call_function(torch.ops.aten.sub.Tensor, (write.args[0], mean))
        other.meta = dict(write.meta)
    write.args = (other, *write.args[1:])
    prefill, decode = compile_steps(step, Plan())
    assert prefill is decode
    assert "as rows of a batch: mean" in prefill.notes[0]
    report = stepping.parts_of(prefill, decode).generation_report
    assert report.tokens_at_a_time == 1
    assert "prompts run token by token" in str(report)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["recurrent_gemma", "rwkv", "xlstm"])
def test_whole_texts_run_by_the_code_for_single_tokens_and_from_bundles(name: str, tmp_path: Path) -> None:
    model, ids = zoo.tiny(name)
    parts = partition(model, Plan(tp=2))
    assert any(note.startswith("whole texts run by") for note in parts.program.notes)
    for length in (1, 5, 40):
        with torch.no_grad():
            said = torch.cat([model(input_ids=row[None, :length]).logits for row in ids])
        assert torch.allclose(parts.simulate(input_ids=ids[:, :length]), said, rtol=1e-4, atol=1e-5)
    parts.save(tmp_path / "bundle")
    bundle = load(tmp_path / "bundle")
    prompts: list[list[int]] = [[5], ids[0, :7].tolist(), ids[1, :12].tolist()]
    options: dict[str, Any] = {"max_new_tokens": 5, "eos_token_id": []}
    found = bundle.generate(prompts, **options).tolist()
    assert found == parts.generate(prompts, **options).tolist()
    for row, prompt in zip(found, prompts, strict=True):
        wanted = model.generate(torch.tensor([prompt]), max_new_tokens=5, do_sample=False, eos_token_id=-1)
        assert row[-5:] == wanted[0, -5:].tolist()


def broken() -> Program:
    """A trace of pieces whose scans begin at nothing, whatever is remembered: right for a prompt in one piece."""
    program = stepping.pieces("mamba").copy()
    for node in program.graph.nodes:
        if node.target is selective_scan:
            node.args = (*node.args[:-1], None)
    return program


def test_what_is_not_proven_gives_way_to_rows_of_a_batch_and_says_why() -> None:
    prefill, decode = compile_steps(stepping.traced("mamba")[1], Plan(tp=2), piece=broken)
    assert prefill.tokens_as_rows
    assert not decode.tokens_as_rows
    parts = stepping.parts_of(prefill, decode)
    (note,) = parts.generation_report.notes
    assert note.startswith("prompts run by the model's code for single tokens, which are rows of a batch: ")
    assert "at once than for single ones" in note
    assert f"note: {note}" in str(parts.generation_report)
    assert stepping.error("mamba", parts) < EXACT


def another_step() -> Program:
    """The trace of single tokens, each of whose states is a little larger."""
    step = stepping.traced("mamba")[1].copy()
    for node in list(step.graph.nodes):
        if node.target is state_write:
            with step.graph.inserting_before(node):
                other = step.graph.call_function(torch.ops.aten.mul.Tensor, (node.args[0], 1.001))
            other.meta = dict(node.args[0].meta)
            node.args = (other, *node.args[1:])
    return step


def test_a_code_for_single_tokens_that_is_another_gives_way_to_that_for_several() -> None:
    """Where the latter is one recurrence, however a text is cut, and says what the whole text says."""
    pieces, whole = (lambda: stepping.pieces("mamba")), (lambda: stepping.whole("mamba"))
    parts = stepping.parts_of(*compile_steps(another_step(), Plan(tp=2), piece=pieces, whole=whole))
    assert parts.program_of("prefill") is parts.program_of("decode")
    (note,) = parts.generation_report.notes
    assert note.startswith("single tokens run by the model's code for several, as prompts and whole texts do")
    assert stepping.error("mamba", parts) < EXACT


@pytest.mark.parametrize(
    ("piece", "whole"),
    [
        (broken, lambda: stepping.whole("mamba")),
        pytest.param(lambda: stepping.pieces("mamba"), lambda: None, marks=pytest.mark.slow),
    ],
    ids=["pieces that forget", "no whole text"],
)
def test_it_does_not_give_way_to_what_is_not_proven(piece: Any, whole: Any) -> None:
    prefill, _ = compile_steps(another_step(), Plan(tp=2), piece=piece, whole=whole)
    assert prefill.tokens_as_rows


def test_pieces_that_do_not_say_what_the_whole_text_says_are_refused() -> None:
    """Whole in themselves, but another model: each layer's result is a little larger."""
    step, whole = stepping.traced("mamba")[1], stepping.whole("mamba")
    other = stepping.pieces("mamba").copy()
    for node in list(other.graph.nodes):
        if node.target is operator.getitem and node.args[1] == 0 and node.args[0].target is selective_scan:
            with other.graph.inserting_after(node):
                larger = other.graph.call_function(torch.ops.aten.mul.Tensor, (node, 1.001))
            larger.meta = dict(node.meta)
            node.replace_all_uses_with(larger, delete_user_cb=lambda user, made=larger: user is not made)
    prefill, _ = compile_steps(step, Plan(tp=2), piece=lambda: other, whole=lambda: whole)
    assert prefill.tokens_as_rows


@pytest.mark.slow
def test_a_bundle_has_both_entries(tmp_path: Path) -> None:
    model = zoo.tiny("mamba")[0].float()
    parts = partition(model, Plan(tp=2))
    parts.save(tmp_path / "bundle")
    bundle = load(tmp_path / "bundle")
    targets = [
        {node.target for node in bundle.entry(entry, 1).graph.nodes if isinstance(node, fx.Node)}
        for entry in ("prefill", "decode")
    ]
    assert selective_scan in targets[0]
    assert selective_scan not in targets[1]
    options = {"max_new_tokens": 3, "eos_token_id": []}
    prompts = stepping.prompts("mamba")
    assert bundle.generate(prompts, **options).tolist() == parts.generate(prompts, **options).tolist()
