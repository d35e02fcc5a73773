"""How a model writes calls of tools: what stands around the name and the arguments of a call.

    opening NAME between ARGUMENTS closing                                   one call
    opening NAME between ARGUMENTS next NAME between ARGUMENTS closing       two

ARGUMENTS is a JSON object; some templates have it before the name. Where a template writes the id of a call as well,
the text around it is in two pieces, with the id between them. White space is not compared: models space their JSON as
they like.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

__all__ = ["ID_LENGTH", "MORE", "CallForm", "Pieces", "matched"]

Pieces = tuple[str, ...]
"""Text as it stands; between two pieces, the id of a call."""

ID_LENGTH = 9
"""Letters and digits of an id: some templates take no other ids."""
MORE = -1
"""Of a match: the text ends before it is known."""
_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True)
class CallForm:
    """See the module's docstring.

    forced: the opening where a call is all that the answer has, with what the template puts before it then. next: None
    where the template writes one call only. arguments_as: how the template wants those of earlier calls. empty: what it
    wants for the content of a message that has none. has_results: it writes what tools have answered.
    """

    opening: Pieces
    forced: Pieces
    between: Pieces
    closing: Pieces
    next: Pieces | None
    arguments_first: bool
    arguments_as: Literal["object", "text"]
    empty: str | None
    has_results: bool

    @property
    def written(self) -> str:
        """All that stands around."""
        return "\n".join(
            piece
            for pieces in (self.opening, self.forced, self.between, self.closing, self.next or ())
            for piece in pieces
        )


def matched(pieces: Pieces, text: str, at: int) -> int | None:
    """Where the pieces end if they stand in the text from `at` on; None: they do not; MORE: the text ends too soon."""
    for number, piece in enumerate(pieces):
        if number:
            found = _ID.match(text, at)
            if at == len(text) or (found is not None and found.end() == len(text)):
                return MORE
            if found is None:
                return None
            at = found.end()
        for letter in piece:
            if letter.isspace():
                continue
            while at < len(text) and text[at].isspace():
                at += 1
            if at == len(text):
                return MORE
            if text[at] != letter:
                return None
            at += 1
    return at
