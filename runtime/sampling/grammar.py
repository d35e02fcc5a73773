"""Texts that must be words of a grammar: which tokens may come next, by xgrammar (Dong et al., arXiv:2411.15100).

    grammars = Grammars(vocabulary)                  what each token says, as `vocabulary_text` writes it
    matcher = grammars.matcher(text, ends=(0,))      of one row; raises InputError where the text is no grammar
    matcher.allowed()                                bits of the tokens that may come next
    matcher.learn(42)

A grammar is written in xgrammar's form of EBNF, its first rule is `root`. Every rank compiles the same text, and
advances a matcher of its own by the tokens that all ranks choose alike, so that all have the same bits. A row may end
where the grammar has an end, and only there. xgrammar is imported by the first grammar.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from partitioner.errors import InputError

__all__ = ["LONGEST_GRAMMAR", "Grammars", "Matcher", "among", "vocabulary_text"]

LONGEST_GRAMMAR = 1 << 20
"""Characters."""
_MOST_KEPT = 32
_WORD = 32
_PLACE = re.compile(r"^\[[\d:]+\] \S+: ")
"""When and where in its own sources xgrammar has raised an error."""


def vocabulary_text(words: Sequence[bytes], ends: Sequence[int]) -> str:
    """What `Grammars` reads. words: the bytes of each token, b"" for those that no grammar may use. ends: ids."""
    import xgrammar

    found = xgrammar.TokenizerInfo(list(words), xgrammar.VocabType.RAW, stop_token_ids=list(ends))
    return found.serialize_json()


def among(bits: Tensor, tokens: Tensor) -> Tensor:
    """Which of `tokens` [n] are in the sets `bits` [.., words], int32: [.., n].

    Token i is bit i % 32 of word i // 32.
    """
    words = tokens // _WORD
    known = words < bits.shape[-1]
    found = bits[..., words.clamp(max=bits.shape[-1] - 1)] >> (tokens % _WORD).to(bits.dtype)
    return (found & 1).bool() & known


class Grammars:
    """See the module's docstring. The last few that were compiled are kept."""

    def __init__(self, vocabulary: str) -> None:
        self._vocabulary = vocabulary
        self._compiler: Any = None
        self._kept: OrderedDict[str, Any] = OrderedDict()

    def matcher(self, text: str, *, ends: Sequence[int]) -> Matcher:
        """ends: the tokens with which a row ends."""
        compiled = self.compiled(text)
        size = compiled.tokenizer_info.vocab_size
        known = [end for end in ends if end < size]
        if not known:
            raise InputError(
                f"a grammar needs a token with which the text ends: eos_token_id is {list(ends)}, and must name one of "
                f"the tokenizer's {size} tokens"
            )
        return Matcher(compiled, known)

    def compiled(self, text: str) -> Any:
        """Raises InputError where it cannot be compiled. How long that takes is up to the grammar."""
        if text in self._kept:
            self._kept.move_to_end(text)
            return self._kept[text]
        try:
            import xgrammar
        except ModuleNotFoundError as error:
            raise InputError(
                f"a grammar needs {error.name}, which is not there: pip install 'partitioner[grammar]'"
            ) from error
        try:
            if self._compiler is None:
                vocabulary = xgrammar.TokenizerInfo.deserialize_json(self._vocabulary)
                self._compiler = xgrammar.GrammarCompiler(vocabulary, max_threads=1, cache_enabled=False)
            found = self._compiler.compile_grammar(text)
        except Exception as error:  # what xgrammar raises has no class of its own
            said = _PLACE.sub("", str(error))[:500]
            raise InputError(f"the grammar cannot be compiled: {said}") from error
        self._kept[text] = found
        if len(self._kept) > _MOST_KEPT:
            self._kept.popitem(last=False)
        return found


class Matcher:
    """One row's place in its grammar."""

    def __init__(self, compiled: Any, ends: Sequence[int]) -> None:
        import xgrammar

        self._matcher = xgrammar.GrammarMatcher(compiled, override_stop_tokens=list(ends))
        size = compiled.tokenizer_info.vocab_size
        self._words = -(-size // _WORD)
        self._is_lost = False

    def allowed(self) -> Tensor:
        """int32 [words], on the host; see `among`. Raises InputError where the row cannot be continued."""
        bits = torch.full((1, self._words), -1, dtype=torch.int32)
        if self._is_lost or self._matcher.is_terminated():
            raise InputError("the tokens so far are no beginning of a word of the grammar, so that none can follow")
        self._matcher.fill_next_token_bitmask(bits)
        return bits[0]

    def learn(self, token: int) -> None:
        """The token that was chosen."""
        self._is_lost = self._is_lost or not self._matcher.accept_token(token)
