"""What all commands have in common: how their errors are told, and the options that say how a model is compiled."""

from __future__ import annotations

import errno
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console

from partitioner.cli.common.options import Dp, Ep, KeepWhole, MaxLength, Passes, PlanText, Pp, Sp, Tp, Verbose
from partitioner.cli.common.progress import shown
from partitioner.cli.jobs.compile import Compile
from partitioner.errors import CommunicationError, PartitionerError

__all__ = ["command"]

_COMPILE = {
    "dp": Dp,
    "tp": Tp,
    "pp": Pp,
    "ep": Ep,
    "sp": Sp,
    "plan": PlanText,
    "keep_whole": KeepWhole,
    "passes": Passes,
    "max_length": MaxLength,
    "verbose": Verbose,
}
"""The options that a command has in the place of its parameter `how`."""
_FLAGS = ("verbose",)
"""Those of them that are not given a value."""


def command(app: typer.Typer, name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes a function a command of `app`: exit codes for its errors, and options in place of `how: Compile`, whose
    compiling is shown.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        known = inspect.signature(function, eval_str=True)
        takes_how = "how" in known.parameters

        @functools.wraps(function)
        def run(**arguments: Any) -> None:
            with _errors():
                if not takes_how:
                    function(**arguments)
                    return
                arguments["how"] = how = Compile.of(**{option: arguments.pop(option) for option in _COMPILE})
                with shown(verbose=how.verbose):
                    function(**arguments)

        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        options = [
            inspect.Parameter(o, kind, default=False if o in _FLAGS else None, annotation=a)
            for o, a in _COMPILE.items()
        ]
        parameters = [p for each in known.parameters.values() for p in (options if each.name == "how" else [each])]
        # typer reads both
        run.__signature__ = known.replace(parameters=parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        app.command(name)(run)
        return run

    return register


@contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except PartitionerError as error:
        hint = " (--simulate shows at which node)" if isinstance(error, CommunicationError) else ""
        line = " ".join(str(error).split("\n"))
        Console(stderr=True).print(f"error: {line}{hint}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1 if isinstance(error, CommunicationError) else 2) from None
    except OSError as error:
        if error.errno in (None, errno.EPIPE):  # ours, or whoever read what is printed has gone
            raise
        # what the system says of a file or the network: no room, no permission, no such place
        where = f"{error.filename}: " if error.filename else ""
        Console(stderr=True).print(f"error: {where}{error.strerror}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None
