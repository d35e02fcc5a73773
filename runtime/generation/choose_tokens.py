"""The choice of the next tokens of a conversation, from the logits of a rank that has them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from runtime.communication.communicator import Communicator
from runtime.execution.profile import Profiler
from runtime.generation.conversation import Conversation
from runtime.generation.decode_graphs.decoder import Chosen, Decoder
from runtime.generation.generation_options import Settings
from runtime.program.rank_program import RankProgram
from runtime.sampling.sampler import Sampler, history_of
from runtime.sampling.vocabulary_search import require_finite

__all__ = ["GivenTokens", "TokenChooser", "TokensOfSteps"]


class TokenChooser:
    """Calls the sampler as the settings of a request ask; all ranks that have the logits call theirs together."""

    def __init__(
        self,
        program: RankProgram,
        settings: Settings,
        communicator: Communicator,
        device: torch.device,
        profiler: Profiler,
    ) -> None:
        self._settings, self._device = settings, device
        self.sampler = Sampler(
            settings.sampling,
            profiler.watched(communicator),
            vocab_size=program.vocab_size,
            owned=program.vocabulary,
            axis=program.vocabulary_axes,
            device=device,
        )
        self._sample = profiler.timed("sampling", self.sampler)
        self._likeliest = profiler.timed("sampling", self.sampler.likeliest)
        self._is_plain = self.sampler.is_plain and not settings.logprobs
        self._ids: dict[tuple[int, ...], Tensor] = {}
        """Request ids by themselves: those of a group of rows are the same in all steps."""

    def choose(self, logits: Tensor, conversation: Conversation) -> tuple[list[int], list[float] | None]:
        """A token of each row, from logits [B, V/n], and its log-probability where the settings ask for it."""
        edits = conversation.edits()
        if self._is_plain and edits is None:
            return self._likeliest(logits), None
        history, lengths = history_of(self._settings.sampling, conversation.texts, self._device)
        tokens, logprobs = self._sample(
            logits,
            request_ids=self._ids_of(conversation),
            step=conversation.step,
            history=history,
            lengths=lengths,
            edits=edits,
            scored=self._settings.logprobs,
        )
        return tokens.tolist(), None if logprobs is None else logprobs.tolist()

    def _ids_of(self, conversation: Conversation) -> Tensor:
        key = tuple(conversation.request_ids)
        if key not in self._ids:
            self._ids[key] = torch.tensor(key, device=self._device)
        return self._ids[key]


class GivenTokens(TokenChooser):
    """Takes the next token of known texts, by request id, whatever the logits say of it; and its log-probability."""

    def __init__(
        self,
        texts: Sequence[Sequence[int]],
        program: RankProgram,
        settings: Settings,
        communicator: Communicator,
        device: torch.device,
        profiler: Profiler,
    ) -> None:
        super().__init__(program, settings, communicator, device, profiler)
        self._texts = texts

    def choose(self, logits: Tensor, conversation: Conversation) -> tuple[list[int], list[float] | None]:
        so_far = zip(conversation.request_ids, conversation.texts, strict=True)
        tokens = [self._texts[number][len(text)] for number, text in so_far]
        logprobs, _ = self.sampler.top(logits, torch.tensor(tokens, device=self._device), 1)
        return tokens, logprobs[:, 0].tolist()


class TokensOfSteps:
    """Takes the tokens that captured steps have chosen on the device, which run ahead of the host by one.

    decoder: the steps of as many sequences as the conversation has. chooser: who is asked where a row is not certain;
    then the steps begin anew behind its token.
    """

    def __init__(self, decoder: Decoder, chooser: TokenChooser, settings: Settings) -> None:
        self._decoder, self._chooser, self._settings = decoder, chooser, settings
        self._running: Iterator[Chosen] | None = None

    def choose(self, conversation: Conversation) -> tuple[list[int], list[float] | None]:
        """The tokens after those that the conversation has; as `TokenChooser.choose`."""
        if self._running is None:
            self._running = self._begun(conversation)
        said, logits = next(self._running)
        require_finite(said[1])
        certain = said[2].bool().tolist()
        if not all(sure or over for sure, over in zip(certain, conversation.ended, strict=True)):
            self._running = None
            return self._chooser.choose(logits, conversation)
        tokens = [int(token) for token in said[0].tolist()]
        return tokens, said[3].tolist() if self._settings.logprobs else None

    def _begun(self, conversation: Conversation) -> Iterator[Chosen]:
        settings = self._settings
        rows = [
            settings.row_options(text, conversation.step, request_id)
            for request_id, text in zip(conversation.request_ids, conversation.texts, strict=True)
        ]
        piece = conversation.next_piece()
        count = settings.max_new_tokens - conversation.step
        return self._decoder.chain(rows, [row[0] for row in piece.tokens], piece.starts, count)
