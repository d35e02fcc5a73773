"""What the launcher starts: a module under watch.

    python -P -m runtime.processes.worker PARENT FOLDERS MODULE ARGUMENT...

The process ends within moments of its parent's death, from its first line on: importing torch takes seconds, in which
the parent may be killed. FOLDERS (with ":" between) are removed then: a parent that is killed cannot.
"""

from __future__ import annotations

import os
import runpy
import shutil
import sys
import threading
import time
from typing import NoReturn

__all__: list[str] = []


def _watch(parent: int, folders: list[str]) -> None:
    while os.getppid() == parent:
        time.sleep(0.1)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
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
    parent, folders, module, *arguments = sys.argv[1:]
    watched = (int(parent), list(filter(None, folders.split(os.pathsep))))
    threading.Thread(target=_watch, args=watched, daemon=True, name="watch the parent").start()
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except KeyboardInterrupt:
        os._exit(130)  # the launcher passes an interrupt on: no need for a traceback per rank
    except BaseException as error:
        if isinstance(error, SystemExit) and not error.code:
            raise
        _fail(error)
