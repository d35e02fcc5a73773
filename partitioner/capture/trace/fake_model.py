"""The user's model without weights: same modules, own copies of the configs, fake tensors in place of data.

Whatever capture changes (attention implementation, RoPE variant, training flag) it changes on the fake model: the
user's model is never touched and needs no restoring. Fake tensors claim to be on the CPU, whatever the model is on: a
trace over the meta device would lose the values of constants that the model makes on the way.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig, PreTrainedModel

from partitioner.capture.trace.transformers_hooks import IMPLEMENTATIONS
from partitioner.errors import CaptureError

__all__ = ["configs", "make_fake_model", "named_tensors"]


def named_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers under all of their names, tied ones more than once."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def make_fake_model(model: PreTrainedModel, fake: FakeTensorMode) -> PreTrainedModel:
    _require_plain(model)
    memo: dict[int, object] = {}
    for name, tensor in named_tensors(model):
        if id(tensor) in memo:
            continue
        if tensor.is_sparse or tensor.is_quantized:
            raise CaptureError(f"cannot capture {name!r}: only dense, unquantized weights; got {tensor.layout}")
        with fake:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
    kept = list(memo.values())
    try:
        fake_model = copy.deepcopy(model, memo)
    except Exception as error:
        raise CaptureError(
            f"cannot capture {type(model).__name__}: its modules cannot be copied ({type(error).__name__}: {error}); "
            "remove what was attached to the model (hooks, open files, locks) and try again"
        ) from error
    del kept
    fake_model.eval()
    for config in configs(fake_model):
        # ours stand under these names; a kernel of another name computes what torch's own does
        if config._attn_implementation_internal not in IMPLEMENTATIONS:
            config._attn_implementation_internal = "sdpa" if model._supports_sdpa else "eager"
        config._experts_implementation_internal = "eager"
        config.use_cache = False
        config.return_dict = True
    return fake_model


def _require_plain(model: PreTrainedModel) -> None:
    """Raises where a module keeps its weights where no parameter and no buffer shows them."""
    for path, module in model.named_modules():
        packed = [name for name, value in vars(module).items() if isinstance(value, torch.ScriptObject)]
        if packed or isinstance(module, torch.jit.ScriptModule) or type(module).__module__.startswith("torch.ao."):
            kind = f"{type(module).__module__}.{type(module).__qualname__}"
            raise CaptureError(
                f"cannot capture {type(model).__name__}: {path or 'it'} is a {kind}, whose weights are packed or "
                "compiled; required are plain modules, with dense weights as parameters and buffers: give the model "
                "as it was before it was quantised or scripted"
            )


def configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """All configs that the model's modules read, sub-configs included, each once."""
    found: dict[int, PreTrainedConfig] = {}

    def add(config: object) -> None:
        if isinstance(config, PreTrainedConfig) and id(config) not in found:
            found[id(config)] = config
            for value in vars(config).values():
                add(value)

    for module in model.modules():
        for value in vars(module).values():
            add(value)
    return list(found.values())
