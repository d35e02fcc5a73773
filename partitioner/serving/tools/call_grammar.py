"""Grammars of answers that are calls of tools, in a model's own form, with arguments valid by the tools' schemas.

    root ::= forced call rest
    call ::= "get_weather" between ARGUMENTS | ...
    rest ::= closing | next call rest            one call: rest ::= closing

Tokens of the form that stand for no text, such as a mark of their own for calls, are in it by their ids: the same
letters in other tokens would be a form that the model was never shown.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from partitioner.errors import InputError
from partitioner.serving.grammar.json_schema import COMMON, rules_of
from partitioner.serving.tools.call_form import ID_LENGTH, CallForm, Pieces

__all__ = ["call_grammar", "marks_of"]


def marks_of(tokenizer: Any) -> dict[str, int]:
    """By its text, each token that was added to the tokenizer's own."""
    return {token.content: number for number, token in tokenizer.added_tokens_decoder.items()}


def call_grammar(
    form: CallForm, schemas: Sequence[tuple[str, Mapping[str, Any]]], *, many: bool, marks: Mapping[str, int]
) -> str:
    """schemas: the name of each tool that may be called, and the schema of its arguments. marks: see `marks_of`.

    Raises InputError for a schema that cannot be obeyed; says of which tool.
    """
    calls, rules = [], []
    for number, (name, schema) in enumerate(schemas):
        try:
            root, text = rules_of(schema, prefix=f"f{number}r")
        except InputError as error:
            raise InputError(f"parameters of {name!r}: {error}") from error
        parts = [_text(name), "between", root]
        calls.append(" ".join(reversed(parts) if form.arguments_first else parts))
        rules.append(text)
    more = "" if form.next is None or not many else f" | {_written(form.next, marks)} call rest"
    return (
        f"root ::= {_written(form.forced, marks)} call rest\n"
        f"call ::= {' | '.join(calls)}\n"
        f"rest ::= {_written(form.closing, marks)}{more}\n"
        f"between ::= {_written(form.between, marks)}\n"
        f"id ::= [A-Za-z0-9]{{{ID_LENGTH}}}\n"
        f"{''.join(rules)}{COMMON}"
    )


def _written(pieces: Pieces, marks: Mapping[str, int]) -> str:
    return " id ".join(_with_marks(piece, marks) for piece in pieces)


def _with_marks(piece: str, marks: Mapping[str, int]) -> str:
    if not marks:
        return _text(piece)
    # the longest first, as the tokenizer finds them
    pattern = "|".join(re.escape(mark) for mark in sorted(marks, key=len, reverse=True))
    parts = re.split(f"({pattern})", piece)
    said = [f"Token({marks[part]})" if part in marks else _text(part) for part in parts if part]
    return " ".join(said) or '""'


def _text(said: str) -> str:
    return json.dumps(said, ensure_ascii=False)
