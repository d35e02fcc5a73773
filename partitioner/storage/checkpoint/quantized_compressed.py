"""What compressed-tensors has written: which tensors belong together, and which scheme of the configuration they have.

    Y.weight_packed, Y.weight_scale, Y.weight_shape, ...     4 bits, eight codes in a word
    Y.weight, Y.weight_scale                                 a code in a byte

`config_groups` holds the schemes. A module has that of the first target with its name, else of the first regular
expression that its name begins with, else of its class (`compressed_tensors.utils.match`). Classes are not known here:
where several schemes are left, the shapes tell which is meant, or the tensor is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from partitioner.errors import CaptureError
from partitioner.storage.checkpoint.quantized_finder import FLOAT8, SCALES, Finder
from runtime.weights.quantized.packed import Packed

__all__ = ["compressed"]

_FORMATS = (
    "dense", "float-quantized", "int-quantized", "mixed-precision", "mxfp8-quantized", "naive-quantized",
    "pack-quantized",
)  # fmt: skip
_PATTERN, _ANY = "re:", "Linear"
_ORDERED = (True, "group", "dynamic")
"""Values of `actorder` with which columns of a group do not lie together."""


@dataclass(frozen=True)
class _Scheme:
    """How the weights of some modules are quantised. block: rows and columns of one scale, 0 for all of them."""

    bits: int
    kind: str
    block: tuple[int, int]
    is_symmetric: bool
    is_ordered: bool

    @classmethod
    def of(cls, finder: Finder, fields: Mapping[str, Any]) -> _Scheme:
        return cls(
            finder.integer(fields, "num_bits", 8),
            str(fields.get("type", "int")).lower(),
            _scaled_together(finder, fields),
            fields.get("symmetric", True) is not False,
            fields.get("actorder") in _ORDERED,
        )


def _scaled_together(finder: Finder, fields: Mapping[str, Any]) -> tuple[int, int]:
    block = finder.pair(fields.get("block_structure"), "block_structure")
    size = -1 if fields.get("group_size") is None else finder.integer(fields, "group_size", -1)
    strategy = fields.get("strategy")
    if strategy is None:
        strategy = "block" if block else "group" if size > 0 else "tensor" if fields.get("group_size") is None else ""
    found = {
        "tensor": (0, 0),
        "channel": (1, 0),
        "": (1, 0),
        "group": (1, size) if size > 0 else None,
        "block": block,
    }.get(str(strategy).lower())
    if found is None:
        raise CaptureError(
            f"{finder.where}: weights with the strategy {str(strategy)[:100]!r}, group_size "
            f"{fields.get('group_size')} and block_structure {str(block)[:100]} cannot be read by parts; those that "
            "can: tensor, channel, group, block; dequantise the model and save that"
        )
    return found


class _Schemes:
    """Those of `config_groups`, by their targets."""

    def __init__(self, finder: Finder) -> None:
        self._where = finder.where
        self._found: list[tuple[str, _Scheme]] = []
        for group in _groups(finder):
            if isinstance(group.get("weights"), dict):
                scheme, targets = _Scheme.of(finder, group["weights"]), group.get("targets")
                self._found += [(str(target), scheme) for target in (targets if isinstance(targets, list) else [_ANY])]

    def of(self, owner: str, *, bits: int | None, kind: str) -> list[_Scheme]:
        """Those that a module may have, whose codes are of that kind; all that there are where none fits."""
        if named := [scheme for target, scheme in self._found if target == owner]:
            return named[-1:]
        for target, scheme in sorted(self._found, key=lambda pair: pair[0]):
            if target.startswith(_PATTERN) and self._matches(target.removeprefix(_PATTERN), owner):
                return [scheme]
        # classes are written with a capital
        rest = [scheme for target, scheme in self._found if target[:1].isupper()]
        found = list(dict.fromkeys(rest or [scheme for _, scheme in self._found]))
        return [each for each in found if each.kind == kind and bits in (None, each.bits)] or found

    def _matches(self, pattern: str, owner: str) -> bool:
        try:
            return re.match(pattern, owner) is not None
        except re.error as error:
            raise CaptureError(
                f"{self._where}: the target {pattern[:100]!r} in config_groups of quantization_config is no regular "
                f"expression: {error}"
            ) from error


def _groups(finder: Finder) -> list[dict[str, Any]]:
    groups = finder.fields.get("config_groups")
    return [group for group in groups.values() if isinstance(group, dict)] if isinstance(groups, dict) else []


def compressed(finder: Finder) -> None:
    """Finds them; see the module's docstring."""
    for name in ("sparsity_config", "transform_config"):
        given = finder.fields.get(name)
        if given and (not isinstance(given, dict) or given.get("format", "") != "dense"):
            raise CaptureError(
                f"{finder.where}: weights with a {name} cannot be read by parts; dequantise the model and save that"
            )
    for form in (finder.fields.get("format"), *(group.get("format") for group in _groups(finder))):
        if form is not None and form not in _FORMATS:
            raise CaptureError(
                f"{finder.where}: compressed-tensors of format {str(form)[:100]!r}; those that can be read by parts: "
                f"{', '.join(_FORMATS)}; dequantise the model and save that"
            )
    schemes = _Schemes(finder)
    for owner in finder.ending(".weight_packed"):
        _words(finder, owner, schemes.of(owner, bits=4, kind="int"))
    for owner in finder.ending(".weight_scale"):
        if f"{owner}.weight_packed" not in finder.files.entries:
            _bytes(finder, owner, schemes)
    finder.unused(".input_scale", ".input_zero_point", ".output_scale", ".input_global_scale")
    finder.unused(".k_scale", ".v_scale")


def _bytes(finder: Finder, owner: str, schemes: _Schemes) -> None:
    name = f"{owner}.weight"
    zeros = f"{owner}.weight_zero_point"
    codes = finder.get(name, name)
    kind = "float" if codes.dtype in FLOAT8 else "int"
    own = schemes.of(owner, bits=None, kind=kind)
    if zeros in finder.files.entries or (own and not any(scheme.is_symmetric for scheme in own)):
        raise CaptureError(
            f"{finder.where}: {zeros!r}: codes of a byte with zero points cannot be read by parts; dequantise the "
            "model and save that"
        )
    finder.require(
        not own or codes.dtype not in (*FLOAT8, torch.int8) or any(scheme.kind == kind for scheme in own),
        codes,
        f"codes of the type {own[0].kind if own else kind!r}, as config_groups says",
    )
    finder.scaled(name, f"{owner}.weight_scale", [scheme.block for scheme in own], None, is_complete=bool(own))


def _words(finder: Finder, owner: str, schemes: Sequence[_Scheme]) -> None:
    """`schemes`: those that it may have."""
    name = f"{owner}.weight"
    if f"{owner}.weight_global_scale" in finder.files.entries:
        raise CaptureError(
            f"{finder.where}: {owner + '.weight_global_scale'!r}: NVFP4 cannot be read by parts; dequantise the "
            "model and save that"
        )
    codes, scales = finder.get(f"{owner}.weight_packed", name), finder.get(f"{owner}.weight_scale", name)
    true_shape = finder.get(f"{owner}.weight_shape", name)
    finder.require(codes.dtype == torch.int32 and len(codes.shape) == 2, codes, "a matrix of int32")
    finder.require(
        true_shape.shape == (2,) and true_shape.dtype in (torch.int32, torch.int64), true_shape, "two whole numbers"
    )
    rows, cols = map(int, finder.numbers(true_shape))
    if cols > 0 and codes.shape[1] == -(-cols // 4) != -(-cols // 8):
        raise CaptureError(
            f"{finder.where}: {codes.name!r} holds codes of 8 bits in words: only 4 bits can be read so by parts; "
            "dequantise the model and save that"
        )
    for scheme in schemes:
        if (scheme.bits, scheme.kind) != (4, "int"):
            raise CaptureError(
                f"{finder.where}: {codes.name!r} is quantised to {scheme.bits} bits of the type {scheme.kind!r}, says "
                "config_groups: only integers of 4 bits can be read so by parts; dequantise the model and save that"
            )
    finder.require(
        rows == codes.shape[0] > 0 and cols > 0 and -(-cols // 8) == codes.shape[1],
        codes,
        f"int32 of {[rows, cols]} codes, eight a word, as {true_shape.name!r} says",
    )
    groups = scales.shape[1] if len(scales.shape) == 2 else 0
    sizes = {scheme.block[1] or cols for scheme in schemes} or {cols}
    fitting = [size for size in sizes if -(-cols // size) == groups]
    finder.require(
        scales.dtype in SCALES and scales.shape[:1] == (rows,) and len(fitting) == 1,
        scales,
        f"scales of 16 or 32 bits, {rows} rows with one for each group of the {cols} columns, of "
        f"{' or '.join(map(str, sorted(sizes)))}",
    )
    parts = {"codes": codes.name, "scales": scales.name}
    has_zeros = f"{owner}.weight_zero_point" in finder.files.entries
    # where it may have them, one that lacks them is not told from one that has lost them
    if has_zeros or not all(scheme.is_symmetric for scheme in schemes):
        zeros = finder.get(f"{owner}.weight_zero_point", name)
        finder.require(
            not schemes or not all(scheme.is_symmetric for scheme in schemes),
            zeros,
            "no zero points, as config_groups says symmetric",
        )
        finder.require(
            zeros.dtype == torch.int32 and zeros.shape == (-(-rows // 8), groups),
            zeros,
            f"int32 {[-(-rows // 8), groups]}",
        )
        parts["zeros"] = zeros.name
    packed = Packed(name, "packed", (rows, cols), parts, (1, fitting[0]), scales.dtype)
    is_ordered = any(scheme.is_ordered for scheme in schemes) and groups > 1
    # -1: there is no order
    ordered = finder.ordered(packed, f"{owner}.weight_g_idx", is_needed=is_ordered, least=-1)
    finder.found.add(ordered, true_shape.name)
