"""What a document shows to be typed: its commands and its code, and a process to run them in."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from tests.support.processes import forked

__all__ = ["code", "commands", "run", "run_code", "text_of"]

ROOT = Path(__file__).resolve().parents[3]
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def text_of(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def commands(name: str) -> list[str]:
    """Those of docs/`name`, a line each."""
    return [
        line for language, text in _BLOCK.findall(text_of(name)) if not language for line in text.strip().splitlines()
    ]


def code(name: str) -> list[str]:
    """Its blocks of Python, of which the later ones go on where the earlier ones end."""
    return [text for language, text in _BLOCK.findall(text_of(name)) if language == "python"]


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """`python ARGUMENTS` to its end."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return forked.run(arguments, cwd=cwd, env=environment)


def run_code(text: str, *, cwd: Path) -> subprocess.CompletedProcess[str]:
    """`text` as a program, in a copy of this process."""
    with forked.forking():
        return forked.run(["-c", text], cwd=cwd)
