"""Running passes, so that a broken one is named.

After each pass the program is looked over and its layouts are inferred anew; what one of ours raises is raised as it
is, what comes of another's is a `PlanError` that says whose.
"""

from __future__ import annotations

from collections.abc import Sequence

from partitioner.compile.pass_manager.choose_passes import Chosen
from partitioner.compile.pass_manager.validate_graph import fault
from partitioner.errors import PlanError
from partitioner.program.program import Program
from partitioner.program.progress import timed
from partitioner.proof.layouts import check
from partitioner.proof.meetings import events_of, play

__all__ = ["run_passes"]


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
