"""What the launcher starts: a module that ends with it.

    python -P -m runtime.processes.worker PARENT MODULE ARGUMENT...

The kernel ends the process with its parent, from the first line on: importing torch takes seconds, in which the parent
may be killed. Nothing has to be removed then: what the ranks share has no name.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys
from typing import NoReturn

__all__: list[str] = []

_PR_SET_PDEATHSIG = 1


def _end_with(parent: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        sys.exit(f"this process cannot be tied to its launcher: {os.strerror(ctypes.get_errno())}")
    if os.getppid() != parent:  # it ended before that
        os._exit(1)


def _fail(error: BaseException) -> NoReturn:
    """Ends as an uncaught error does, but now: to clear away all of torch takes seconds where processors are busy."""
    code: object = 1
    if not isinstance(error, SystemExit):
        sys.excepthook(type(error), error, error.__traceback__)
    elif isinstance(error.code, int):
        code = error.code
    else:
        print(error.code, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)


if __name__ == "__main__":
    _end_with(int(sys.argv[1]))
    module = sys.argv[2]
    sys.argv = sys.argv[2:]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except KeyboardInterrupt:
        os._exit(130)  # the launcher passes an interrupt on: no need for a traceback per rank
    except BaseException as error:
        if isinstance(error, SystemExit) and not error.code:
            raise
        _fail(error)
