"""`partitioner run`: what it writes and where, chat templates, the cache's size."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from partitioner import Plan, partition
from partitioner.cli.actions import run as action
from partitioner.cli.app import app
from partitioner.cli.jobs.run import Question
from partitioner.errors import RankLost
from tests.support import bundle_forger as bundles

TEMPLATE = (
    "{% for message in messages %}{% if message['content'] == 'bad' %}{{ raise_exception('no bad words') }}{% endif %}"
    "def {{ message['role'] }}():\n    # {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}    return{% endif %}"
)
QUESTIONS = ("the number of items", "a list of strings, sorted")


def run(*arguments: str, code: int = 0) -> tuple[str, str]:
    result = CliRunner().invoke(app, ["run", *arguments, "--max-new-tokens", "6"])
    assert result.exit_code == code, result.output
    return result.stdout, result.stderr


@pytest.fixture
def chatting(embedded_folder: Path, tmp_path: Path) -> str:
    """The embedded model, with a chat template."""
    folder = shutil.copytree(embedded_folder, tmp_path / "chatting")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return str(folder)


def answer(folder: str, question: str) -> str:
    """What transformers says after a question in the template."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    text = f"def user():\n    # {question}\n    return"
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    found = model.generate(ids, max_new_tokens=6, do_sample=False)
    said = tokenizer.decode(found[0], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return str(said[len(text) :])


def test_the_prompt_and_what_follows_it_are_written_once() -> None:
    out, error = run("--prompt", "Return a list of")
    assert out == "Return a list of strings.\n\nThere\n"
    assert "6 tokens, the first after" in error


def test_a_lost_rank_is_one_line_and_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    def lose(*given: object, **options: object) -> None:
        raise RankLost("rank 1 was ended by SIGKILL")

    monkeypatch.setattr(action, "run_in_processes", lose)
    _, error = run("--prompt", "a", "--tp", "2", code=1)
    assert error == "error: rank 1 was ended by SIGKILL (--simulate shows at which node)\n"


def test_a_chat_writes_the_answer_to_what_the_template_makes_of_the_question(chatting: str) -> None:
    out, _ = run(chatting, "--chat", "--prompt", QUESTIONS[0])
    assert out == answer(chatting, QUESTIONS[0]) + "\n"


def test_several_questions_are_written_with_their_answers(chatting: str) -> None:
    out, _ = run(chatting, "--chat", "--prompt", QUESTIONS[0], "--prompt", QUESTIONS[1], "--tp", "2", "--simulate")
    assert out == "".join(f"{question}\n{answer(chatting, question)}\n\n" for question in QUESTIONS)


@pytest.mark.parametrize("more", [(), ("--tp", "2"), ("--dp", "2")])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [(("--prompt", ""), "makes no tokens of the prompt ''"), (("--prompt", "a", "--device", "no"), "got 'no'")],
)
def test_what_no_rank_can_do_is_refused_before_anything_is_started(
    wrong: tuple[str, ...], message: str, more: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*given: object, **options: object) -> None:
        raise AssertionError("ranks were started, or a model compiled")

    for name in ("launch", "launch_replicas"):
        monkeypatch.setattr(action, name, never)
    monkeypatch.setattr(Question, "ranks", never)
    assert message in run(*wrong, *more, code=2)[1]
    with pytest.raises(AssertionError):  # negative control
        CliRunner().invoke(app, ["run", "--prompt", "a", *more], catch_exceptions=False)


@pytest.mark.parametrize("more", [(), ("--tp", "2")])
def test_a_tokenizer_without_a_template_is_refused_before_anything_is_started(more: tuple[str, ...]) -> None:
    out, error = run("--chat", "--prompt", "x", *more, code=2)
    assert out == ""
    assert "has no chat template: leave --chat out, or put" in " ".join(error.split())
    assert "loaded" not in error


@pytest.mark.parametrize("more", [(), ("--tp", "2"), ("--dp", "2")])
def test_a_prompt_without_tokens_is_refused_before_anything_is_compiled(more: tuple[str, ...]) -> None:
    output, error = run("--prompt", "a", "--prompt", "", "--no-cache", *more, code=2)
    assert "makes no tokens of the prompt '': give a text" in " ".join(error.split())
    assert "partitioned in" not in output + error


def test_what_a_template_refuses_is_one_line(chatting: str) -> None:
    _, error = run(chatting, "--chat", "--prompt", "bad", code=2)
    assert "refuses 'bad': TemplateError: no bad words" in " ".join(error.split())


def test_a_bundle_is_used_where_it_lies(embedded_folder: Path, tmp_path: Path) -> None:
    bundle = str(tmp_path / "bundle")
    partition(embedded_folder, Plan(tp=2)).save(bundle, tokenizer=embedded_folder, reference=True)
    weights = ("--checkpoint", str(embedded_folder), "--simulate")
    plain, _ = run(bundle, "--prompt", "Return a list of", *weights)
    mapped, _ = run(bundle, "--prompt", "Return a list of", *weights, "--mapped", "--unchecked")
    assert plain == mapped
    assert plain.startswith("Return a list of")
    from_folder, _ = run(str(embedded_folder), "--prompt", "Return a list of", "--mapped")
    assert from_folder == plain
    _, error = run(str(embedded_folder), "--prompt", "a", "--unchecked", code=2)
    assert "--unchecked is for a bundle, which has digests" in " ".join(error.split())


def test_it_says_how_many_tokens_fit() -> None:
    _, error = run("--prompt", "Return a list of", "--cache-memory", "200 KB")
    assert "cache: 97 tokens fit in 200 KB\n" in error
    _, error = run("--prompt", "Return a list of", "--prompt", "A", "--cache-memory", "200 KB")
    assert "cache: 48 tokens in each of 2 sequences fit in 200 KB\n" in error
    _, error = run("--prompt", "Return a list of", "--cache-memory", "9 KB", code=2)
    assert "does not fit: 4 tokens fit in 9 KB. Give" in " ".join(error.split())
    _, error = run("--prompt", "x", "--cache-memory", "some", code=2)
    assert "an amount of memory is" in error


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tp", "0", "--prompt", "a"], "tp must be a whole number of ranks, at least 1; got 0"),
        (["--prompt", "\udcff a"], "is not valid text: surrogates not allowed"),
        (["--prompt", "a", "--stop", ""], "stop_strings must not be empty"),
        (["", "--prompt", "a"], "'' is not a folder: give a checkpoint folder"),
        (["/", "--prompt", "a"], "/ is a folder, but no checkpoint: it has no config.json"),
        (["x" * 300, "--prompt", "a"], "File name too long"),
        (
            ["--prompt", "a", "--no-cache", "--device", "cuda:99"],
            'error: the device is "cuda:99", and this machine has',
        ),
    ],
)
def test_wrong_questions_are_refused_in_a_line(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(app, ["run", *arguments])
    assert result.exit_code == 2
    assert said in result.output


@pytest.mark.processes
@pytest.mark.parametrize("more", [(), ("--simulate", "--tp", "2")])
def test_one_process_ends_after_its_timeout_as_several_do(more: tuple[str, ...]) -> None:
    asked = [sys.executable, "-m", "partitioner", "run", "--no-cache", "--prompt", "a", "--timeout", "0.2", *more]
    result = subprocess.run(asked, capture_output=True, text=True, timeout=120, check=False)
    assert (result.returncode, result.stdout) == (1, "")
    assert "error: the ranks did not finish within 0.2 s and were stopped" in result.stderr


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    bundles.tiny_model().save_pretrained(tmp_path)
    result = CliRunner().invoke(app, ["run", str(tmp_path), "--prompt", "a"])
    assert result.exit_code == 2
    assert "tokenizer" in result.output
    assert str(tmp_path) in result.output


@pytest.mark.parametrize(
    ("file", "content"), [("tokenizer.json", '{"model": {"type": "BPE"}}'), ("tokenizer_config.json", "[1]")]
)
def test_a_tokenizer_that_is_damaged_is_one_line(
    file: str, content: str, embedded_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(embedded_folder, tmp_path / "model")
    (tmp_path / "model" / file).write_text(content)
    _, error = run(str(tmp_path / "model"), "--prompt", "a", code=2)
    assert "finds no tokenizer in" in error


def test_a_template_that_makes_no_text_is_named(chatting: str) -> None:
    Path(chatting, "chat_template.jinja").write_text("{% if false %}{{ messages }}{% endif %}")
    _, error = run(chatting, "--chat", "--prompt", "x", code=2)
    assert "(in chat_template.jinja) makes no text of the prompt 'x'" in " ".join(error.split())


def test_the_length_for_rotary_embeddings_is_an_option_that_errors_name(embedded_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(embedded_folder, tmp_path / "long")
    fields = json.loads((folder / "config.json").read_text())
    factors = [1.0] * (fields["head_dim"] // 2)
    fields["rope_parameters"] = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": factors,
        "long_factor": [4.0 * factor for factor in factors],
        "original_max_position_embeddings": 6,
        "factor": 4.0,
    }
    (folder / "config.json").write_text(json.dumps(fields))
    _, error = run(str(folder), "--prompt", "Return a list of", code=2)
    assert "--max-length on the command line" in " ".join(error.split())
    out, error = run(str(folder), "--prompt", "Return a list of", "--max-length", "20")
    assert out.startswith("Return a list of")
    assert "is fixed for sequences of up to 20 tokens" in error


def test_a_tokenizers_own_code_is_said_not_to_be_run(chatting: str) -> None:
    path = Path(chatting, "tokenizer_config.json")
    own = {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": own}))
    _, error = run(chatting, "--prompt", "Return")
    assert "note: the tokenizer's own code (auto_map: tokenization_own.OwnTokenizer) is not run" in error


def test_what_was_left_out_of_a_checkpoint_is_said(embedded_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(embedded_folder, tmp_path / "fewer")
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, "num_hidden_layers": 1}))
    _, error = run(str(folder), "--prompt", "Return")
    assert "note: 27 tensors of the checkpoint not loaded, as LlamaForCausalLM has no place for them" in error
