"""Copies of the tests' own process that stand for new interpreters: a rank sees the same in both."""

import json
import logging
import os
import signal
import sys
from typing import Any

import pytest

from tests.support.processes import forked

logging.getLogger("tests.copies").propagate = False  # pytest gives its handlers to such loggers besides the root
SEEN = """
import json, logging, os, random, signal, sys, threading, warnings
print(json.dumps({
    "variables": sorted(os.environ),
    "files": sorted(
        f for f in map(int, os.listdir("/proc/self/fd"))
        if f < 3 or (os.path.exists(p := f"/proc/self/fd/{f}") and ".so" not in os.path.realpath(p))  # code is loaded
    ),
    "signals": [str(signal.getsignal(n)) for n in (signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD)],
    "interrupt": signal.getsignal(signal.SIGINT) is signal.default_int_handler,
    "arguments": sys.argv, "name": __name__, "threads": threading.active_count(),
    "handlers": len(logging.root.handlers), "quiet": len(logging.getLogger("tests.copies").handlers),
    "errors": [str(each[2]) for each in warnings.filters if each[0] == "error"],
    "session": os.getsid(0) == os.getpid(), "folder": os.getcwd(),
}))
"""


def seen(copies: bool, **options: Any) -> dict[str, Any]:
    environment = {"PATH": os.environ["PATH"], "ONLY": "this"}
    if copies:
        with forked.forking():
            done = forked.run(["-c", SEEN, "a", "b"], env=environment, **options)
    else:
        done = forked.run(["-c", SEEN, "a", "b"], env=environment, **options)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    found["variables"] = set(found["variables"]) - {"LC_CTYPE"}  # which Python sets as it starts
    return found


@pytest.mark.interpreters
def test_a_copy_sees_what_a_new_interpreter_sees(tmp_path: Any) -> None:
    for options in ({"cwd": tmp_path}, {"cwd": tmp_path, "start_new_session": True}):
        assert seen(True, **options) == seen(False, **options)


@pytest.mark.interpreters
@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        ("import sys; sys.exit(7)", 7, ""),
        ("import sys; sys.exit('a reason')", 1, "a reason"),
        ("raise ValueError('wrong')", 1, "ValueError: wrong"),
        ("raise KeyboardInterrupt", -signal.SIGINT, "KeyboardInterrupt"),
        ("import os; os.kill(os.getpid(), 9)", -signal.SIGKILL, ""),
        ("", 0, ""),
    ],
)
def test_it_ends_as_one(code: str, status: int, said: str) -> None:
    with forked.forking():
        copied = forked.run(["-c", code])
    new = forked.run(["-c", code])
    assert copied.returncode == new.returncode == status
    assert said in copied.stderr
    assert copied.stderr.strip().splitlines()[-1:] == new.stderr.strip().splitlines()[-1:]


def test_quick_tests_start_copies() -> None:
    with forked.popen(["-c", "import sys; sys.exit(not {'pytest', 'torch'} <= set(sys.modules))"]) as process:
        assert process.wait() == 0
    assert "pytest" in sys.modules


@pytest.mark.interpreters
def test_others_start_interpreters() -> None:
    with forked.popen(["-c", "import sys; sys.exit('pytest' in sys.modules)"]) as process:
        assert process.wait() == 0
