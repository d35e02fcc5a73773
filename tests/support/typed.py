"""What a document shows to be typed: its commands and its code, and a process to run them in."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

import torch

__all__ = ["code", "commands", "run", "run_code", "text_of"]

ROOT = Path(__file__).resolve().parents[2]
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
    return subprocess.run(
        [sys.executable, "-P", *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


def run_code(text: str, *, cwd: Path) -> subprocess.CompletedProcess[str]:
    """`text` as a program, in a copy of this process: torch and transformers are imported already, which takes a new
    process longer than what documents show.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if not child:
            _as_a_program(text, cwd, out.fileno(), errors.fileno())
        _, status = os.waitpid(child, 0)
        out.seek(0)
        errors.seek(0)
        return subprocess.CompletedProcess(["-c"], os.waitstatus_to_exitcode(status), out.read(), errors.read())


def _as_a_program(text: str, cwd: Path, out: int, errors: int) -> None:
    """Ends this process: whatever happens, its parent's tests are not run a second time."""
    status = 1
    try:
        os.dup2(out, 1)
        os.dup2(errors, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
        os.chdir(cwd)
        warnings.resetwarnings()
        # torch makes its threads anew after a fork, without a lock: before several threads of the text ask for them
        torch.set_num_threads(torch.get_num_threads())
        exec(compile(text, "<document>", "exec"), {"__name__": "__main__"})
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
