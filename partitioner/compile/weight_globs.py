"""The weights that a plan's globs select: by a weight's name, by one of its aliases, or by a module's."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable
from typing import TYPE_CHECKING

from partitioner.errors import PlanError

if TYPE_CHECKING:  # a plan is checked without torch
    from partitioner.program.program import Program

__all__ = ["matching", "select"]


def select(program: Program, globs: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """The weights that globs of names (or of modules, or of aliases) select, each with the glob as its reason."""
    found: dict[str, str] = {}
    for glob in globs:
        hits, near = matching(program, glob, program.weights)
        if not hits:
            raise PlanError(f"keep_whole={glob!r} matches no weight; near it: {near}")
        found.update(dict.fromkeys(hits, f"kept whole by the plan ({glob})"))
    return tuple(sorted(found.items()))


def matching(program: Program, glob: str, among: Iterable[str]) -> tuple[list[str], str]:
    """Those of the weights `among` that a glob selects; where there are none, the names that may have been meant."""
    names = {name: (name, *program.weights[name].aliases) for name in among}
    hits = [name for name, known in names.items() if any(_matches(each, glob) for each in known)]
    if hits:
        return hits, ""
    known = {part for aliases in names.values() for name in aliases for part in _prefixes(name)}
    return [], ", ".join(_near(glob, known)) or "nothing"


def _near(glob: str, names: set[str]) -> list[str]:
    """What may have been meant: the glob with another name in the place of the first that nothing matches."""
    parts = glob.split(".")
    for count in range(len(parts) - 1, 0, -1):
        begin = ".".join(parts[:count])
        end = None if parts[count - 1] == "*" else count + 1  # which may stand for several
        found = [name for name in names if _matches(name, begin)]
        deeper = {part for name in found for part in name.split(".")[count:end]}
        if hits := difflib.get_close_matches(parts[count], sorted(deeper), n=3, cutoff=0.4):
            return [".".join([begin, hit, *parts[count + 1 :]]) for hit in hits]
        if found and not deeper:
            return [begin]  # what follows is too much
        if found:
            break
    lowered = {name.lower(): name for name in sorted(names)}
    return [lowered[hit] for hit in difflib.get_close_matches(glob.lower(), lowered, n=3, cutoff=0.4)]


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _matches(name: str, glob: str) -> bool:
    return any(fnmatch.fnmatchcase(part, glob) for part in _prefixes(name))
