"""The choice of the next tokens of a conversation, from the logits of a rank that has them."""

from __future__ import annotations

import torch
from torch import Tensor

from runtime.communication.communicator import Communicator
from runtime.execution.profile import Profiler
from runtime.generation.conversation import Conversation
from runtime.generation.generation_options import Settings
from runtime.program.rank_program import RankProgram
from runtime.sampling.sampler import Sampler

__all__ = ["TokenChooser"]


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

    def choose(self, logits: Tensor, conversation: Conversation) -> tuple[list[int], list[float] | None]:
        """A token of each row, from logits [B, V/n], and its log-probability where the settings ask for it."""
        history, lengths = self._history(conversation.texts)
        tokens, logprobs = self._sample(
            logits,
            request_ids=torch.tensor(conversation.request_ids, device=self._device),
            step=conversation.step,
            history=history,
            lengths=lengths,
            edits=conversation.edits(),
            scored=self._settings.logprobs,
        )
        return tokens.tolist(), None if logprobs is None else logprobs.tolist()

    def _history(self, texts: list[list[int]]) -> tuple[Tensor | None, Tensor | None]:
        """The tokens so far [B, L], of which the first [B] count; only the repetition penalty asks for them."""
        if self._settings.sampling.repetition_penalty == 1:
            return None, None
        lengths = torch.tensor([len(text) for text in texts], device=self._device)
        most = max(map(len, texts))
        return torch.tensor([text + [0] * (most - len(text)) for text in texts], device=self._device), lengths
