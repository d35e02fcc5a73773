"""The commands and the code of docs/bundles.md, as typed."""

import re
import shlex
from pathlib import Path

import pytest

from tests.support.processes import typed

DOC = "bundles.md"


def run(*arguments: str, cwd: Path) -> str:
    done = typed.run(*arguments, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_the_commands(tmp_path: Path) -> None:
    said = ""
    for command in typed.commands(DOC):
        program, *arguments = shlex.split(command)
        assert program == ".venv/bin/partitioner"
        said += run("-m", "partitioner", *arguments, cwd=tmp_path)
    assert "all files are as they were written" in said
    assert "all_reduce" in said


def test_the_code(tmp_path: Path) -> None:
    (code,) = typed.code(DOC)
    done = typed.run_code(code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "self" in done.stdout
    text = typed.text_of(DOC)
    listed = {match.replace("DIGEST", "*").replace("N", "*") for match in re.findall(r"^\| `([^`]+)` \|", text, re.M)}
    found = [path for path in (tmp_path / "saved").rglob("*") if path.is_file()]
    for path in found:
        name = path.relative_to(tmp_path / "saved")
        assert any(name.match(pattern) or f"{name.parts[0]}/" == pattern for pattern in listed), name
