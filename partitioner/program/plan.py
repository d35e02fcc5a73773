"""Plan: how many ranks along each axis, and what the user wants otherwise.

Plan(tp=4, pp=2)                                          from Python
Plan.parse("tp=4,pp=2")                                   from the command line; str(plan) is its inverse
Plan.parse("ep=8,expert-parallel.exchange=gather")        options of a pass: NAME.OPTION=VALUE
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import partitioner
from partitioner.errors import PlanError
from partitioner.program.plan_text import items, read_value, shown, write_value
from partitioner.sharding.mesh import DEGREES, Mesh, require_degrees

if TYPE_CHECKING:
    from partitioner.program.program import Program

__all__ = ["SP_ATTENTION", "Pass", "Plan"]

WEIGHTS = ("expanded", "stored")
"""How ranks hold quantised weights."""
CACHES = ("auto", "expanded", "latent")
"""What ranks remember of the keys and values of a token."""
SP_ATTENTION = ("auto", "ring", "gather", "ulysses", "ring-ulysses")
"""How queries reach the keys of a sequence that is divided over sp."""


@runtime_checkable
class Pass(Protocol):
    """A frozen dataclass: a name, its options as fields, and `run`, which may change the program it is given."""

    @property
    def name(self) -> str: ...

    def run(self, program: Program) -> Program: ...


Options = tuple[tuple[str, object], ...]
Choice = str | tuple[str, Options] | Pass
"""A pass by name; by name with options; or the pass itself."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Plan:
    """Degrees of parallelism, and passes.

    - tp: tensor-parallel ranks. pp: pipeline stages. sp: ranks that divide the tokens of each sequence (context
      parallelism).
    - dp: replicas of all these; by default as many as the experts' ranks need, otherwise one. Replicas that share no
      experts are independent of each other, see `replicas`.
    - ep: ranks that divide the experts of each layer. etp: ranks that divide each expert's matrices. Experts use the
      same ranks as attention, so ep x etp must divide dp x sp x tp.
    - sp_attention: how queries of one rank reach the keys of others: "ring", "gather", "ulysses", "ring-ulysses" (both
      at once over two factors of sp), or "auto".
    - keep_whole: globs of names of weights that are replicated.
    - weights: what ranks hold of a quantised checkpoint: "expanded", numbers in the model's dtype, or "stored", codes
      and scales as in the files, which products dequantise.
    - cache: what is kept of a token: "expanded", keys and values; "latent", the narrower value that both are computed
      from; or "auto", the smaller of the two.
    - passes: each is the name of an installed pass, the name and its options, `("probe", {"every": 2})`, or a pass
      itself, `Probe(every=2)`. A built-in pass that is named here runs at its usual place, with these options; others
      run after the built-in ones, in this order.
    """

    dp: int | None = None
    pp: int = 1
    sp: int = 1
    tp: int = 1
    ep: int = 1
    etp: int = 1
    sp_attention: str = "auto"
    keep_whole: tuple[str, ...] = ()
    weights: str = "expanded"
    cache: str = "auto"
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
        require_degrees({axis: self.degree(axis) for axis in DEGREES})
        if self.dp is None:
            object.__setattr__(self, "dp", self._least_dp)
        if self.sp_attention not in SP_ATTENTION:
            raise PlanError(f"sp_attention must be one of {', '.join(SP_ATTENTION)}; got {self.sp_attention!r}")
        if self.sp_attention != "auto" and self.sp == 1:
            raise PlanError(
                f"sp_attention={self.sp_attention} is for tokens shared out over sp, and sp is 1: give sp=2"
            )
        if self.sp_attention == "ring-ulysses" and not any(self.sp % each == 0 for each in range(2, self.sp)):
            raise PlanError(
                "sp_attention=ring-ulysses is for an sp that is a product of two numbers above 1, such as 4 or 6; sp "
                f"is {self.sp}: give ring, gather or ulysses"
            )
        if self.weights not in WEIGHTS:
            raise PlanError(f"weights must be one of {', '.join(WEIGHTS)}; got {self.weights!r}")
        if self.cache not in CACHES:
            raise PlanError(f"cache must be one of {', '.join(CACHES)}; got {self.cache!r}")
        self.mesh  # noqa: B018 - checks the degrees together

    def degree(self, axis: str) -> int:
        """How many ranks along an axis: one of dp, pp, sp, tp, ep, etp."""
        degree: int | None = getattr(self, axis)
        return 1 if degree is None else degree

    @property
    def mesh(self) -> Mesh:
        """All ranks."""
        return _mesh(*(self.degree(axis) for axis in DEGREES))

    @property
    def replicas(self) -> int:
        """How many independent copies there are, with process groups of their own: dp without what experts need."""
        return self.degree("dp") // self._least_dp

    @property
    def replica_mesh(self) -> Mesh:
        """The ranks of one replica; the ranks of `mesh` are those of the first, then those of the next, and so on."""
        return Mesh.of(**{axis: self.degree(axis) for axis in DEGREES} | {"dp": self._least_dp})

    @property
    def _least_dp(self) -> int:
        experts = self.ep * self.etp
        return experts // math.gcd(experts, self.sp * self.tp)

    @classmethod
    def auto(cls, model: Any, cluster: Any, workload: Any, *, goal: str = "latency") -> Plan:
        """The plan with the best predicted times for a model on a cluster; see `partitioner.choose_plan`.

        Plan.auto(model, "8xH100", Workload(prompt=4096, new=512, batch=32), goal="throughput")
        """
        found: Plan = partitioner.choose_plan(model, cluster, workload, goal=goal)
        return found

    @classmethod
    def parse(cls, text: str) -> Plan:
        """The plan that `text` says: items with commas between.

        tp=4                        a degree
        keep_whole=[lm_head*,wte]   a list; a single one needs no brackets
        probe                       a pass
        probe.every=2               an option of a pass: a number, true, false, a text, or a list of these
        """
        values: dict[str, Any] = {}
        passes: dict[str, dict[str, object]] = {}
        for name, value in items(text):
            if value is None:
                passes.setdefault(name, {})
            elif "." in name:
                kind, _, option = name.rpartition(".")
                if option in passes.setdefault(kind, {}):
                    raise PlanError(f"the plan {shown(text)} gives {name} twice")
                passes[kind][option] = read_value(value)
            elif name not in (*DEGREES, *_FIELDS):
                raise PlanError(
                    f"the plan {shown(text)} has {name!r}; required: {', '.join(DEGREES)}, {' or '.join(_FIELDS)}, a "
                    "pass's name, or PASS.OPTION, such as tp=2,pp=2"
                )
            elif name in values:
                raise PlanError(f"the plan {shown(text)} gives {name} twice")
            else:
                values[name] = _read_field(name, value, text)
        chosen = [(name, options) if options else name for name, options in passes.items()]
        return cls(**values, passes=tuple(chosen))

    def __str__(self) -> str:
        """What `parse` takes; a pass whose options cannot be written so is written as Python has it."""
        said = [f"{axis}={n}" for axis, n in self._degrees_given.items()]
        said += [f"{name}={write_value(value)}" for name, value in self._fields_given.items()]
        for chosen in self.passes:
            name, options = _named(chosen)
            said += [f"{name}.{option}={write_value(value)}" for option, value in options] or [name]
        return ",".join(said) or "tp=1"

    @property
    def _degrees_given(self) -> dict[str, int]:
        """The axes with more than one rank, without a dp that follows from the others."""
        return {axis: n for axis, n in self.mesh.degrees.items() if axis != "dp" or not self.dp_follows}

    @property
    def _fields_given(self) -> dict[str, Any]:
        """The fields beside degrees and passes that are not as by default."""
        given = {field.name: (vars(self)[field.name], field.default) for field in fields(self) if field.name in _FIELDS}
        return {name: value for name, (value, default) in given.items() if value != default}

    @property
    def dp_follows(self) -> bool:
        """Whether dp is what it would be if it had not been given."""
        return self.dp == self._least_dp

    def __repr__(self) -> str:
        said = [f"{axis}={n}" for axis, n in self._degrees_given.items()]
        if self.tp == 1:
            said.append("tp=1")
        said += [f"{name}={value!r}" for name, value in self._fields_given.items()]
        if self.passes:
            said.append(f"passes=[{', '.join(map(_said, self.passes))}]")
        return f"Plan({', '.join(said)})"


_FIELDS = ("sp_attention", "keep_whole", "weights", "cache")
"""Of a plan, beside its degrees and passes."""


@functools.lru_cache(maxsize=1 << 14)
def _mesh(*degrees: int) -> Mesh:
    """Of degrees in the order of `DEGREES`: a planner asks thousands of plans for theirs, again and again."""
    return Mesh.of(**dict(zip(DEGREES, degrees, strict=True)))


def _read_field(name: str, value: str, text: str) -> Any:
    found = read_value(value)
    if name in ("sp_attention", "weights", "cache"):
        return str(found)
    if name == "keep_whole":
        return tuple(map(str, found)) if isinstance(found, tuple) else (value,)
    if not isinstance(found, int) or isinstance(found, bool):
        raise PlanError(f"the plan {shown(text)} has {name}={value}; required: a whole number of ranks")
    return found


def _named(chosen: Any) -> tuple[str, Options]:
    if isinstance(chosen, str):
        return chosen, ()
    if isinstance(chosen, tuple):
        return chosen
    options = [(f.name, getattr(chosen, f.name)) for f in fields(chosen) if f.init] if is_dataclass(chosen) else []
    return chosen.name, tuple(options)


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
