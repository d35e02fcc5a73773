"""Whether a call fits what it calls: number and names of the arguments, before anything is run.

    aten overloads          by their schema
    torch.*, tensor.*       by the schemas that `program.torch_calls` stands them for; so no `out=`, no `inplace=`
    ops of ours, plugins    by their signature
    int.*                   all operands, each a number or a node

What torch itself checks when it runs (shapes, dtypes, kinds of arguments) is left to it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from partitioner.program.torch_calls import FUNCTIONS, METHODS

__all__ = ["misfit"]

_INTEGER_OPERANDS = {"int.neg": 1}


def misfit(name: str, target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    """What is wrong with calling `target`, which `name` stands for, like this; None: nothing."""
    kind = name.partition(".")[0]
    if kind == "int":
        return _misfit_integers(name, args, kwargs)
    if kind == "tensor" and not (args and isinstance(args[0], fx.Node)):
        return "a method is called on the result of a node"  # of a number, the code would not even parse
    if kind in ("op", "plugin"):
        try:
            inspect.signature(target).bind(*args, **kwargs)
        except (TypeError, ValueError) as error:
            return str(error)
        return None
    schemas = [target._schema] if isinstance(target, torch._ops.OpOverload) else _lowered()[name]
    found = [_misfit_schema(schema, args, kwargs) for schema in schemas]
    return None if None in found else found[0]


def _misfit_integers(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    wanted = _INTEGER_OPERANDS.get(name, 2)
    # a text would be repeated or formatted by some of them
    if len(args) != wanted or kwargs or not all(isinstance(each, (fx.Node, int, float)) for each in args):
        return f"it takes {wanted} numbers"
    return None


def _misfit_schema(schema: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    positional = [each.name for each in schema.arguments if not each.kwarg_only]
    if len(args) > len(positional):
        return f"it takes {len(positional)} arguments in order"
    given = {*positional[: len(args)]}
    for name in kwargs:
        if name in given or all(each.name != name for each in schema.arguments):
            return f"it takes no {name!r} there"
    missing = [
        each.name
        for each in schema.arguments
        if each.name not in given and each.name not in kwargs and not each.has_default_value()
    ]
    return f"it needs {missing[0]!r}" if missing else None


@functools.cache
def _lowered() -> dict[str, list[Any]]:
    """The schemas of the overloads that each name of `partitioner.program.torch_calls` stands for."""
    found: dict[str, list[Any]] = {}
    for overload in FUNCTIONS:
        found.setdefault(f"torch.{overload.overloadpacket.__name__}", []).append(overload._schema)
    for overload, method in METHODS.items():
        found.setdefault(f"tensor.{method}", []).append(overload._schema)
    return found
