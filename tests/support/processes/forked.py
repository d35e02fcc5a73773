"""Interpreters as copies of the tests' own process: torch and transformers are imported already, which takes a new one
some seconds of processor time.

    with forking(): ...                 what `launch` starts meanwhile are copies, and so is what `popen` starts
    popen(["-m", "module", "a"])        `python -P -m module a`, a copy or a new interpreter; options as of Popen
    run(["-c", code])                   the same to its end

A copy has the environment, descriptors, signals, random numbers and warnings of a new process, and modules that are
imported already; it runs what a new one would, as `__main__`, and ends without clearing away what it was copied from.

Of quick tests, ranks are copies, and of slow ones new interpreters (`forks`). A quick test about what only a new
interpreter shows is marked `interpreters`.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import logging
import os
import random
import runpy
import signal
import subprocess
import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from subprocess import DEVNULL, PIPE, CompletedProcess, TimeoutExpired
from typing import Any, NoReturn

import pytest
import torch

import runtime.processes.launch

__all__ = ["DEVNULL", "PIPE", "Copy", "TimeoutExpired", "forking", "forks", "popen", "run"]

_SEED = torch.initial_seed()
"""Of a new process."""


def forks(test: pytest.Item) -> bool:
    return not any(test.get_closest_marker(name) for name in ("slow", "gpu", "interpreters"))


@contextlib.contextmanager
def forking() -> Iterator[None]:
    own = runtime.processes.launch.subprocess
    runtime.processes.launch.subprocess = _Subprocess  # type: ignore[attr-defined]
    try:
        yield
    finally:
        runtime.processes.launch.subprocess = own  # type: ignore[attr-defined]


def popen(arguments: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
    start = runtime.processes.launch.subprocess.Popen  # type: ignore[attr-defined]
    started: subprocess.Popen[Any] = start([sys.executable, "-P", *arguments], **options)
    return started


def run(arguments: Sequence[str], **options: Any) -> CompletedProcess[str]:
    """With what it wrote; raises nothing where it fails."""
    with popen(arguments, stdin=DEVNULL, stdout=PIPE, stderr=PIPE, text=True, **options) as process:
        out, errors = process.communicate()
    return CompletedProcess(process.args, process.returncode, out, errors)


class Copy(subprocess.Popen[Any]):
    """`subprocess.Popen` of a command `python -P -m MODULE ...` or `python -P -c CODE ...`, in a fork without exec."""

    def _execute_child(  # type: ignore[no-untyped-def]
        self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags, shell,
        p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, restore_signals, gid, gids, uid, umask,
        start_new_session, *group,
    ) -> None:  # fmt: skip
        sys.stdout.flush()
        sys.stderr.flush()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # other threads: none holds what the copy needs
            self.pid = os.fork()
        if self.pid == 0:
            _become(args[2:], (p2cread, c2pwrite, errwrite), pass_fds, cwd, env, preexec_fn, start_new_session)
        self._child_created = True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)  # type: ignore[attr-defined]


class _Subprocess:
    """What `runtime.processes.launch` uses of the module."""

    DEVNULL, TimeoutExpired, Popen = DEVNULL, TimeoutExpired, Copy


def _become(
    arguments: list[str],
    files: tuple[int, int, int],
    kept: Sequence[int],
    cwd: str | Path | None,
    environment: Mapping[str, str] | None,
    prepare: Callable[[], None] | None,
    is_session: bool,
) -> NoReturn:
    """In the copy. Whatever happens, its parent's tests are not run a second time."""
    try:
        gc.freeze()  # what is looked through for garbage is copied
        if is_session:
            os.setsid()
        faulthandler.disable()
        _as_new_signals()
        for number, file in enumerate(files):
            if file != -1:
                os.dup2(file, number)
        for file in map(int, os.listdir("/proc/self/fd")):
            if file > 2 and file not in kept:
                with contextlib.suppress(OSError):
                    if not _is_library(file):
                        os.close(file)
        if prepare is not None:
            prepare()
        if environment is not None:
            os.environ.clear()
            os.environ.update(environment)
        if cwd is not None:
            os.chdir(cwd)
        _as_new_modules()
        status = _ran(arguments)
    except BaseException:
        sys.__excepthook__(*sys.exc_info())  # type: ignore[arg-type]
        status = 1
    with contextlib.suppress(BaseException):
        sys.stdout.flush()
    with contextlib.suppress(BaseException):
        sys.stderr.flush()
    os._exit(status)


def _is_library(file: int) -> bool:
    """Whether code was loaded from it: what is loaded from the next file of that number would be taken for the same."""
    return os.readlink(f"/proc/self/fd/{file}").removesuffix(" (deleted)").endswith(".so")


def _as_new_signals() -> None:
    signal.set_wakeup_fd(-1)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def _as_new_modules() -> None:
    sys.stdin = sys.__stdin__ = os.fdopen(0, closefd=False)
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", 1, errors="backslashreplace", closefd=False)
    sys.excepthook, sys.unraisablehook = sys.__excepthook__, sys.__unraisablehook__
    threading.excepthook = threading.__excepthook__
    warnings.resetwarnings()
    for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
        warnings.simplefilter("ignore", category)
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="runpy")  # that a module is imported already
    _forget(tuple(logging.root.handlers))
    random.seed()
    torch.manual_seed(_SEED)
    torch.set_default_dtype(torch.float32)
    # torch makes its threads anew after a fork, without a lock: before several threads ask for them
    torch.set_num_threads(torch.get_num_threads())


def _forget(handlers: Sequence[logging.Handler]) -> None:
    """pytest gives its own to loggers that do not propagate too. What they write to is closed here: the next file or
    socket of that number would get it.
    """
    for logger in (logging.root, *logging.root.manager.loggerDict.values()):
        for handler in handlers if isinstance(logger, logging.Logger) else ():
            logger.removeHandler(handler)


def _ran(arguments: list[str]) -> int:
    """The exit code."""
    kind, what, *rest = arguments
    try:
        if kind == "-m":
            sys.argv = [what, *rest]
            sys.modules.pop(what, None)
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            assert kind == "-c"
            sys.argv = ["-c", *rest]
            sys.modules["__main__"] = main = types.ModuleType("__main__")
            exec(compile(what, "<string>", "exec"), main.__dict__)
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            return error.code or 0
        print(error.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        sys.stderr.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    return 0
