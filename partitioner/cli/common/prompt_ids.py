"""A prompt of the command line as tokens, as it is or in the chat template of the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from partitioner.errors import InputError
from partitioner.serving.text.chat_template import TemplateFailed, render

__all__ = ["prompt_ids"]

_TEMPLATES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")
"""Where a chat template may stand, in the order in which transformers looks."""


def prompt_ids(tokenizer: Any, prompt: str, *, folder: str, chat: bool) -> list[int]:
    """folder: of the model, for errors. chat: whether the prompt goes into the chat template.

    Raises InputError where there are no tokens.
    """
    if not chat:
        ids = list(tokenizer(prompt)["input_ids"])
        if not ids:
            raise InputError(
                f"the tokenizer of {folder!r} makes no tokens of the prompt {prompt!r}: "
                + ("give a text" if not prompt else "there may be none in the folder (tokenizer.json, for one)")
            )
        return ids
    try:
        text = render(tokenizer, [{"role": "user", "content": prompt}])
    except TemplateFailed as error:
        raise InputError(f"the chat template of {folder!r} refuses {prompt!r}: {error}") from error
    # the template has written the special tokens
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if not ids:
        file = next((name for name in _TEMPLATES if Path(folder, name).is_file()), "the tokenizer's files")
        raise InputError(
            f"the chat template of {folder!r} (in {file}) makes no text of the prompt {prompt!r}: it must "
            "write the messages it is given; leave --chat out to continue the prompt as it is"
        )
    return ids
