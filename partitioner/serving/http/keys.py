"""Who may ask: keys from a file or the environment, never from the command line, which all users see.

    PARTITIONER_API_KEY=...     one key
    --api-key-file PATH         one per line; a file that nobody else may read (mode 0600)

A key is compared by its digest, in constant time, with every key there is.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import stat
from collections.abc import Iterable
from pathlib import Path

from partitioner.errors import InputError
from partitioner.serving.openai.errors import invalid

__all__ = ["API_KEY", "Keys"]

API_KEY = "PARTITIONER_API_KEY"
_SHORTEST = 8


class Keys:
    """Without a key, everybody may ask."""

    def __init__(self, keys: Iterable[str] = ()) -> None:
        given = list(keys)
        for key in given:
            if len(key) < _SHORTEST or not key.isascii() or not key.isprintable() or " " in key:
                raise InputError(f"a key must have at least {_SHORTEST} letters and digits, without a space")
        self._digests = [_digest(key) for key in given]

    @classmethod
    def found(cls, file: str | None) -> Keys:
        """Those of the environment and of `file`. What is in the environment is taken out: ranks need not have it."""
        keys = [key for key in [os.environ.pop(API_KEY, "")] if key]
        if file is not None:
            keys += _of_file(Path(file))
        return cls(keys)

    def __bool__(self) -> bool:
        return bool(self._digests)

    def require(self, header: str | None) -> None:
        """Raises where an Authorization header has none of the keys."""
        if not self._digests:
            return
        kind, _, key = (header or "").partition(" ")
        if kind.lower() != "bearer" or not key:
            raise invalid(
                "You didn't provide an API key. Give it in the header 'Authorization: Bearer YOUR_KEY'.",
                status=401,
                code="missing_api_key",
            )
        digest = _digest(key.strip())
        # all of them, whichever fits
        if not sum(hmac.compare_digest(digest, each) for each in self._digests):
            raise invalid("Incorrect API key provided.", status=401, code="invalid_api_key")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _of_file(path: Path) -> list[str]:
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_mode & (stat.S_IRWXG | stat.S_IRWXO):
                raise InputError(f"the file of keys {path} may be read by others: chmod 600 {path}")
            text = file.read().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the file of keys {path} cannot be read: {error}") from error
    keys = [line.strip() for line in text.splitlines() if line.strip()]
    if not keys:
        raise InputError(f"the file of keys {path} holds none: put one on a line")
    return keys
