"""A chat template, run with limits: it is a program that came with a model, and may go on without end.

    render(tokenizer, messages)             one text
    with Renderer(tokenizer) as renderer:   many, from any thread
        renderer.render(messages)

transformers runs it in jinja's sandbox, which keeps it from files and code but not from time and memory. So it runs in
a process of its own, with nothing open but the connection that its text comes through, and with a limit of memory. One
process renders many texts, so that the template is compiled once; one that takes too long is ended, and another made.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from partitioner.serving.bounded_process import BoundedProcess, WorkFailed

__all__ = ["Renderer", "TemplateFailed", "render"]

LONGEST_S = 5.0


class TemplateFailed(Exception):
    """Why there is no text."""


def render(tokenizer: Any, messages: list[dict[str, str]], *, timeout_s: float = LONGEST_S) -> str:
    """The messages as the tokenizer's template puts them, up to where the answer begins."""
    with Renderer(tokenizer, timeout_s=timeout_s) as renderer:
        return renderer.render(messages)


class Renderer:
    """See the module's docstring. The tokenizer's template must not change meanwhile."""

    def __init__(self, tokenizer: Any, *, timeout_s: float = LONGEST_S) -> None:
        def work(messages: list[dict[str, str]]) -> str:
            return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

        self._process = BoundedProcess(work, timeout_s=timeout_s)

    def render(self, messages: list[dict[str, str]]) -> str:
        """Raises TemplateFailed. One text at a time; others wait."""
        try:
            return str(self._process.ask(messages))
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
