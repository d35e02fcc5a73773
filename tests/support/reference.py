"""The model's own output without its float32 detours: attention written out in the dtype of its inputs, HF's own
eager masks.

transformers' eager attention takes its softmax in float32, which costs nine digits in float64. This one is written
from the definition, shares no code with `runtime`, and stands in for it through the same public seam.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.modeling_utils import AttentionInterface


def forward(model: PreTrainedModel, *, exact: bool = True, lifted: bool = False, **inputs: Tensor) -> Tensor:
    """Logits (or the last hidden state) by the model's own code.

    exact: its attention is replaced by the one below; otherwise it is transformers' own, by default sdpa. lifted: its
    casts to float32 (norms, routers) go to float64; without that, a difference in the 16th digit may vanish in a
    cast, or flip its last bit.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(_set(model, "sdpa" if model._supports_sdpa else "eager"))
        if exact:
            stack.enter_context(_attention_in_full_precision())
        if lifted:
            stack.enter_context(_Lifted())
            stack.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(torch.float64)
        output = model(**inputs)
    value = output.get("logits", output.get("last_hidden_state"))
    assert isinstance(value, Tensor)
    return value


def forward_by_token(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """Logits [B, S, V] by the model's own cache, one token at a time; exact and lifted as above."""
    rows, cache = [], {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(_set(model, "sdpa" if model._supports_sdpa else "eager"))
        stack.enter_context(_attention_in_full_precision())
        stack.enter_context(_Lifted())
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float64)
        for token in input_ids.split(1, dim=1):
            output = model(input_ids=token, use_cache=True, **cache)
            cache = {name: output[name] for name in ("past_key_values", "cache_params") if name in output}
            rows.append(output["logits"])
    return torch.cat(rows, dim=1)


class _Lifted(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            return args[0].double()
        args, kwargs = tree_map(lambda leaf: torch.float64 if leaf is torch.float32 else leaf, (args, kwargs or {}))
        return func(*args, **kwargs)


@contextlib.contextmanager
def _set(model: PreTrainedModel, attention: str) -> Iterator[None]:
    configs: dict[int, PreTrainedConfig] = {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, PreTrainedConfig):
                configs[id(value)] = value
    before = [
        (c, c._attn_implementation_internal, c._experts_implementation_internal, vars(c).get("use_cache"))
        for c in configs.values()
    ]
    try:
        for config in configs.values():
            config._attn_implementation_internal = attention
            config._experts_implementation_internal = "eager"
            config.use_cache = False
        yield
    finally:
        for config, old_attention, experts, use_cache in before:
            config._attn_implementation_internal = old_attention
            config._experts_implementation_internal = experts
            config.use_cache = use_cache


@contextlib.contextmanager
def _attention_in_full_precision() -> Iterator[None]:
    """Under the name of the model's own implementation, on which its code may branch; masks as numbers to be added."""
    attention, masks = AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping
    before = attention["sdpa"], masks["sdpa"]
    attention["eager"] = attention["sdpa"] = _attention
    masks["sdpa"] = eager_mask
    try:
        yield
    finally:
        del attention["eager"]
        attention["sdpa"], masks["sdpa"] = before


def _attention(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scaling = kwargs.get("scaling")
    scores = torch.einsum("bhsd,bhtd->bhst", query, key) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if kwargs.get("softcap") is not None:
        scores = kwargs["softcap"] * torch.tanh(scores / kwargs["softcap"])
    if kwargs.get("position_bias") is not None:
        scores = scores + kwargs["position_bias"]
    if attention_mask is not None:
        scores = scores + attention_mask
    elif kwargs.get("is_causal", vars(module).get("is_causal")):  # as sdpa takes it; eager forgets it
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
    sinks = kwargs.get("s_aux") if kwargs.get("sinks") is None else kwargs["sinks"]
    if sinks is not None:
        sinks = sinks.view(1, -1, 1, 1) if sinks.dim() == 1 else sinks
        scores = torch.cat([scores, sinks.expand(*scores.shape[:3], 1)], -1)
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    weights = weights / weights.sum(-1, keepdim=True)
    if sinks is not None:
        weights = weights[..., :-1]
    return torch.einsum("bhst,bhtd->bhsd", weights, value).transpose(1, 2).contiguous(), weights
