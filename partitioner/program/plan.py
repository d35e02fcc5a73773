"""Plan: how many ranks along each axis, and what the user wants otherwise."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from partitioner.errors import PlanError
from partitioner.sharding.mesh import Mesh

if TYPE_CHECKING:
    from partitioner.program.program import Program

__all__ = ["Pass", "Plan"]


@runtime_checkable
class Pass(Protocol):
    """A frozen dataclass: a name, its options as fields, and `run`, which may change the program it is given."""

    @property
    def name(self) -> str: ...

    def run(self, program: Program) -> Program: ...


Options = tuple[tuple[str, object], ...]
Choice = str | tuple[str, Options] | Pass
"""A pass by name; by name with options; or the pass itself."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """tp: tensor-parallel ranks. keep_whole: globs of weight names that stay whole on every rank.

    passes: further passes, run in this order after the built-in ones. Each is the name of an installed one, the name
    and its options, `("probe", {"every": 2})`, or a pass itself, `Probe(every=2)`.
    """

    tp: int = 1
    keep_whole: tuple[str, ...] = ()
    passes: Sequence[Choice | tuple[str, Mapping[str, object]]] = ()

    def __post_init__(self) -> None:
        given: Any = self.keep_whole
        if not isinstance(given, (tuple, list)) or not all(isinstance(each, str) for each in given):
            raise PlanError(f"keep_whole must be a list or tuple of names, such as [{str(given)!r}]; got {given!r}")
        object.__setattr__(self, "keep_whole", tuple(given))
        given = self.passes
        if not isinstance(given, (tuple, list)):
            raise PlanError(f"passes must be a list or tuple of passes, such as [{_example(given)}]; got {given!r}")
        object.__setattr__(self, "passes", tuple(map(_chosen, given)))
        self.mesh  # noqa: B018 - checks the degrees

    @property
    def mesh(self) -> Mesh:
        return Mesh.of(tp=self.tp)

    def __str__(self) -> str:
        said = []
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "passes" and value:
                value = f"[{', '.join(map(_said, value))}]"
            if field.name == "tp" or value != field.default:
                said.append(f"{field.name}={value}")
        return f"Plan({', '.join(said)})"


def _example(given: object) -> str:
    return repr(given) if isinstance(given, str) else "'name'"


def _chosen(given: Any) -> Choice:
    """What a user wrote for one pass, in a form that can be hashed."""
    if isinstance(given, str):
        return given
    if isinstance(given, (tuple, list)):
        options = given[1] if len(given) == 2 else None
        pairs: Iterable[Any] | None = options.items() if isinstance(options, Mapping) else options
        if isinstance(given[0] if given else None, str) and isinstance(pairs, Iterable) and not isinstance(pairs, str):
            found = [tuple(pair) if isinstance(pair, (tuple, list)) else () for pair in pairs]
            if all(len(pair) == 2 and isinstance(pair[0], str) for pair in found):
                return _hashed((given[0], tuple((name, _tuples(value)) for name, value in found)))
    elif isinstance(given, Pass) and not isinstance(given, type):
        return _hashed(given)
    raise PlanError(
        "each of passes must be a name, a pair (name, {option: value}), or a pass (an object with `name` and "
        f"`run(program)`, not its class); got {given!r}"
    )


def _hashed(chosen: Choice) -> Choice:
    try:
        hash(chosen)
    except TypeError as error:
        raise PlanError(
            f"a plan holds what can be hashed, and the pass {chosen!r} cannot: make it a frozen dataclass, with "
            f"options of numbers, texts and tuples of them ({error})"
        ) from None
    return chosen


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value


def _said(chosen: Any) -> str:
    if isinstance(chosen, tuple):
        name, options = chosen
        return f"{name}({', '.join(f'{option}={value!r}' for option, value in options)})"
    return chosen if isinstance(chosen, str) else repr(chosen)
