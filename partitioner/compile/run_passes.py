"""Passes by name, ours and anyone's, and running them so that a broken one is named.

    [project.entry-points."partitioner.passes"]
    probe = "package.module:Probe"                 a frozen dataclass whose `name` is "probe", with `run(program)`

A name belongs to one distribution: where two declare it, or one declares a built-in's, which is meant is not guessed.
After each pass the program is looked over and its layouts are inferred anew; what one of ours raises is raised as it
is, what comes of another's is a `PlanError` that says whose.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import Distribution, EntryPoint, entry_points
from typing import Any

from partitioner.compile.validate_graph import fault
from partitioner.errors import PlanError
from partitioner.program.plan import Pass, Plan
from partitioner.program.program import Program
from partitioner.program.progress import timed
from partitioner.proof.layouts import check
from partitioner.proof.meetings import events_of, play

__all__ = ["GROUP", "Chosen", "choose", "run_passes", "wanted"]

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


def run_passes(program: Program, steps: Sequence[Chosen]) -> Program:
    """All of `steps`, in order; the program's layouts are checked after each, the ranks' order of communication at the
    end.
    """
    for chosen in steps:
        if chosen.origin:
            with timed(chosen.step.name):
                program = _run_other(program, chosen)
            continue
        with timed(chosen.step.name):
            program = chosen.step.run(program)
        if not program.unplaced:
            with timed("check of the layouts"):
                check(program)
    if program.unplaced:
        raise PlanError(f"{steps[-1]} deals out weights, and no pass after it places them")
    with timed("order of communication"):
        play(program.mesh, dict.fromkeys(range(program.mesh.world_size), events_of(program.graph)))
    return program


def _run_other(program: Program, chosen: Chosen) -> Program:
    try:
        found: object = chosen.step.run(program)
    except Exception as error:
        # a plan that the pass refuses is the pass's to explain
        what = "" if isinstance(error, PlanError) else f"raised {type(error).__name__}: "
        raise PlanError(f"{chosen}: {what}{error}") from error
    if not isinstance(found, Program):
        got = "None: `run` ends without a return" if found is None else f"a {type(found).__name__}"
        raise PlanError(f"{chosen}: `run` must return the Program, got {got}")
    broken = fault(found)
    if broken is not None:
        raise PlanError(f"{chosen} leaves a program that cannot be read: {broken}")
    if found.unplaced:
        return found
    try:
        check(found)
    except Exception as error:
        raise PlanError(f"{chosen} leaves a program that does not pass the check: {error}") from error
    return found


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
