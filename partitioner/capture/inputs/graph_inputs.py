"""Which inputs the graph takes: the tokens, and what else the model's forward would otherwise make up by itself.

Positions are passed explicitly wherever forward takes them (an arange of the local length is wrong under a cache, a
ring and a pipeline), unless the model counts differently from 0, 1, 2 (some start after their padding index): the
probe shows that. Models that see the whole text take a padding mask; for decoders, causality already hides padding on
the right.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from partitioner.capture.inputs.probe import Probe, probe
from partitioner.errors import CaptureError

__all__ = ["Example", "choose_inputs", "example_ids"]

BATCH, LENGTH = 3, 37
"""Sizes of the example: primes that no model uses, so that no size equals one of the model's by accident."""

_SHORTER = (29, 23, 19, 13, 7, 5, 3)
"""Other primes."""
_SPARE = 4
"""Rows of a table of positions that are not for tokens: some models count from 2."""


@dataclass(frozen=True)
class Example:
    """The inputs in order, by name: an example of each, what stands in for it, and what the probe found with them.

    masks_by_itself: the token that the model masks where it is given no mask; None: it masks none.
    """

    tensors: dict[str, Tensor]
    defaults: dict[str, str]
    probe: Probe
    masks_by_itself: int | None = None


def choose_inputs(
    fake_model: PreTrainedModel, fake: FakeTensorMode, indices: Mapping[str, Tensor], *, length: int | None
) -> Example:
    """`indices`: the real values of the fake model's integer buffers."""
    accepted = inspect.signature(type(fake_model).forward).parameters
    shape = (BATCH, _length(fake_model) if length is None else length)
    tensors, defaults = {"input_ids": example_ids(fake_model, shape)}, {"input_ids": "required"}
    found = probe(fake_model, tensors, fake, indices)
    if "position_ids" in accepted:
        positions = torch.arange(shape[1]).expand(shape).contiguous()
        # a second run only where the first has not shown that the model counts from 0
        if found.failure is None and found.counted:
            tensors["position_ids"], defaults["position_ids"] = positions, "arange"
        elif _same_lookups(found, explicit := probe(fake_model, {**tensors, "position_ids": positions}, fake, indices)):
            tensors["position_ids"], defaults["position_ids"] = positions, "arange"
            found = explicit
    masks_by_itself = None
    if _sees_the_whole_text(fake_model, found):
        bare = dict(tensors)
        if "attention_mask" in accepted:
            tensors["attention_mask"], defaults["attention_mask"] = torch.ones(shape, dtype=torch.long), "ones"
        found = probe(fake_model, tensors, fake, indices)
        padding = _padding(fake_model)
        if "attention_mask" in accepted and padding is not None:
            ids = tensors["input_ids"].clone()
            ids[:, -2:] = padding
            alone, all_ones = (
                _changes(before, probe(fake_model, {**given, "input_ids": ids}, fake, indices))
                for before, given in ((probe(fake_model, bare, fake, indices), bare), (found, tensors))
            )
            if not all(any(_is_equal(each, other) for other in all_ones) for each in alone):
                masks_by_itself = padding
        if "token_type_ids" in accepted:
            with_types = {**tensors, "token_type_ids": torch.zeros(shape, dtype=torch.long)}
            typed = probe(fake_model, with_types, fake, indices)
            # some want several types per token, and make them up by themselves; or none are something else than zeros
            if _does_the_same(found, typed):
                tensors, defaults["token_type_ids"], found = with_types, "zeros", typed
    return Example(tensors, defaults, found, masks_by_itself)


def example_ids(fake_model: PreTrainedModel, shape: tuple[int, int]) -> Tensor:
    """Token indices [B, S]. Raises `CaptureError` where the model takes none, or does not tell which there are."""
    accepted = inspect.signature(type(fake_model).forward).parameters
    if "input_ids" not in accepted:
        raise CaptureError(
            f"cannot capture {type(fake_model).__name__}: its forward takes no input_ids; "
            f"it takes {', '.join(accepted)}"
        )
    vocabulary = _vocabulary(fake_model)
    # from the upper half: low ones are special (padding) in many models
    return torch.arange(shape[0] * shape[1]).reshape(shape) % max(vocabulary // 2, 1) + vocabulary // 2


def _length(fake_model: PreTrainedModel) -> int:
    """That of the example; where the model has few positions, a prime that they surely suffice for."""
    config = fake_model.config.get_text_config()
    most = config.max_position_embeddings if hasattr(config, "max_position_embeddings") else None
    if not isinstance(most, int) or most >= LENGTH + _SPARE:
        return LENGTH
    return next((length for length in _SHORTER if length + _SPARE <= most), _SHORTER[-1])


def _padding(fake_model: PreTrainedModel) -> int | None:
    """The token that stands for none."""
    config = fake_model.config.get_text_config()
    token = config.pad_token_id if hasattr(config, "pad_token_id") else None
    return token if isinstance(token, int) and 0 <= token < _vocabulary(fake_model) else None


def _changes(before: Probe, after: Probe) -> list[Tensor]:
    """What met a weight in the second run only."""
    return [each for each in after.met if not any(_is_equal(each, other) for other in before.met)]


def _is_equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)


def _vocabulary(fake_model: PreTrainedModel) -> int:
    try:
        weight = fake_model.get_input_embeddings().weight
    except (AttributeError, NotImplementedError):
        weight = None
    if not isinstance(weight, Tensor):
        raise CaptureError(
            f"cannot capture {type(fake_model).__name__}: which token indices it knows is unknown, because its "
            "get_input_embeddings() yields no embedding with a weight; override it to return the token embedding"
        )
    return weight.shape[0]


def _same_lookups(one: Probe, other: Probe) -> bool:
    def same(a: Tensor, b: Tensor) -> bool:
        try:
            a, b = torch.broadcast_tensors(a, b)  # type: ignore[no-untyped-call]
        except RuntimeError:
            return False
        return torch.equal(a, b)

    return len(one.lookups) == len(other.lookups) and all(map(same, one.lookups, other.lookups))


def _does_the_same(found: Probe, given: Probe) -> bool:
    """Whether a run that was given more did what the one before it did by itself, as far as that one went."""
    if found.failure is not None and given.failure is None:
        return True
    return (given.failure is None or found.failure is not None) and _same_lookups(found, given)


def _sees_the_whole_text(fake_model: PreTrainedModel, found: Probe) -> bool:
    known = [kind for kind in found.kinds if kind is not None]
    if known:
        return not any(kind.causal for kind in known)
    return not fake_model.can_generate()
