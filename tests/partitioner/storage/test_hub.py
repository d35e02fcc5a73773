"""Names of repositories, against a stand-in for the hub that runs here."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from partitioner.errors import InputError
from partitioner.storage.example import EXAMPLE_MODEL
from partitioner.storage.hub import fetched, may_be_repository

COMMITS = {"main": "a" * 40, "old": "b" * 40}
FILES = {
    "config.json": (EXAMPLE_MODEL / "config.json").read_bytes(),
    "tokenizer_config.json": b"{}",
    "modeling_own.py": b"raise SystemExit('this must not be here')",
    "pytorch_model.bin": b"a pickle",
}


class Hub(BaseHTTPRequestHandler):
    asked: list[tuple[str, str | None]] = []  # noqa: RUF012 - of all requests

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, *, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        self.asked.append((path, self.headers.get("Authorization")))
        parts = path.strip("/").split("/")
        status, body, headers = 404, b"{}", {"X-Error-Code": "RepoNotFound"}
        if parts[:4] == ["api", "models", "org", "tiny"] and parts[4:5] == ["revision"] and parts[5] in COMMITS:
            siblings = [{"rfilename": name} for name in FILES]
            body = json.dumps({"id": "org/tiny", "sha": COMMITS[parts[5]], "siblings": siblings}).encode()
            status, headers = 200, {"Content-Type": "application/json"}
        elif parts[:4] == ["api", "models", "org", "tiny"] and parts[4:5] == ["tree"]:
            tree = [{"type": "file", "path": name, "size": len(text), "oid": name} for name, text in FILES.items()]
            status, body, headers = 200, json.dumps(tree).encode(), {"Content-Type": "application/json"}
        elif parts[:3] == ["org", "tiny", "resolve"] and parts[3] in COMMITS.values() and parts[4] in FILES:
            body = FILES[parts[4]]
            status, headers = 200, {"X-Repo-Commit": parts[3], "ETag": f'"{parts[4]}"'}
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *given: Any) -> None:
        """Nothing."""


@pytest.fixture
def endpoint() -> Iterator[str]:
    Hub.asked = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def fetch(endpoint: str, home: Path, root: Path, call: str, **environment: str) -> tuple[str, str]:
    """In a process of its own: huggingface_hub reads its settings once."""
    known = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", f"from partitioner.storage.hub import fetched; print(fetched({call}))"],
        env={**os.environ, "PYTHONPATH": str(root), **known, **environment},
        capture_output=True,
        text=True,
    )
    return done.stdout.strip(), done.stderr


def test_a_name_becomes_a_folder_without_code(endpoint: str, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    root = pytestconfig.rootpath
    said, errors = fetch(endpoint, tmp_path, root, "'org/tiny'", HF_TOKEN="hf_secret")
    folder = Path(said)
    assert folder.name == COMMITS["main"], errors
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "tokenizer_config.json"]
    assert (folder / "config.json").read_bytes() == FILES["config.json"]
    assert ("/api/models/org/tiny/revision/main", "Bearer hf_secret") in Hub.asked
    # from the cache, with nobody to ask
    assert fetch(endpoint, tmp_path, root, "'org/tiny'", HF_HUB_OFFLINE="1")[0] == said


def test_a_revision_is_honoured(endpoint: str, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    said, errors = fetch(endpoint, tmp_path, pytestconfig.rootpath, "'org/tiny', revision='old'")
    assert Path(said).name == COMMITS["old"], errors


def test_what_the_hub_does_not_have_is_told(endpoint: str, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    _, errors = fetch(endpoint, tmp_path, pytestconfig.rootpath, "'org/other'")
    assert f"InputError: 'org/other' is no folder here, and cannot be had from {endpoint}" in errors.splitlines()[-1]


@pytest.mark.parametrize(
    ("name", "may"),
    [("org/tiny", True), ("./tiny", False), ("a/b/c", False), ("llama", False), ("config:a/b.json", False)],
)
def test_what_may_be_a_name(name: str, may: bool) -> None:
    assert may_be_repository(name) == may


def test_a_folder_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert fetched("org/tiny") == "org/tiny"
    with pytest.raises(InputError, match="--revision is for a repository"):
        fetched("org/tiny", revision="old")
