"""What is made here without a word about its device lies on the host, whatever a script's default device is.

    @host_default                 a function that scripts call
    host_default_steps(steps)     an iterator that scripts advance: their own code between two steps is left alone

`torch.set_default_device("cuda")`, or `with torch.device("cuda"):`, is for what the script makes. Tables, lists of
tokens and what is compared between ranks are made for the host here. Where the default is the host's, nothing is done.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Iterator
from typing import ParamSpec, TypeVar

import torch

__all__ = ["host_default", "host_default_steps"]

P = ParamSpec("P")
T = TypeVar("T")


def _is_default() -> bool:
    return torch.get_default_device().type == "cpu"


def host_default(function: Callable[P, T]) -> Callable[P, T]:
    @functools.wraps(function)
    def call(*given: P.args, **named: P.kwargs) -> T:
        if _is_default():
            return function(*given, **named)
        with torch.device("cpu"):
            return function(*given, **named)

    return call


def host_default_steps(steps: Iterator[T]) -> Iterator[T]:
    return steps if _is_default() else _steps(steps)


def _steps(steps: Iterator[T]) -> Iterator[T]:
    try:
        while True:
            with torch.device("cpu"):
                try:
                    step = next(steps)
                except StopIteration:
                    return
            yield step
    finally:
        if isinstance(steps, Generator):
            with torch.device("cpu"):
                steps.close()
