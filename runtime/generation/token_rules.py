"""Which tokens a step must or must not take, by the rules that transformers' options of the same names stand for.

no_repeat_ngram_size=0            no n tokens in a row stand twice in a sequence, its prompt included
bad_words_ids=None                texts as ids, none of which is ever completed
suppress_tokens=None              ids that are never taken; begin_suppress_tokens: not as the first new token
min_new_tokens, min_length=None   no end before so many new tokens, or so many with the prompt
forced_bos_token_id=None          the first new token, after a prompt of one
forced_eos_token_id=None          the last new token, where max_new_tokens is reached
logit_bias=None                   by id, what its logit is raised by
presence_penalty=0                what the logit of each token is lowered by that was written, once
frequency_penalty=0               the same, as often as it was written; both as OpenAI's API has them
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from partitioner.errors import InputError
from runtime.sampling.token_edits import TokenEdits

__all__ = ["TokenRules", "Watcher"]


@dataclass(frozen=True, kw_only=True)
class TokenRules:
    """The options, complete; see the module's docstring."""

    no_repeat_ngram_size: int = 0
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    min_new_tokens: int = 0
    min_length: int = 0
    forced_bos_token_id: tuple[int, ...] = ()
    forced_eos_token_id: tuple[int, ...] = ()
    logit_bias: tuple[tuple[int, float], ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    @property
    def on_host(self) -> str:
        """The name of a rule that reads the text so far in a way that only the host does, or acts at some steps only;
        "": none does, once the first token has been chosen.
        """
        if any(len(word) > 1 for word in self.bad_words_ids):
            return "bad_words_ids"
        names = ("no_repeat_ngram_size", "min_new_tokens", "min_length", "forced_bos_token_id", "forced_eos_token_id")
        return next((name for name in names if vars(self)[name]), "")

    def banned_alone(self, eos_token_id: Sequence[int]) -> tuple[int, ...]:
        """Tokens that are never taken, whatever the text."""
        words = [word for word in self.bad_words_ids if len(word) == 1 and word[0] not in eos_token_id]
        return tuple(dict.fromkeys((*self.suppress_tokens, *(word[0] for word in words))))

    def check(self, vocab_size: int) -> None:
        """Raises InputError where a rule names a token that the model does not have."""
        words = {token for word in self.bad_words_ids for token in word}
        for name, tokens in (
            ("bad_words_ids", words),
            ("logit_bias", {token for token, _ in self.logit_bias}),
            ("forced_bos_token_id", self.forced_bos_token_id),
            ("forced_eos_token_id", self.forced_eos_token_id),
        ):
            high = max(tokens, default=0)
            if high >= vocab_size:
                raise InputError(f"{name} has the id {high}; this model has {vocab_size} tokens, from 0 on")


class Watcher:
    """Applies the rules to sequences that grow; `width`: of the prompts as they were given, padding included."""

    def __init__(
        self, rules: TokenRules, *, width: int, eos_token_id: Sequence[int], max_new_tokens: int, vocab_size: int
    ) -> None:
        rules.check(vocab_size)
        self.rules, self._width, self._last, self._vocab_size = rules, width, max_new_tokens, vocab_size
        self._speaks = rules != TokenRules()
        self._eos = tuple(eos_token_id)
        self._always = rules.banned_alone(self._eos)
        self._words = [word for word in rules.bad_words_ids if len(word) > 1]
        self._seen: list[dict[tuple[int, ...], list[int]]] = []
        """Per row, what has followed each n - 1 tokens."""
        self._known: list[int] = []

    def edits(self, texts: Sequence[Sequence[int]], count: int) -> TokenEdits | None:
        """For the `count`-th new token of `texts`, prompts and what was added; None where no rule speaks."""
        if not self._speaks:
            return None
        rules = self.rules
        banned = list(rules.suppress_tokens)
        alone = self._width > 1 or not rules.forced_bos_token_id
        if count == (1 if alone else 2):
            banned += rules.begin_suppress_tokens
        forced: tuple[int, ...] = ()
        if count == self._last and rules.forced_eos_token_id:
            forced = rules.forced_eos_token_id
        elif self._width == count == 1 and rules.forced_bos_token_id:
            forced = rules.forced_bos_token_id
        pairs: list[tuple[int, int]] = []
        repeated = self._repeated(texts)  # which has to see every token
        if not forced:  # by a rule that comes after these
            banned += self._always
            if count <= rules.min_new_tokens or self._width + count <= rules.min_length:
                banned += self._eos
            pairs = repeated + self._completed(texts)
        added = self._added(texts, count)
        if not (forced or banned or pairs or added):
            return None
        edits = TokenEdits(forced, tuple(dict.fromkeys(banned)), tuple(pairs), added)
        self._require_some(edits, len(texts), count)
        return edits

    def _require_some(self, edits: TokenEdits, rows: int, count: int) -> None:
        """Raises InputError where the rules leave no token."""
        left = edits.forced or range(self._vocab_size)
        if len(edits.banned) + len(edits.pairs) < len(left):
            return
        for row in range(rows):
            out = {*edits.banned, *(token for of, token in edits.pairs if of == row)}
            if out.issuperset(left):
                used = [name for name, value in vars(self.rules).items() if value]
                raise InputError(f"{', '.join(used)} together leave no token for row {row}, new token {count}")

    def _added(self, texts: Sequence[Sequence[int]], count: int) -> tuple[tuple[int, int, float], ...]:
        rules = self.rules
        if not (rules.logit_bias or rules.presence_penalty or rules.frequency_penalty):
            return ()
        found = []
        for row, text in enumerate(texts):
            raised = dict(rules.logit_bias)
            if rules.presence_penalty or rules.frequency_penalty:
                # of a row that has ended, whatever: it is not listened to
                for token, times in Counter(text[len(text) - (count - 1) :]).items():
                    lowered = rules.presence_penalty + rules.frequency_penalty * times
                    raised[token] = raised.get(token, 0.0) - lowered
            found += [(row, token, amount) for token, amount in sorted(raised.items())]
        return tuple(found)

    def _repeated(self, texts: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
        size = self.rules.no_repeat_ngram_size
        if not size:
            return []
        self._seen = self._seen or [{} for _ in texts]
        self._known = self._known or [0 for _ in texts]
        found = []
        for row, (text, seen) in enumerate(zip(texts, self._seen, strict=True)):
            for start in range(self._known[row], len(text) - size + 1):
                gram = tuple(text[start : start + size])
                seen.setdefault(gram[:-1], []).append(gram[-1])
            self._known[row] = max(len(text) - size + 1, 0)
            if len(text) + 1 >= size:
                found += [(row, token) for token in seen.get(tuple(text[len(text) + 1 - size :]), ())]
        return found

    def _completed(self, texts: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
        return [
            (row, word[-1])
            for row, text in enumerate(texts)
            for word in self._words
            if len(text) >= len(word) and tuple(text[1 - len(word) :]) == word[:-1]
        ]
