"""The weights by canonical name, and the values of those that no checkpoint holds.

Tied weights are one tensor under several names; the canonical one is the name under which transformers saves it.
Buffers that are not saved ("non-persistent": rotary frequencies, position tables) have no values in a model built on
the meta device; they are recomputed as `from_pretrained` does it, by the model's own `_init_weights` on a copy of the
one module that owns them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from partitioner.capture.trace.fake_model import named_tensors
from partitioner.errors import CaptureError, WeightError

__all__ = ["ModelWeights"]


class ModelWeights:
    """All parameters and buffers of a model: `canonical[name]`, `aliases[canonical name]` and their data."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.computed = {name for name, _ in _non_persistent(model)}
        dropped = set(model.all_tied_weights_keys)  # the names that save_pretrained leaves out
        names: dict[int, list[str]] = {}
        self._tensors: dict[str, Tensor] = {}
        for name, tensor in named_tensors(model):
            names.setdefault(id(tensor), []).append(name)
            self._tensors[name] = tensor
        self.canonical: dict[str, str] = {}
        self.aliases: dict[str, tuple[str, ...]] = {}
        for group in names.values():
            chosen = next((name for name in group if name not in dropped), group[0])
            self.aliases[chosen] = tuple(name for name in group if name != chosen)
            self.canonical.update(dict.fromkeys(group, chosen))

    def fix(self, name: str, value: Tensor) -> None:
        """From now on the computed buffer `name` has this value."""
        name = self.canonical[name]
        self._tensors[name] = value.to(self._tensors[name].dtype)

    def source(self, name: str) -> str:
        return "computed" if name in self.computed else "checkpoint"

    def indices(self) -> dict[str, Tensor]:
        """The computed integer buffers whose values can be had."""
        found = {}
        for name in self.computed:
            if not self._tensors[name].is_floating_point() and not self._tensors[name].is_complex():
                try:
                    found.update(self.data([self.canonical[name]]))
                except WeightError:
                    continue  # only an error where the graph turns out to need it
        return found

    def data(self, names: Mapping[str, object] | list[str]) -> dict[str, Tensor]:
        """The tensors of these canonical names; computed ones always with values."""
        found: dict[str, Tensor] = {}
        for name in names:
            if name in found:
                continue
            tensor = self._tensors[name].detach()
            if tensor.is_meta and name in self.computed:
                found[name] = tensor
                path = name.rpartition(".")[0]
                # usually a module fills its own buffers; sometimes the model around it does
                while found[name].is_meta:
                    found.update(_recompute(self.model, path))
                    if not path:
                        break
                    path = path.rpartition(".")[0]
            else:
                found[name] = tensor
        for name in names:
            if name in self.computed and found[name].is_meta:
                raise WeightError(
                    f"cannot compute {name!r}: it is not in checkpoints, the model is on the meta device and its own "
                    "initialisation leaves it unset; capture the model with its weights loaded instead"
                )
        return {name: found[name] for name in names}


def _non_persistent(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for path, module in model.named_modules(remove_duplicate=False):
        for name in module._non_persistent_buffers_set:
            if module._buffers.get(name) is not None:
                yield (f"{path}.{name}" if path else name), module


def _recompute(model: PreTrainedModel, path: str) -> dict[str, Tensor]:
    """The non-persistent buffers that the module's own initialisation sets, in it or below it, by full name."""
    module = model.get_submodule(path)
    prefix = f"{path}." if path else ""
    fresh: dict[str, Tensor] = {}
    memo: dict[int, object] = {id(tensor): _untouchable(tensor) for _, tensor in named_tensors(module)}
    for name, owner in _non_persistent(module):
        buffer = owner._buffers[name.rpartition(".")[2]]
        assert buffer is not None
        fresh[name] = torch.zeros_like(buffer, device="cpu")
        memo[id(buffer)] = fresh[name]
    shell = copy.deepcopy(module, memo)
    versions = {name: value._version for name, value in fresh.items()}
    with torch.no_grad(), torch.device("cpu"):
        _nearest_pretrained(model, path)._init_weights(shell)
    return {prefix + name: value for name, value in fresh.items() if value._version != versions[name]}


def _untouchable(tensor: Tensor) -> Tensor:
    """A stand-in on meta, flagged so that transformers' initialisation skips it."""
    empty = torch.empty_like(tensor, device="meta")
    recording_tensor = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
    recording_tensor._is_hf_initialized = True  # type: ignore[attr-defined]
    return recording_tensor


def _nearest_pretrained(model: PreTrainedModel, path: str) -> PreTrainedModel:
    nearest, module = model, model
    for part in path.split(".") if path else ():
        module = getattr(module, part)
        nearest = module if isinstance(module, PreTrainedModel) else nearest
    return nearest


def check_constant(name: str, value: Tensor) -> Tensor:
    if value.is_meta:
        raise CaptureError(
            f"cannot capture the constant {name!r}: the model was built on the meta device and keeps it neither as a "
            "parameter nor as a buffer, so its values are lost; capture the model with its weights loaded instead"
        )
    return value
