import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import fx
from typer.testing import CliRunner

from partitioner.cli import verify
from partitioner.cli.app import app
from partitioner.errors import CaptureError
from partitioner.storage import named_model
from partitioner.storage.named_model import load_config, load_model

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


@pytest.fixture
def damaged(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[fx.Graph], None]], None]:
    """Damages the graph of every model that `verify` compiles from now on."""
    real = verify.compiled

    def install(damage: Callable[[fx.Graph], None]) -> None:
        def broken(model, plan):
            parts = real(model, plan)
            damage(parts.program.graph)
            return parts

        monkeypatch.setattr(verify, "compiled", broken)

    return install


def test_a_difference_is_exit_code_1_and_names_the_node(small: str, damaged) -> None:
    def skip_the_last_reduction(graph: fx.Graph) -> None:
        reduction = [node for node in graph.nodes if "all_reduce" in str(node.target)][-1]
        reduction.replace_all_uses_with(reduction.args[0])

    damaged(skip_the_last_reduction)
    code, output = run("verify", small, "--simulate", "--lengths", "5", "--dtype", "bfloat16")
    assert code == 1
    assert "differs" in output
    assert "first difference (bfloat16, length 5): node 'add" in output


def test_a_rank_that_fails_is_a_difference_at_its_node(small: str, damaged) -> None:
    def resize_a_view(graph: fx.Graph) -> None:
        reshape = next(node for node in graph.nodes if "reshape" in str(node.target))
        reshape.args = (reshape.args[0], [7, 7, 7])

    damaged(resize_a_view)
    code, output = run("verify", small, "--simulate", "--lengths", "5", "--dtype", "float64")
    assert code == 1
    assert "first difference (float64, length 5): node 'reshape" in output
    assert "invalid for input of size" in output


def test_report_needs_no_data(small: str) -> None:
    code, output = run("report", small, "--tp", "2")
    assert code == 0, output
    assert "all_reduce" in output or "tp" in output


def test_report_of_generation(small: str) -> None:
    code, output = run("report", small, "--tp", "2", "--generate")
    assert code == 0, output
    assert output.index("collectives:") < output.index("remembered, split:")
    assert "cache per token: per rank 64 B" in output
    assert "remembered" not in run("report", small, "--tp", "2")[1]


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
        (["verify", "llama", "--timeout", "0"], "the timeout must be more than 0 and at most 1e+07 seconds, got 0"),
        (
            ["run", "llama", "--tp", "1", "--prompt", "a", "--timeout", "-1"],
            "the timeout must be more than 0 and at most",
        ),
        (["verify", "llama", "--timeout", "-3"], "the timeout must be more than 0 and at most 1e+07 seconds, got -3"),
        (["verify", "llama", "--seed", "-1"], "the seed must be a whole number from 0 to 4294967295, got -1"),
        (["verify", "llama", "--seed", str(10**30)], "the seed must be a whole number from 0 to 4294967295, got 1000"),
        (["verify", "gpt2", "--simulate", "--lengths", "1025"], "'input_ids' has sequence 1025, and this model takes"),
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


@pytest.mark.parametrize("command", ["report", "verify"])
@pytest.mark.parametrize("fields", [{"hidden_size": "x"}, {"num_attention_heads": 5, "hidden_size": 32}], ids=str)
def test_a_configuration_that_transformers_refuses_is_one_line(command: str, fields: dict, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "llama", **fields}))
    code, output = run(command, f"config:{path}")
    assert code == 2
    assert "error: transformers does not accept" in output
    assert len(output.strip().splitlines()) == 1


def test_a_checkpoint_without_weights(small: str, tmp_path: Path) -> None:
    load_config(small).save_pretrained(tmp_path / "empty")
    code, output = run("verify", str(tmp_path / "empty"), "--simulate")
    assert code == 2
    assert "error: transformers cannot load" in output
    assert len(output.strip().splitlines()) == 1


def test_a_type_without_a_model_names_what_to_give() -> None:
    config = load_config("llama")
    config.architectures, config.__class__ = None, type("Unheard", (type(config),), {})
    with pytest.raises(CaptureError, match=r"no model for a bare configuration .*'architectures'"):
        named_model.class_of(config)


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


def test_experts_of_sizes_that_a_grouped_product_refuses(tmp_path: Path) -> None:
    fields = {
        "model_type": "qwen2_moe", "architectures": ["Qwen2MoeForCausalLM"], "hidden_size": 48, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 40, "moe_intermediate_size": 21,
        "shared_expert_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2, "vocab_size": 61,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(fields))
    result = CliRunner().invoke(
        app,
        ["verify", f"config:{tmp_path}/config.json", "--tp", "3", "--simulate", "--lengths", "5", "--dtype", "float32"],
    )
    assert result.exit_code == 0, result.output
    assert "equal" in result.output
