"""The commands and the code of docs/bundles.md, as typed."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOC = (ROOT / "docs" / "bundles.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", DOC, re.MULTILINE | re.DOTALL)


def run(*arguments: str, cwd: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-P", *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_commands(tmp_path: Path) -> None:
    (commands,) = [text for language, text in BLOCKS if not language]
    said = ""
    for command in commands.splitlines():
        program, *arguments = shlex.split(command)
        assert program == ".venv/bin/partitioner"
        said += run("-m", "partitioner", *arguments, cwd=tmp_path)
    assert "all files are as they were written" in said
    assert "all_reduce" in said


def test_the_code(tmp_path: Path) -> None:
    (code,) = [text for language, text in BLOCKS if language == "python"]
    assert "self" in run("-c", code, cwd=tmp_path)
    listed = {match.replace("DIGEST", "*").replace("N", "*") for match in re.findall(r"^\| `([^`]+)` \|", DOC, re.M)}
    found = [path for path in (tmp_path / "saved").rglob("*") if path.is_file()]
    for path in found:
        name = path.relative_to(tmp_path / "saved")
        assert any(name.match(pattern) or f"{name.parts[0]}/" == pattern for pattern in listed), name
