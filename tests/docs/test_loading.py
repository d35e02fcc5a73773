"""The command and the code of docs/loading.md, as typed."""

import shlex
from pathlib import Path

import pytest

from tests.support.processes import typed

DOC = "loading.md"


@pytest.mark.slow
@pytest.mark.processes
def test_the_command(tmp_path: Path) -> None:
    (command,) = typed.commands(DOC)
    program, *arguments = shlex.split(command)
    assert program == ".venv/bin/partitioner"
    done = typed.run("-m", "partitioner", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Return a list of")


def test_the_code(tmp_path: Path) -> None:
    """And what a bundle that refers to the checkpoint says is what the parts say."""
    compare = (
        "\nwanted = parts.generate([[5, 17, 9]], max_new_tokens=8)\n"
        "assert bundle.generate([[5, 17, 9]], max_new_tokens=8).tolist() == wanted.tolist()\n"
    )
    done = typed.run_code("\n".join([*typed.code(DOC), compare]), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "model.embed_tokens.weight" in done.stdout
