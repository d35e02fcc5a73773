"""A bundle as something to partition: its model without weights, and where its weights lie."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from partitioner.errors import BundleError
from partitioner.storage.bundle.bundle import Bundle
from partitioner.storage.bundle.format.model_config import require_plain
from partitioner.storage.bundle.held_slices import require_described
from partitioner.storage.bundle.reshard_origins import SliceOrigins
from partitioner.storage.named_model import load_model

__all__ = ["ReshardModel", "open_bundle"]


@dataclass(frozen=True)
class ReshardModel:
    """`model`: on the meta device; `origins`: where its weights lie among the slices of the bundle's ranks."""

    model: PreTrainedModel
    origins: SliceOrigins
    max_length: int | None
    fixed_length: int | None


def open_bundle(bundle: Bundle) -> ReshardModel:
    """Checks all of the bundle first: parts of what has one digest as a whole cannot be checked by themselves."""
    if bundle.manifest.checkpoint:
        raise BundleError(f"the weights of {bundle.folder.path} are in a checkpoint: partition that instead")
    bundle.verify()
    for number in range(bundle.mesh.world_size):
        require_described(bundle.entry("text", number), str(bundle.folder.path))
    held = bundle.held()
    stored = [each for rank in range(bundle.mesh.world_size) for each in bundle.stored(rank)]
    require_plain(bundle.read("model/config.json"), str(bundle.folder.path / "model/config.json"))
    with bundle.model_folder() as folder:
        model = load_model(str(folder), dtype=torch.float32, meta=True)
    if type(model).__name__ != bundle.manifest.model_class:
        raise BundleError(
            f"{bundle.folder.path} was made from a {bundle.manifest.model_class}, which transformers does not have: "
            "partition the model itself instead"
        )
    named = model.config.architectures
    if named and bundle.manifest.model_class not in named:
        raise BundleError(
            f"{bundle.folder.path}: model/config.json names {str(named)[:100]}, and the manifest "
            f"{bundle.manifest.model_class}: the bundle was altered; partition the model itself instead"
        )
    _give_dtypes(
        model,
        {each.shard.name: each.shard.dtype for each in stored} | {e.of.weight.name: e.of.weight.dtype for e in held},
    )
    if model.can_generate():
        rank = bundle.rank(0)
        model.generation_config = GenerationConfig(eos_token_id=list(rank.eos_token_id) or None, **rank.generation)
    manifest = bundle.manifest
    origins = SliceOrigins(stored, bundle.files(stored), held, mapped=bundle.mapped)
    return ReshardModel(model.eval(), origins, manifest.max_length, manifest.fixed_length)


def _give_dtypes(model: nn.Module, dtypes: dict[str, torch.dtype]) -> None:
    """Every parameter and buffer in the dtype in which it is stored: a model may keep some of its own."""
    for path, module in model.named_modules(remove_duplicate=False):
        for own in (module._parameters, module._buffers):
            for name, tensor in own.items():
                dtype = dtypes.get(f"{path}.{name}" if path else name)
                if tensor is not None and dtype is not None:
                    tensor.data = tensor.data.to(dtype)
