"""The command and the code of docs/profiling.md, as typed; and wrong questions in one line."""

import json
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from partitioner.cli.app import app
from tests.support.processes import typed

DOC = "profiling.md"


def ranks_of(path: Path) -> set[int]:
    return {event["pid"] for event in json.loads(path.read_text())["traceEvents"]}


@pytest.mark.slow
@pytest.mark.processes
def test_the_command(tmp_path: Path) -> None:
    (command,) = typed.commands(DOC)
    program, *arguments = shlex.split(command)
    assert program == ".venv/bin/partitioner"
    # what ranks write depends neither on being recorded nor on whether they are processes or threads
    plain = [argument for argument in arguments if argument not in ("--profile", "trace.json")]
    expected = typed.run("-m", "partitioner", *plain, "--simulate", cwd=tmp_path).stdout
    assert expected.startswith("Return a list of")
    for more in ([], ["--simulate"]):
        done = typed.run("-m", "partitioner", *arguments, *more, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout == expected
        assert "compute   communication   waiting   recording" in done.stderr
        assert "trace in trace.json: open it at https://ui.perfetto.dev" in done.stderr
        assert ranks_of(tmp_path / "trace.json") == {0, 1}
        (tmp_path / "trace.json").unlink()


def test_the_code(tmp_path: Path) -> None:
    (code,) = typed.code(DOC)
    done = typed.run_code(code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 3
    assert ranks_of(tmp_path / "trace.json") == {0, 1}


@pytest.mark.parametrize("path", ["/nowhere/trace.json", "/tmp"])
def test_where_no_trace_can_be_written(path: str) -> None:
    done = CliRunner().invoke(app, ["run", "--prompt", "a", "--profile", path], env={"COLUMNS": "200"})
    assert done.exit_code == 2
    assert f"error: cannot write a trace to '{path}': give a file in a folder that exists" in done.output
