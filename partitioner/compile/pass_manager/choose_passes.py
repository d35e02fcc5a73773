"""Passes by name, ours and anyone's.

    [project.entry-points."partitioner.passes"]
    probe = "package.module:Probe"                 a frozen dataclass whose `name` is "probe", with `run(program)`

A name belongs to one distribution: where two declare it, or one declares a built-in's, which is meant is not guessed.
A pass is imported when it is chosen, and nothing else is that needs torch: a plan without passes is checked at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import Distribution, EntryPoint, entry_points
from typing import Any

from partitioner.errors import PlanError
from partitioner.program.plan import Pass, Plan

__all__ = ["GROUP", "Chosen", "choose", "wanted"]

GROUP = "partitioner.passes"
"""The entry points that passes are declared under, ours as well as anyone's."""
OURS = "partitioner"
"""The distribution of the built-in passes."""


@dataclass(frozen=True)
class Chosen:
    """A pass, ready to run. origin: whose it is, for errors; "" for a built-in one."""

    step: Pass
    origin: str

    def __str__(self) -> str:
        return f"the pass {self.step.name!r} ({self.origin})"


def wanted(plan: Plan) -> list[Chosen]:
    """The plan's own passes, in its order."""
    found = []
    for given in plan.passes:
        if isinstance(given, str):
            found.append(choose(given))
        elif isinstance(given, tuple):
            name, options = given
            found.append(choose(name, **dict(options)))
        else:
            kind = type(given)
            found.append(Chosen(_as_pass(given, f"the pass {kind.__qualname__}"), f"{kind.__module__}, in the plan"))
    return found


def choose(name: str, **options: object) -> Chosen:
    """The installed pass of that name, with these options."""
    point = _declared(name)
    ours = _distribution(point) == OURS
    origin = f"{point.value}, of {_distribution(point, version=True)}"
    who = f"the pass {name!r} ({origin})"
    try:
        kind = point.load()
    except Exception as error:
        raise PlanError(f"{who} cannot be loaded: {type(error).__name__}: {error}") from error
    if not isinstance(kind, type):
        raise PlanError(f"{who} must be a class, a frozen dataclass with `run(program)`; it is {kind!r}")
    _check_options(who, kind, options)
    try:
        made = kind(**options)
    except Exception as error:
        raise PlanError(f"{who} does not take {_options(options)}: {error}") from error
    step = _as_pass(made, who)
    if step.name != name:
        raise PlanError(f"{who} calls itself {step.name!r}: a pass and its entry point have one name")
    return Chosen(step, "" if ours else origin)


def _declared(name: str) -> EntryPoint:
    points = _points(_places())
    found = [point for point in points if point.name == name]
    if not found:
        names = sorted({point.name for point in points})
        near = difflib.get_close_matches(name, names, n=3)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"installed: {', '.join(names)}"
        raise PlanError(f"no pass named {name!r} is installed; {hint}")
    if len(found) > 1:
        whose = "".join(f"\n  {point.value}, of {_distribution(point, version=True)}" for point in found)
        shadow = " It is the name of a built-in pass." if any(_distribution(p) == OURS for p in found) else ""
        raise PlanError(
            f"several passes are named {name!r}:{whose}\n{shadow.strip()} Uninstall one, or rename it".strip()
        )
    return found[0]


def _places() -> tuple[object, ...]:
    """Where distributions are looked for, and when something was last installed there or removed."""
    found: list[object] = [*map(id, sys.meta_path)]
    for place in sys.path:
        try:
            found.append((place, os.stat(place or ".").st_mtime_ns))
        except OSError:
            found.append((place, None))
    return tuple(found)


@functools.lru_cache(maxsize=4)
def _points(places: tuple[object, ...]) -> tuple[EntryPoint, ...]:
    """What is declared there. Each pass of a compile is looked up, and every file of entry points would be read."""
    return tuple(entry_points(group=GROUP))


def _distribution(point: EntryPoint, *, version: bool = False) -> str:
    if point.dist is None:
        return "an unknown distribution"
    name, number = _name_and_version(point.dist)
    return f"{name} {number}" if version else name.lower()


@functools.lru_cache(maxsize=64)
def _name_and_version(distribution: Distribution) -> tuple[str, str]:
    """Its file is parsed as a mail is, which would be done for each pass of a compile."""
    metadata = distribution.metadata
    return str(metadata["Name"]), str(metadata["Version"])


def _check_options(who: str, kind: type, options: Mapping[str, object]) -> None:
    if not dataclasses.is_dataclass(kind):
        return  # its constructor says what it takes
    known = [field.name for field in dataclasses.fields(kind) if field.init]
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"its options: {', '.join(known) or 'none'}"
            raise PlanError(f"{who} has no option {name!r}; {hint}")


def _options(options: Mapping[str, object]) -> str:
    said = ", ".join(f"{name}={value!r}" for name, value in options.items())
    return f"the options {said}" if said else "no options: it needs some"


def _as_pass(made: Any, who: str) -> Pass:
    if not hasattr(made, "run") or not callable(made.run):
        raise PlanError(f"{who} has no method `run(program)`")
    if not hasattr(made, "name") or not isinstance(made.name, str) or not made.name:
        raise PlanError(f"{who} has no name: give the class `name: ClassVar[str] = ...`")
    step: Pass = made
    return step
