"""A chat template, run with limits: it is a program that came with a model, and may go on without end.

    render(tokenizer, messages)             one text
    with Renderer(tokenizer) as renderer:   many, from any thread
        renderer.render(messages)

transformers runs it in jinja's sandbox, which keeps it from files and code but not from time and memory. So it runs in
a process of its own, with nothing open but the connection that its text comes through, and with a limit of memory. One
process renders many texts, so that the template is compiled once; one that takes too long is ended, and another made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from partitioner.serving.bounded_process import BoundedProcess, WorkFailed

__all__ = ["Renderer", "TemplateFailed", "render"]

LONGEST_S = 5.0
Message = Mapping[str, Any]


class TemplateFailed(Exception):
    """Why there is no text."""


def render(tokenizer: Any, messages: Sequence[Message], *, timeout_s: float = LONGEST_S) -> str:
    """The messages as the tokenizer's template puts them, up to where the answer begins."""
    with Renderer(tokenizer, timeout_s=timeout_s) as renderer:
        return renderer.render(messages)


class Renderer:
    """See the module's docstring. The tokenizer's template must not change meanwhile."""

    def __init__(self, tokenizer: Any, *, timeout_s: float = LONGEST_S) -> None:
        def work(asked: dict[str, Any]) -> str:
            return str(
                tokenizer.apply_chat_template(
                    asked["messages"],
                    tools=asked["tools"],
                    tokenize=False,
                    add_generation_prompt=asked["prompt"],
                )
            )

        self._process = BoundedProcess(work, timeout_s=timeout_s)

    def render(
        self, messages: Sequence[Message], *, tools: Sequence[dict[str, Any]] | None = None, prompt: bool = True
    ) -> str:
        """Raises TemplateFailed. One text at a time; others wait. prompt: up to where an answer begins."""
        try:
            return str(
                self._process.ask(
                    {"messages": list(messages), "tools": None if tools is None else list(tools), "prompt": prompt}
                )
            )
        except WorkFailed as error:
            raise TemplateFailed(str(error)) from error

    def close(self) -> None:
        self._process.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
