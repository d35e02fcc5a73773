import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from partitioner import verify
from partitioner.cli import app
from partitioner.errors import CaptureError
from partitioner.named_model import load_config, load_model

# model types stand in tests only: the package knows none
SMALL = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 67,
}


@pytest.fixture
def small(tmp_path: Path) -> str:
    path = tmp_path / "small.json"
    path.write_text(json.dumps(SMALL))
    return f"config:{path}"


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def test_verify_in_one_process(small: str) -> None:
    code, output = run("verify", small, "--tp", "2", "--simulate", "--lengths", "1,5")
    assert code == 0, output
    assert output.count("equal") == 4
    assert "differs" not in output


@pytest.mark.processes
def test_verify_over_processes(small: str, monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config) -> None:
    monkeypatch.setenv("PYTHONPATH", str(pytestconfig.rootpath))
    code, output = run("verify", small, "--tp", "2", "--lengths", "5", "--dtype", "float64", "--timeout", "120")
    assert code == 0, output
    assert output.count("equal") == 1


def test_a_difference_is_exit_code_1_and_names_the_node(small: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = verify.compiled

    def broken(model, plan):
        parts = real(model, plan)
        reduction = [node for node in parts.program.graph.nodes if "all_reduce" in str(node.target)][-1]
        reduction.replace_all_uses_with(reduction.args[0])
        return parts

    monkeypatch.setattr(verify, "compiled", broken)
    code, output = run("verify", small, "--simulate", "--lengths", "5", "--dtype", "float64")
    assert code == 1
    assert "differs" in output
    assert "first difference (float64, length 5): node 'add" in output


def test_a_rank_that_fails_is_a_difference_at_its_node(small: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = verify.compiled

    def broken(model, plan):
        parts = real(model, plan)
        reshape = next(node for node in parts.program.graph.nodes if "reshape" in str(node.target))
        reshape.args = (reshape.args[0], [7, 7, 7])
        return parts

    monkeypatch.setattr(verify, "compiled", broken)
    code, output = run("verify", small, "--simulate", "--lengths", "5", "--dtype", "float64")
    assert code == 1
    assert "first difference (float64, length 5): node 'reshape" in output
    assert "invalid for input of size" in output


def test_report_needs_no_data(small: str) -> None:
    code, output = run("report", small, "--tp", "2")
    assert code == 0, output
    assert "all_reduce" in output or "tp" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["verify", "lama"], "'lama' is neither a checkpoint folder, nor config:FILE.json, nor a model type"),
        (["verify", "lama"], "near: llama"),
        (["verify", "config:/nowhere.json"], "cannot read the configuration /nowhere.json"),
        (["verify", "/"], "is a folder, but no checkpoint"),
        (["verify", "llama", "--tp", "0"], "tp must be a whole number of ranks, at least 1; got 0"),
        (["verify", "llama", "--lengths", "1,x"], "--lengths must be whole numbers of at least 1"),
        (["verify", "llama", "--dtype", "int8"], "unknown dtype 'int8'; the dtypes are float64"),
        (["report", "lama"], "near: llama"),
    ],
)
def test_a_wrong_question_is_one_line_and_exit_code_2(arguments: list[str], message: str) -> None:
    code, output = run(*arguments)
    assert code == 2
    assert message in output
    assert len(output.strip().splitlines()) == 1


def test_a_configuration_must_name_its_type(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"model_type": "unheard_of"}')
    with pytest.raises(CaptureError, match="must name a model_type that transformers knows, got 'unheard_of'"):
        load_config(f"config:{path}")


def test_weights_are_those_of_the_seed(small: str) -> None:
    first, again, other = (load_model(small, dtype=torch.float64, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.lm_head.weight, again.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    assert load_model("llama", dtype=torch.float32, meta=True).lm_head.weight.is_meta
    assert load_model("llama", dtype=torch.float32).lm_head.weight.numel() < 1e6


def test_a_checkpoint_folder(small: str, tmp_path: Path) -> None:
    saved = load_model(small, dtype=torch.float32)
    saved.save_pretrained(tmp_path / "checkpoint")
    loaded = load_model(str(tmp_path / "checkpoint"), dtype=torch.float64)
    assert type(loaded) is type(saved)
    assert torch.equal(loaded.lm_head.weight, saved.lm_head.weight.double())
