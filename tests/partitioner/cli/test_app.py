import errno
import functools
import json
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import try_to_load_from_cache
from torch import fx
from typer.main import get_command
from typer.testing import CliRunner

from partitioner.cli.actions import report, verify
from partitioner.cli.app import app
from partitioner.cli.jobs.compile import Compile
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


def test_verify_has_nothing_to_compare_stored_weights_with(small: str) -> None:
    code, output = run("verify", small, "--plan", "tp=2,weights=stored", "--simulate")
    assert code == 2
    assert "compares with transformers' own model" in output


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
    code, output = run("verify", small, "--tp", "2", "--simulate", "--lengths", "5", "--dtype", "bfloat16")
    assert code == 1
    assert "differs" in output
    assert "first difference (bfloat16, length 5): node 'add" in output


def test_a_rank_that_fails_is_a_difference_at_its_node(small: str, damaged) -> None:
    def resize_a_view(graph: fx.Graph) -> None:
        reshape = next(node for node in graph.nodes if "reshape" in str(node.target))
        reshape.args = (reshape.args[0], [7, 7, 7])

    damaged(resize_a_view)
    code, output = run("verify", small, "--tp", "2", "--simulate", "--lengths", "5", "--dtype", "float64")
    assert code == 1
    assert "first difference (float64, length 5): node 'reshape" in output
    assert "invalid for input of size" in output


def test_report_needs_no_data(small: str) -> None:
    code, output = run("report", small, "--tp", "2")
    assert code == 0, output
    assert "q_proj.weight" in output
    assert "tp over dim 0" in output
    assert "all_reduce: " in output


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
        (["report", "someone/some-model"], "models--someone--some-model/snapshots (hf download someone/some-model"),
        (["verify", "someone/some-model"], "it may be the name of a repository on a hub: nothing is fetched"),
        (["export", "someone/some-model", "-o", "/nowhere/x"], "models--someone--some-model/snapshots"),
        (["run", "someone/some-model", "--prompt", "a"], "models--someone--some-model/snapshots"),
        (["report", "llama", "--dtype", "int8"], "unknown dtype 'int8'"),
        (["report", "llama", "--keep-whole", "nothing"], "keep_whole='nothing' matches no weight"),
        (["verify", "llama", "--pass", "nothing"], "no pass named 'nothing' is installed"),
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


@pytest.mark.parametrize("out", ["/dev/full", "/proc/page.html"])
def test_a_page_that_cannot_be_written_is_one_line_and_exit_code_2(out: str, small: str) -> None:
    code, output = run("report", small, "--tp", "2", "--html", out)
    assert code == 2
    assert output.startswith(f"error: cannot write the page {out}: ")
    assert output.count("\n") == 1


@pytest.mark.parametrize("command", [["export", "-o"], ["report", "--html"]])
def test_a_place_that_is_taken_is_told_before_anything_is_compiled(
    command: list[str], monkeypatch: pytest.MonkeyPatch, small: str, tmp_path: Path
) -> None:
    def compiled(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr(Compile, "compile", compiled)
    name, option = command
    code, output = run(name, small, option, str(tmp_path))
    assert code == 2
    assert {"export": "exists and is not an empty folder", "report": "give a file in a folder that exists"}[
        name
    ] in output


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "error: No space left on device\n"),
        (PermissionError(errno.EACCES, "Permission denied", "/a/file"), "error: /a/file: Permission denied\n"),
        (OSError("no number says what this is"), None),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), None),
    ],
)
def test_what_the_system_says_is_one_line_and_exit_code_2(
    error: OSError, said: str | None, monkeypatch: pytest.MonkeyPatch, small: str
) -> None:
    """But for a fault of ours, which needs its trace, and whoever reads what is printed and has gone."""

    def failing(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(report, "write_page", failing)
    result = CliRunner().invoke(app, ["report", small, "--html", "page.html"])
    if said is None:
        assert result.exception is error or result.exit_code == 1
    else:
        assert (result.exit_code, result.output) == (2, said)


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


def test_a_snapshot_of_a_hub_that_is_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "models--someone--some-model" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("abc")
    monkeypatch.setattr(
        huggingface_hub, "try_to_load_from_cache", functools.partial(try_to_load_from_cache, cache_dir=str(tmp_path))
    )
    assert f"whose snapshot is in {snapshot}: give that folder" in run("report", "someone/some-model")[1]


SHARED = {"--tp", "--keep-whole", "--pass", "--max-length"}


def test_commands_that_compile_share_their_options() -> None:
    """Under one name, with one default and one help text."""
    commands = {command.name: command for command in get_command(app).commands.values()}  # type: ignore[attr-defined]
    options = {
        name: {option.opts[0]: (option.default, option.help) for option in commands[name].params if option.opts}
        for name in ("verify", "report", "run", "export")
    }
    for option in SHARED:
        assert len({str(found[option]) for found in options.values()}) == 1, option
    assert len({str(found["--dtype"]) for name, found in options.items() if name != "verify"}) == 1


@pytest.mark.parametrize("option", ["--keep-whole", "--max-length", "--tp"])
def test_what_is_shared_has_an_effect_in_report(option: str, small: str) -> None:
    given = {"--keep-whole": "*.up_proj.weight", "--max-length": "50", "--tp": "2"}
    plain, other = run("report", small), run("report", small, option, given[option])
    assert plain[0] == other[0] == 0
    assert (plain[1] == other[1]) == (option == "--max-length")  # this model has no length to fix


def test_a_bundle_that_runs_as_it_is_takes_no_plan(small: str, tmp_path: Path) -> None:
    bundle = str(tmp_path / "bundle")
    assert run("export", small, "--tp", "2", "-o", bundle)[0] == 0
    for option, value in (("--keep-whole", "*"), ("--max-length", "9"), ("--pass", "fuse")):
        code, output = run("run", bundle, "--prompt", "a", option, value)
        assert code == 2
        assert f"leave {option} out, or reshard it by partitioner export" in output or "no tokenizer" in output
    code, output = run("report", bundle)
    assert code == 0
    assert "Plan(tp=2)" in output


def test_code_of_its_own_is_said_not_to_be_run(small: str, tmp_path: Path) -> None:
    folder = tmp_path / "own"
    load_model(small, dtype=torch.float32).save_pretrained(folder)
    fields = json.loads((folder / "config.json").read_text())
    own = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    (folder / "config.json").write_text(json.dumps({**fields, "auto_map": own}))
    said = "note: its own code (auto_map: configuration_own.OwnConfig, modeling_own.OwnForCausalLM) is not run"
    assert f"{said}: the model is LlamaForCausalLM of transformers" in run("report", str(folder))[1]
    (folder / "config.json").write_text(json.dumps({**fields, "architectures": ["OwnForCausalLM"]}))
    assert "no 'OwnForCausalLM', which 'architectures' names: LlamaForCausalLM is used" in run("report", str(folder))[1]
    (folder / "config.json").write_text(json.dumps({**fields, "model_type": "own", "auto_map": own}))
    code, output = run("report", str(folder))
    assert code == 2
    assert "got 'own'; its own code (auto_map: configuration_own.OwnConfig" in output
