"""The weights that a plan's globs select: by a weight's name, by one of its aliases, or by a module's."""

from __future__ import annotations

import difflib
import fnmatch
from typing import TYPE_CHECKING

from partitioner.errors import PlanError

if TYPE_CHECKING:  # a plan is checked without torch
    from partitioner.program.program import Program

__all__ = ["select"]


def select(program: Program, globs: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """The weights that globs of names (or of modules, or of aliases) select, each with the glob as its reason."""
    found: dict[str, str] = {}
    for glob in globs:
        names = {w.name: (w.name, *w.aliases) for w in program.weights.values()}
        hits = [n for n, known in names.items() if any(_matches(name, glob) for name in known)]
        if not hits:
            known = {part for aliases in names.values() for name in aliases for part in _prefixes(name)}
            near = ", ".join(_near(glob, known)) or "nothing"
            raise PlanError(f"keep_whole={glob!r} matches no weight; near it: {near}")
        found.update(dict.fromkeys(hits, f"kept whole by the plan ({glob})"))
    return tuple(sorted(found.items()))


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
