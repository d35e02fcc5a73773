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

from partitioner.capture.twin import named_tensors
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
                owner = name.rpartition(".")[0]
                for other, value in _recompute(self.model, owner).items():
                    found.setdefault(other, value)
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


def _recompute(model: PreTrainedModel, owner_path: str) -> dict[str, Tensor]:
    """The non-persistent buffers of one module, by full name; those that stay unset are left on meta."""
    owner = model.get_submodule(owner_path)
    memo: dict[int, object] = {}
    for _, tensor in named_tensors(owner):
        memo[id(tensor)] = tensor  # nothing is written to these: they are flagged as initialised below
    fresh = {name: torch.zeros_like(owner._buffers[name], device="cpu") for name in owner._non_persistent_buffers_set}
    memo.update({id(owner._buffers[name]): value for name, value in fresh.items()})
    shell = copy.copy(owner)
    shell.__dict__ = {key: copy.copy(value) if isinstance(value, dict) else value for key, value in vars(owner).items()}
    shell._parameters = {
        name: None if parameter is None else _Untouchable.of(parameter) for name, parameter in owner._parameters.items()
    }
    shell._buffers = {**owner._buffers, **fresh}
    versions = {name: value._version for name, value in fresh.items()}
    with torch.no_grad(), torch.device("cpu"):
        _nearest_pretrained(model, owner_path)._init_weights(shell)
    prefix = f"{owner_path}." if owner_path else ""
    return {
        prefix + name: shell._buffers[name] if value._version != versions[name] else owner._buffers[name]
        for name, value in fresh.items()
    }


class _Untouchable:
    """Meta stand-ins for parameters, flagged so that transformers' initialisation skips them."""

    @staticmethod
    def of(parameter: Tensor) -> nn.Parameter:
        stand_in = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
        stand_in._is_hf_initialized = True  # type: ignore[attr-defined]
        return stand_in


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
