"""`partitioner balance`: a text is run, its experts counted, and a plan comes out that the compiler takes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from partitioner import Plan, partition
from partitioner.cli.actions.balance import balanced, tokens_of
from partitioner.cli.app import app
from partitioner.cli.jobs.balance import TextCase
from partitioner.cli.jobs.compile import Compile
from partitioner.program.balance import imbalance
from runtime.communication.thread_communicator import ThreadGroup
from tests.support import zoo

TEXT = "def add(items):\n    return [item + 1 for item in items]\n\n" * 4
SIZES = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 14, "vocab_size": 1021}


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["balance", *arguments], env={"COLUMNS": "200"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def mixture(embedded_folder: Path, tmp_path: Path) -> str:
    """A mixture of experts, with the tokenizer of the model inside."""
    folder = shutil.copytree(embedded_folder, tmp_path / "mixture")
    model, _ = zoo.tiny("qwen3_moe", num_hidden_layers=2, **SIZES)
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
def test_a_text_is_counted_over_processes_and_the_plan_is_more_even(mixture: str, tmp_path: Path) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "plan.txt"
    text.write_text(TEXT)
    code, plan, said = run(
        mixture, "--text", str(text), "--ep", "2", "--extra", "2", "--length", "40", "-o", str(out), "--timeout", "200"
    )
    assert code == 0, said
    assert out.read_text() == plan

    chosen = Plan.parse(plan.strip())
    owners = dict(dict(chosen.passes)["expert-parallel"])["owners"]
    assert sum(map(len, owners)) == 8
    # what one rank counts, with all of the experts
    counts = counted(mixture)
    found, line = balanced(Plan(ep=2), counts, extra=2)
    assert str(found) == plan.strip()
    assert line in said
    assert max(imbalance(layer, owners) for layer in counts.values()) < max(
        imbalance(layer, [[0, 1, 2], [3, 4, 5]]) for layer in counts.values()
    )
    ids = torch.tensor([tokens_of(mixture, text.read_text())[:30]])
    found_logits, whole = (partition(mixture, each).simulate(input_ids=ids) for each in (chosen, Plan()))
    assert torch.allclose(found_logits, whole, atol=1e-4)


def counted(folder: str) -> dict[str, list[int]]:
    """By one rank, which has all experts."""
    parts = partition(folder, Plan())
    path = Path(folder).parent / "text.txt"
    case = TextCase(folder, tokens=tokens_of(folder, path.read_text()), length=40, compile=Compile(ep=2))
    with parts.engine(0, ThreadGroup(parts.mesh).communicator(0)) as engine, engine.routing() as routing:
        for piece in case.pieces:
            engine(input_ids=torch.tensor([piece]))
    return {key: value.tolist() for key, value in routing.counts.items()}


def test_every_rank_has_something_to_do() -> None:
    plan, _ = balanced(Plan(ep=4), {"layer": [1, 1, 9]}, extra=0)
    owners = dict(dict(plan.passes)["expert-parallel"])["owners"]
    assert len(owners) == 4
    assert all(owners)


def test_a_plan_that_is_even_stays_as_it_is() -> None:
    plan, said = balanced(Plan(ep=2), {"layer": [5, 5, 5, 5]}, extra=0)
    assert plan == Plan(ep=2)
    assert said.endswith("no gain, the plan is as it was")


def test_the_plan_keeps_its_other_options_and_the_gain_is_that_of_layers() -> None:
    counts = {"a": [90, 10, 10, 10], "b": [50, 30, 10, 10]}
    plan, said = balanced(
        Plan.parse("tp=2,ep=2,probe,expert-parallel.exchange=gather,expert-parallel.owners=[[0,1],[2,3]]"),
        counts,
        extra=1,
    )
    assert str(plan) == "tp=2,ep=2,probe,expert-parallel.exchange=gather,expert-parallel.owners=[[0,1,2],[0,3]]"
    # of a: 100 of 60 before, 65 after, with half of expert 0; of b: 80 of 50, then 65
    assert "2 layers of 4 experts on 2 ranks" in said
    assert "1.633 before (at most 1.667), 1.192 after (at most 1.300)" in said


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["lama", "--text", "x", "--ep", "2"], "'lama' is not a folder: give a checkpoint folder"),
        (["{folder}", "--text", "/nowhere.txt", "--ep", "2"], "cannot read the text /nowhere.txt"),
        (["{folder}", "--text", "{empty}", "--ep", "2"], "there are no tokens in the text"),
        (["{folder}", "--text", "{text}"], "give --ep, at least 2"),
        (["{folder}", "--text", "{text}", "--ep", "2", "--length", "0"], "--length must be at least 1, got 0"),
        (["{folder}", "--text", "{text}", "--ep", "2", "-o", "/nowhere/plan"], "give a file in a folder that exists"),
        (["{folder}", "--text", "{text}", "--ep", "2", "--extra", "-1"], "--extra must be at least 0, got -1"),
        (["{folder}", "--text", "{text}", "--plan", "ep=2,expert-parallel.capacity=1.0"], "measure without it"),
    ],
)
def test_what_is_asked_wrongly_is_one_line(
    embedded_folder: Path, tmp_path: Path, arguments: list[str], problem: str
) -> None:
    (tmp_path / "text").write_text(TEXT)
    (tmp_path / "empty").write_text("")
    known = {"folder": embedded_folder, "text": tmp_path / "text", "empty": tmp_path / "empty"}
    code, _, said = run(*(each.format(**known) for each in arguments))
    assert code == 2
    assert problem in said
    assert said.count("\n") == 1


@pytest.mark.slow
def test_a_model_without_experts_is_refused(embedded_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text(TEXT)
    code, _, said = run(str(embedded_folder), "--text", str(tmp_path / "text"), "--ep", "2", "--timeout", "200")
    assert code != 0
    assert "ep=2 divides routed experts, and LlamaForCausalLM has none" in said
