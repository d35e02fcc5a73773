"""A folder that is damaged in any of its files: one line and exit code 2, or a run where the damage is none; never a
traceback, and no end of waiting.
"""

from __future__ import annotations

import functools
import json
import random
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from partitioner.cli.app import app
from partitioner.storage.example import EXAMPLE_MODEL

QUICK, ALL = 8, 300
SECONDS = 100
"""For one case."""
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
FILES = {
    "single": (
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "special_tokens_map.json", "chat_template.jinja",
    ),
    "sharded": ("config.json", "model.safetensors.index.json", "model-00001-of-00003.safetensors"),
}  # fmt: skip
VALUES: list[Any] = [None, True, -1, 0, 1.5, 2**70, float("nan"), "x", "", [], [1, "x"], {}, {"x": [None]}, "\ud800"]


def any_place(draw: random.Random, value: Any) -> tuple[Any, Any] | None:
    """An object or a list within `value`, and one of its keys."""
    found: list[tuple[Any, Any]] = []
    level = [value]
    while level and len(found) < 5000:
        each = level.pop()
        inner = (
            list(each.items()) if isinstance(each, dict) else list(enumerate(each)) if isinstance(each, list) else []
        )
        found += [(each, key) for key, _ in inner]
        level += [child for _, child in inner]
    # what stands at the top as often as all that is below
    top = [(value, key) for key in value] if isinstance(value, dict) else []
    places = top if top and draw.random() < 0.5 else found
    return draw.choice(places) if places else None


def changed(draw: random.Random, content: bytes, change: Callable[[Any, Any], None]) -> bytes:
    try:
        data = json.loads(content)
    except ValueError:
        return content[: len(content) // 2]  # a file that is no JSON
    place = any_place(draw, data)
    if place is not None:
        change(*place)
    return json.dumps(data).encode()


def another_type(draw: random.Random, content: bytes) -> bytes:
    return changed(draw, content, lambda holder, key: holder.__setitem__(key, draw.choice(VALUES)))


def key_lost(draw: random.Random, content: bytes) -> bytes:
    return changed(draw, content, lambda holder, key: holder.__delitem__(key))


def flipped(draw: random.Random, content: bytes) -> bytes:
    found = bytearray(content)
    for _ in range(draw.choice([1, 2, 8])):
        found[draw.randrange(min(len(found), 2000))] ^= 1 << draw.randrange(8)
    return bytes(found)


DAMAGE: dict[str, Callable[[random.Random, bytes], bytes]] = {
    "empty": lambda draw, content: b"",
    "a brace": lambda draw, content: b"{",
    "cut short": lambda draw, content: content[: draw.randrange(len(content))],
    "bits flipped": flipped,
    "no text": lambda draw, content: bytes(draw.randrange(128, 256) for _ in range(50)),
    "zeros": lambda draw, content: bytes(len(content)),
    "another kind of JSON": lambda draw, content: draw.choice([b"[1]", b"null", b'"x"', b"1e999", b"[[]]"]),
    "deep": lambda draw, content: draw.choice([b"[", b'{"a":']) * (200 if content[:2] == b"{%" else 200_000),
    "another type": another_type,
    "a key lost": key_lost,
    "twice": lambda draw, content: content + content,
    "a program": lambda draw, content: draw.choice([b"{{ messages[9].a.b }}", b"{% for x in", b"{{ 1 // 0 }}"]),
}
GONE = ("no file", "a folder", "a link to nothing")


def damage(path: Path, kind: str, seed: int) -> None:
    content = path.read_bytes()
    if kind not in GONE:
        path.write_bytes(DAMAGE[kind](random.Random(seed), content))
        return
    path.unlink()
    if kind == "a folder":
        path.mkdir()
    if kind == "a link to nothing":
        path.symlink_to("nothing")


@functools.cache
def whole(kind: str) -> Path:
    """A small model that is not damaged."""
    folder = Path(tempfile.mkdtemp(prefix="partitioner-damage-"), kind)
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLE_MODEL)
    tokenizer.chat_template = TEMPLATE
    example = AutoModelForCausalLM.from_pretrained(EXAMPLE_MODEL).config
    sizes = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    for name, value in {**sizes, "num_key_value_heads": 1, "head_dim": 16, "tie_word_embeddings": False}.items():
        setattr(example, name, value)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(example).save_pretrained(
        folder, max_shard_size="1GB" if kind == "single" else "100KB"
    )
    tokenizer.save_pretrained(folder)
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    return folder


@pytest.fixture(scope="module", autouse=True)
def tidy() -> Iterator[None]:
    yield
    for kind in FILES:
        shutil.rmtree(whole(kind).parent)
    whole.cache_clear()


def use(folder: Path) -> tuple[int, str]:
    """The exit code of a run, and what it says on standard error."""

    def late(*_: Any) -> None:
        raise AssertionError(f"not done after {SECONDS} s")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        result = CliRunner().invoke(app, ["run", str(folder), "--prompt", "Return", "--chat", "--max-new-tokens", "1"])
    finally:
        signal.alarm(0)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stderr


def check(kind: str, file: str, how: str, seed: int) -> bool:
    """Whether the damage is refused, as it must be where it is refused."""
    with tempfile.TemporaryDirectory(prefix="partitioner-damage-") as place:
        folder = shutil.copytree(whole(kind), Path(place, "model"))
        damage(folder / file, how, seed)
        code, said = use(folder)
    lines = [line for line in said.splitlines() if not line.startswith(("partitioned in", "note: ", "cache: "))]
    assert code in (0, 2), said
    assert "Traceback" not in said
    if code == 2:
        assert len(lines) == 1, said
        assert lines[0].startswith("error: ")
    return code == 2


CASES = st.sampled_from([(kind, file) for kind, files in FILES.items() for file in files])
HOW = st.sampled_from([*DAMAGE, *GONE])


def survey(count: int) -> list[bool]:
    refused: list[bool] = []

    @settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate,),
        database=None,
    )
    @given(CASES, HOW, st.integers(0, 2**20))
    def one(case: tuple[str, str], how: str, seed: int) -> None:
        refused.append(check(*case, how, seed))

    one()
    return refused


def test_a_folder_that_is_not_damaged_runs() -> None:
    for kind in FILES:
        code, said = use(whole(kind))
        assert code == 0, said


def test_some_damage() -> None:
    assert any(survey(QUICK))


@pytest.mark.slow
def test_much_damage() -> None:
    refused = survey(ALL)
    print(f"{len(refused)} damaged folders, {sum(refused)} refused in a line")
    assert sum(refused) > len(refused) // 2
