"""What `partitioner serve` and `bench` refuse before anything is started, in one line and with exit code 2."""

import ast
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import partitioner
from partitioner.cli.actions import serve
from partitioner.cli.app import app
from partitioner.errors import InputError
from partitioner.serving import open_service
from partitioner.serving.http.keys import API_KEY
from partitioner.serving.http.server import bound
from partitioner.serving.open_service import read_tokenizer
from partitioner.storage.example import EXAMPLE_MODEL
from runtime.launching.status import ReplicaStatus, ServingStatus


def said(*arguments: str) -> str:
    done = CliRunner().invoke(app, list(arguments))
    assert done.exit_code == 2, done.output
    return done.output


def test_what_cannot_be_served_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "is not a folder" in said("serve", str(tmp_path / "none"))
    assert "cannot be read" in said("serve", "--api-key-file", str(tmp_path / "none"))
    assert "chat template" in said("serve", "--chat-template", str(tmp_path / "none"))
    (tmp_path / "broken.jinja").write_text("{% for message in messages %}{{ message.content ")
    broken = " ".join(said("serve", "--chat-template", str(tmp_path / "broken.jinja")).split())
    assert "broken.jinja' is none of jinja: TemplateSyntaxError: " in broken
    with bound("127.0.0.1", 0) as taken:
        assert "cannot listen on 127.0.0.1" in said("serve", "--port", str(taken.getsockname()[1]))
    for port in ("-1", "65536"):
        assert "the port must be from 0 to 65535" in said("serve", "--port", port)
    assert "cannot listen on a..b" in said("serve", "--port", "0", "--host", "a..b")
    assert "--max-context must be at least 2" in said("serve", "--max-context", "0")
    for grace in ("-1", "nan"):
        assert "--grace must be a number of seconds" in said("serve", "--grace", grace)
    monkeypatch.setattr(serve, "launch", None)
    for option, wrong in (("--request-timeout", "nan"), ("--max-requests", "0"), ("--max-body", "-1")):
        assert " must be " in said("serve", option, wrong)
    monkeypatch.setenv(API_KEY, "short")
    assert "at least 8" in said("serve")


def test_a_template_that_takes_no_message_is_noted(tmp_path: Path) -> None:
    """It may be for others; and completions need none."""
    for text, noted in (("{{ raise_exception('no users') }}", True), ("{{ messages[0].content }}", False)):
        (tmp_path / "template.jinja").write_text(text)
        tokenizer, notes = read_tokenizer(str(EXAMPLE_MODEL), str(tmp_path / "template.jinja"))
        assert tokenizer.chat_template == text
        assert (
            notes
            == [
                "the chat template refuses a message of a user, and so will /v1/chat/completions: "
                "TemplateError: no users"
            ]
            * noted
        )


def test_texts_are_as_long_as_the_smallest_cache_has_room_for() -> None:
    class Told:
        def status(self) -> ServingStatus:
            return ServingStatus((ReplicaStatus(longest_that_fits=161), ReplicaStatus(longest_that_fits=None)))

    llm: Any = Told()
    assert open_service._that_fits(512, llm, is_asked=False) == 161
    assert open_service._that_fits(100, llm, is_asked=True) == 100
    with pytest.raises(InputError, match="--max-context 162 does not fit: the cache of a rank has room for 161 tokens"):
        open_service._that_fits(162, llm, is_asked=True)


def test_what_cannot_be_measured_is_said(tmp_path: Path) -> None:
    assert "No such command 'decode'" in said("bench", "decode")
    assert "either a rate" in said("bench", "serve", "--rate", "1", "--clients", "2")
    with bound("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    assert "no model is listed" in said("bench", "serve", "--url", f"http://127.0.0.1:{port}/v1")


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("partitioner.serving.http")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert "pip install 'partitioner[serve]'" in said("serve")


def test_the_extra_is_imported_by_the_rooms_that_need_it_alone() -> None:
    """So `import partitioner`, and every other command, works without it."""
    root = Path(partitioner.__file__).parent
    rooms = [root / "serving" / name for name in ("http", "openai", "load", "tools", "open_service.py")]
    extra = ("fastapi", "starlette", "uvicorn", "pydantic", "prometheus_client", "httpx2", "openai")
    ours = tuple(f"partitioner.serving.{name}" for name in ("http", "openai", "load.ask", "tools", "open_service"))
    found = []
    for path in root.rglob("*.py"):
        if any(room in (path, *path.parents) for room in rooms):
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found += [f"{path}: {name}" for name in names if name.partition(".")[0] in extra or name.startswith(ours)]
    assert not found
    assert len(list(rooms[0].glob("*.py"))) > 5, "negative control"
