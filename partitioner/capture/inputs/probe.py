"""Run the fake model once, eagerly, with real token indices and fake weights: what only a run tells.

Integers (indices, positions, masks) are real tensors and keep their values; whatever meets a weight is fake and costs
no memory or arithmetic. So one forward of any model size takes milliseconds per layer, and mask functions can be
asked about concrete positions, which inside `torch.export` fails on data-dependent guards.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel

from partitioner.capture.layers.probe_layers import ProbedLayers
from partitioner.capture.trace.recognise_masks import MaskKind, recognize
from partitioner.capture.trace.transformers_hooks import installed
from partitioner.errors import CaptureError

__all__ = ["Probe", "probe"]

aten = torch.ops.aten
_LOOKUPS = {aten.embedding.default, aten.index.Tensor, aten.index_select.default, aten.gather.default}


@dataclass
class Probe:
    """What one forward showed."""

    kinds: list[MaskKind | None] = field(default_factory=list)
    """The kind of each mask, in the order in which the model asked for them; None where it is not one we know."""
    lookups: list[Tensor] = field(default_factory=list)
    """The indices of each lookup in a table of weights."""
    met: list[Tensor] = field(default_factory=list)
    """What was made of tokens, positions and masks alone, and then met a weight."""
    counted: bool = True
    """Whether all that met a weight, one number per token, were the tokens themselves or 0, 1, 2 and so on."""
    offset: int = 0
    """How many tokens came before the first one of this run."""
    skipped: frozenset[str] = frozenset()
    """Paths of the layers that were not run, because they do what an earlier one did."""
    changes_weights: bool = False
    """Whether the run wrote to a weight: the next one would not start from what the checkpoint holds."""
    failure: Exception | None = None
    """Why the forward stopped early, if it did: a decision on a value that only real weights have."""

    def __call__(self, **call: Any) -> Tensor | None:
        """The mask seam; see `seams.installed`."""
        plain = call.get("q_offset", 0) == self.offset and call.get("kv_offset", 0) == 0
        self.kinds.append(recognize(call["mask_function"], batch=call["batch_size"]) if plain else None)
        return torch.zeros(call["batch_size"], 1, call["q_length"], call["kv_length"], dtype=call["dtype"])


def _has_real(values: Iterable[Any]) -> bool:
    """Whether some tensor among an op's arguments, or within a list among them, is not fake."""
    for value in values:
        if isinstance(value, Tensor) and not isinstance(value, FakeTensor):
            return True
        if isinstance(value, (list, tuple)) and _has_real(value):
            return True
    return False


def _writes_to_weight(func: Any, args: Any) -> bool:
    """Whether an op changes a parameter; times or over 1, it stays what it is."""
    if not args or not isinstance(args[0], torch.nn.Parameter) or not func._schema.is_mutable:
        return False
    by = args[1] if len(args) > 1 else None
    by = by.item() if isinstance(by, Tensor) and not isinstance(by, FakeTensor) and by.numel() == 1 else by
    return not (func._schema.name in ("aten::mul_", "aten::div_") and by == 1)


class _Mixed(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Real tensors stay real until they meet a fake one."""

    def __init__(self, fake: FakeTensorMode, found: Probe, tokens: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.fake = fake
        self.found = found
        self.known = (tokens, torch.arange(tokens.shape[1]).expand_as(tokens))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if FakeTensor not in types:
            return func(*args, **kwargs)
        if _writes_to_weight(func, args):
            self.found.changes_weights = True
        if func in _LOOKUPS:
            tree_map_only(Tensor, self._note, args[1:])
        if _has_real(args) or _has_real(kwargs.values()):  # most ops of a layer have none
            args, kwargs = tree_map_only(Tensor, self._to_fake, (args, kwargs))
        with self.fake:
            return func(*args, **kwargs)

    def _to_fake(self, tensor: Tensor) -> Tensor:
        if isinstance(tensor, FakeTensor):
            return tensor
        self.found.counted &= self._is_known(tensor)
        self.found.met.append(tensor.clone())
        return self.fake.from_tensor(tensor)

    def _is_known(self, tensor: Tensor) -> bool:
        rows = self.known[0]
        if tensor.dtype == torch.bool or tensor.numel() not in (rows.numel(), rows.shape[1]):
            return True
        values = tensor.reshape(-1, rows.shape[1])
        return any(bool((values == row[: len(values)]).all()) for row in self.known)

    def _note(self, tensor: Tensor) -> None:
        if not isinstance(tensor, FakeTensor) and not tensor.is_floating_point():
            self.found.lookups.append(tensor.clone())


@contextlib.contextmanager
def _replaced(fake_model: PreTrainedModel, buffers: Mapping[str, Tensor]) -> Iterator[None]:
    owners = [(fake_model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in buffers]
    before = [owner._buffers[name] for owner, name in owners]
    try:
        for (owner, name), value in zip(owners, buffers.values(), strict=True):
            owner._buffers[name] = value.cpu()
        yield
    finally:
        for (owner, name), value in zip(owners, before, strict=True):
            owner._buffers[name] = value


def probe(
    fake_model: PreTrainedModel,
    inputs: Mapping[str, Any],
    fake: FakeTensorMode,
    indices: Mapping[str, Tensor],
    *,
    offset: int = 0,
) -> Probe:
    """Run the fake model on `inputs`; `indices` are the real values of its integer buffers, by name."""
    found = Probe(offset=offset)
    layers = ProbedLayers(fake_model, fake, lambda: len(found.kinds))
    with installed(found), torch.no_grad(), _replaced(fake_model, indices), _Mixed(fake, found, inputs["input_ids"]):
        try:
            with layers.wrapped():
                fake_model(**inputs)
        except Exception as error:  # what was seen up to here still counts; the trace gives the reason if it matters
            found.failure = error
    found.skipped = frozenset(layers.skipped)
    if found.changes_weights:
        raise CaptureError(
            f"cannot capture {type(fake_model).__name__}: its first run changes its own weights, so that those of a "
            "checkpoint are not what it computes with: load it, run it once, and give the model instead of the folder"
        )
    return found
