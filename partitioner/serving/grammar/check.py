"""Grammars for requests, each tried before any rank hears of it: a schema is from whoever asks.

    checks = Checks(vocabulary)
    checks.grammar(schema)        raises InputError where it cannot be obeyed, or takes too long to compile
    checks.passed(text)           the same of a grammar that is written already

It is compiled here first, in a process of its own with limits of time and memory. Every rank compiles the same text
again, which takes as long, while the rows of others wait.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any

from partitioner.errors import InputError
from partitioner.serving.bounded_process import BoundedProcess, WorkFailed
from partitioner.serving.grammar.json_schema import grammar_of
from runtime.sampling.grammar import LONGEST_GRAMMAR, Grammars

__all__ = ["LONGEST_S", "Checks"]

LONGEST_S = 2.0
_LARGEST_COMPILED = 64 * 2**20
_MOST_KEPT = 256


class Checks:
    """See the module's docstring. Any thread may ask."""

    def __init__(self, vocabulary: str, *, timeout_s: float = LONGEST_S) -> None:
        grammars = Grammars(vocabulary)
        # what is the same for all is made once, and shared by the processes that follow
        grammars.compiled('root ::= "a"')
        self._process = BoundedProcess(lambda text: int(grammars.compiled(text).memory_size_bytes), timeout_s=timeout_s)
        self._lock = threading.Lock()
        self._passed: OrderedDict[str, None] = OrderedDict()

    def grammar(self, schema: Any) -> str:
        """Of JSON that is valid by the schema."""
        return self.passed(grammar_of(schema))

    def passed(self, text: str) -> str:
        """The text itself."""
        if len(text) > LONGEST_GRAMMAR:
            raise InputError(f"the schema's grammar has {len(text)} characters, and may have {LONGEST_GRAMMAR}")
        with self._lock:
            if text in self._passed:
                return text
        try:
            size = self._process.ask(text)
        except WorkFailed as error:
            raise InputError(f"the schema's grammar cannot be compiled: {error}; make the schema simpler") from error
        if size > _LARGEST_COMPILED:
            raise InputError(f"the schema's grammar takes {size} bytes, and may take {_LARGEST_COMPILED}")
        with self._lock:
            self._passed[text] = None
            if len(self._passed) > _MOST_KEPT:
                self._passed.popitem(last=False)
        return text

    def close(self) -> None:
        self._process.close()
