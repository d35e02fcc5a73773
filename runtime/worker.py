"""What the launcher starts: `python -P -m runtime.worker PARENT FOLDERS MODULE ARGUMENT...` runs a module, under watch.

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

__all__: list[str] = []


def _watch(parent: int, folders: list[str]) -> None:
    while os.getppid() == parent:
        time.sleep(0.1)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


if __name__ == "__main__":
    parent, folders, module, *arguments = sys.argv[1:]
    watched = (int(parent), list(filter(None, folders.split(os.pathsep))))
    threading.Thread(target=_watch, args=watched, daemon=True, name="watch the parent").start()
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except KeyboardInterrupt:
        sys.exit(130)  # the launcher passes Ctrl-C on: no need for a traceback per rank
