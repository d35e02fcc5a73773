"""What a compile is doing, shown where standard error is a terminal; and the seconds of each step."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from partitioner.cli.common import progress
from partitioner.cli.common.progress import Shown, shown
from partitioner.program.progress import timed, watched


def test_steps_within_steps() -> None:
    listener = Shown(Console(file=io.StringIO()))
    with watched(listener):
        with timed("trace"):
            for _ in range(2):
                with timed("export"):
                    time.sleep(0.01)
        with timed("fuse"):
            pass
    assert list(listener.seconds) == [("trace",), ("trace", "export"), ("fuse",)]
    assert listener.seconds["trace",] >= listener.seconds["trace", "export"] >= 0.02
    assert [line.rpartition(":")[0] for line in listener.lines()] == ["trace", "  export", "fuse"]


def test_a_step_that_fails_is_over() -> None:
    listener = Shown(Console(file=io.StringIO()))
    with watched(listener):
        with pytest.raises(ValueError, match="no"), timed("trace"):
            raise ValueError("no")
        with timed("fuse"):
            pass
    assert list(listener.seconds) == [("trace",), ("fuse",)]


@pytest.mark.parametrize("terminal", [True, False])
def test_only_a_terminal_is_told_meanwhile(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "AFTER_S", 0.01)
    file = io.StringIO()
    with watched(Shown(Console(file=file, force_terminal=terminal))), timed("trace"), timed("export"):
        time.sleep(0.3)
    assert ("trace: export" in file.getvalue()) == terminal


@pytest.mark.parametrize("verbose", [True, False])
def test_verbose_says_where_the_time_went(verbose: bool, capsys: pytest.CaptureFixture[str]) -> None:
    with shown(verbose=verbose), timed("trace"):
        pass
    assert ("trace: 0.0 s" in capsys.readouterr().err) == verbose
