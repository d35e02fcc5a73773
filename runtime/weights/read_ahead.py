"""A checkpoint's files, asked for while its model is still traced: what the ranks read then is in the page cache.

    disk     files, from the first byte to the last          the kernel, in the background
    here     trace, passes, emission                          then each rank reads or maps its shards

Only a hint: nothing is kept by this process, and what is in the page cache is not read again. For files that the ranks
of this machine need all of, together. Those that do not fit into half of the free memory are left alone: they would
push each other out.
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

from partitioner.errors import WeightError
from runtime.weights.safetensors_files import TensorFiles

__all__ = ["read_ahead"]

_STEP_BYTES = 128 * 2**10
"""A kernel may read no more than this for one hint, by its default."""
_SHARE = 0.5


def read_ahead(files: TensorFiles, free_bytes: int | None) -> threading.Thread | None:
    """Begins, and returns at once; the thread ends when all has been asked for. None where nothing is asked for.

    free_bytes: of this machine's memory; None: unknown, so that nothing is asked for.
    """
    sizes = {entry.file: 0 for entry in files.entries.values()}
    for entry in files.entries.values():
        sizes[entry.file] = max(sizes[entry.file], entry.start + entry.bytes)
    if sys.platform != "linux" or free_bytes is None or sum(sizes.values()) > _SHARE * free_bytes:
        return None
    thread = threading.Thread(target=_ask, args=(files, sizes), name="read ahead", daemon=True)
    thread.start()
    return thread


def _ask(files: TensorFiles, sizes: dict[Path, int]) -> None:
    for file, size in sizes.items():
        try:
            descriptor = files.open(file)
        except WeightError:  # told by who needs it
            return
        try:
            for start in range(0, size, _STEP_BYTES):
                os.posix_fadvise(descriptor, start, _STEP_BYTES, os.POSIX_FADV_WILLNEED)
        except OSError:  # a file system that takes no hints
            return
        finally:
            os.close(descriptor)
