"""Tokens as text that is written as it comes: no letter before all of its bytes are there."""

from __future__ import annotations

from typing import Any, TextIO

__all__ = ["Text", "TextStream"]


class Text:
    """What follows a prompt, as far as it is certain: the last bytes of a letter may be still to come."""

    def __init__(self, tokenizer: Any, prompt: list[int]) -> None:
        self.tokenizer, self.ids = tokenizer, prompt
        self.prompt = self._decoded(prompt).rstrip("\ufffd")

    def after(self, tokens: list[int]) -> str:
        # together with the prompt: a space between the two belongs to neither alone
        return self._decoded(self.ids + tokens)[len(self.prompt) :]

    def _decoded(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class TextStream:
    """Writes a text as it comes."""

    def __init__(self, text: Text, out: TextIO | None, *, with_prompt: bool) -> None:
        self.text, self.out = text, out
        self.written = 0
        if out is not None and with_prompt:
            out.write(text.prompt)

    def show(self, tokens: list[int]) -> None:
        if self.out is not None:
            text = self.text.after(tokens).rstrip("\ufffd")
            self.out.write(text[self.written :])
            self.out.flush()
            self.written = max(self.written, len(text))

    def end(self, tokens: list[int]) -> None:
        assert self.out is not None
        self.out.write(self.text.after(tokens)[self.written :] + "\n")
