"""What a request makes of its tools: what the model is told of, the form of calls, and who reads them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from partitioner.serving.openai.requests import ChatRequest
from partitioner.serving.openai.tools import NamedTool
from partitioner.serving.tools.call_form import CallForm
from partitioner.serving.tools.call_grammar import call_grammar, marks_of
from partitioner.serving.tools.call_reader import CallReader

__all__ = ["ToolUse"]


@dataclass(frozen=True)
class ToolUse:
    """See the module's docstring. hidden: special tokens that are no part of a call, and so of no text."""

    form: CallForm
    names: frozenset[str]
    many: bool
    is_named: bool
    hidden: frozenset[int]

    @classmethod
    def of(cls, request: ChatRequest, form: CallForm, tokenizer: Any) -> ToolUse:
        """For a request whose answer may have calls."""
        special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        in_calls = {number for text, number in marks_of(tokenizer).items() if text in form.written}
        is_named = isinstance(request.tool_choice, NamedTool)
        return cls(
            form=form,
            names=frozenset(tool.function.name for tool in request.callable),
            # a tool that is named is called once
            many=request.parallel_tool_calls is not False and not is_named,
            is_named=is_named,
            hidden=frozenset(special - in_calls),
        )

    def reader(self) -> CallReader:
        """Of one answer."""
        return CallReader(self.form, self.names, many=self.many)

    def grammar(self, request: ChatRequest, tokenizer: Any) -> str:
        """Of answers that are calls and nothing else. Raises InputError for a schema that cannot be obeyed."""
        schemas = [(tool.function.name, tool.function.schema_) for tool in request.callable]
        return call_grammar(self.form, schemas, many=self.many, marks=marks_of(tokenizer))
