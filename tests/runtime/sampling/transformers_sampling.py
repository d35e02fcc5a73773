"""The processed logits of transformers' generate, by its own processors in its own order."""

from types import SimpleNamespace

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.utils import GenerationMixin

from runtime.sampling.sampling_options import Sampling

__all__ = ["processed"]


class _Model(GenerationMixin):
    config = SimpleNamespace(is_encoder_decoder=False)


def processed(logits: Tensor, sampling: Sampling, history: Tensor | None = None) -> Tensor:
    """`logits` [B, V] after the processors that `sampling` asks for; `history` [B, L], the tokens so far."""
    history = torch.zeros(len(logits), 0, dtype=torch.int64) if history is None else history
    config = GenerationConfig(
        do_sample=sampling.do_sample,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        typical_p=sampling.typical_p,
        epsilon_cutoff=sampling.epsilon_cutoff,
        eta_cutoff=sampling.eta_cutoff,
        repetition_penalty=sampling.repetition_penalty,
    )
    return _Model()._get_logits_processor(config, input_ids_seq_length=max(1, history.shape[1]))(history, logits)
