"""Which tensors of a quantised checkpoint belong together, by the names and shapes that its method gives them.

    method              stored                                                   stands for
    fp8                 X (float8), X_scale_inv; or Y.weight, Y.scale            X
    compressed-tensors  Y.weight, Y.weight_scale; or Y.weight_packed, ...        Y.weight
    mxfp4               X_blocks, X_scales                                       X, transposed
    awq, gptq           Y.qweight, Y.qzeros, Y.scales, Y.g_idx                   Y.weight

What is stored as it is computed with stays as it is: the files say so, whatever a list of modules that were not
converted says. So a model's own code meets the tensors that it would meet without quantisation. Shapes are checked
against each other here; numbers are read only where they decide what is read of others (activation order, true shapes).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Set
from pathlib import Path
from typing import Any

import torch

from partitioner.errors import CaptureError, WeightError
from partitioner.storage.checkpoint.quantized_finder import FLOAT8, SCALES, Finder, Quantized, said
from partitioner.storage.json_fields import read_fields
from runtime.weights.quantized.packed import Packed
from runtime.weights.safetensors_files import TensorFiles

_COMPRESSED = (
    "dense", "float-quantized", "int-quantized", "mixed-precision", "mxfp8-quantized", "naive-quantized",
    "pack-quantized",
)  # fmt: skip

__all__ = ["METHODS", "Quantized", "checkpoint_files", "find_quantized", "quantization_fields"]


def quantization_fields(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The quantization_config of a config.json, its own or its text model's; None: it has none."""
    inner = config.get("text_config")
    for fields in (config, inner if isinstance(inner, dict) else {}):
        found = fields.get("quantization_config")
        if found is not None:
            return found if isinstance(found, dict) else {"quant_method": found}
    return None


def checkpoint_files(folder: str | Path) -> TensorFiles:
    """The files of a checkpoint folder, with what is quantised in them."""
    files = TensorFiles(folder)
    config = Path(folder) / "config.json"
    found = quantization_fields(read_fields(config)) if config.is_file() else None
    if found is not None:
        files.packed = find_quantized(files, found, str(folder)).packed
    return files


def find_quantized(files: TensorFiles, fields: Mapping[str, Any], where: str) -> Quantized:
    """The quantised tensors of `files`; `fields`: the quantization_config. Names are those of the files.

    Raises `CaptureError` where the method is none that can be read, `WeightError` where tensors do not fit each other.
    """
    method = str(fields.get("quant_method"))[:100]
    if method not in METHODS:
        how = "dequantise it and save that"
        if method == "bitsandbytes":
            how = "load it by from_pretrained on a GPU, call model.dequantize(), and save that with save_pretrained"
        raise CaptureError(
            f"{where} is quantised by {method!r}, which cannot be read by parts; those that can: {', '.join(METHODS)}; "
            f"{how}"
        )
    found = Quantized()
    METHODS[method](Finder(files, fields, where, found))
    for name, entry in files.entries.items():
        if name not in found.used and entry.dtype in (*FLOAT8, torch.float8_e8m0fnu):
            raise WeightError(
                f"{where}: {name!r} is stored as {said(entry)} and has no scales: required is a tensor such as "
                f"{name + '_scale_inv'!r}, or one of 16 bits or more; the checkpoint is incomplete"
            )
    return found


def _fp8(finder: Finder) -> None:
    blocks = _given(finder.block_of("weight_block_size", [128, 128]))  # transformers' default too
    for name in finder.ending("_scale_inv"):
        finder.scaled(name, name + "_scale_inv", blocks, torch.float32)
    for suffix in (".scale", ".qscale_weight"):
        for owner in finder.ending(suffix):
            codes = finder.files.entries.get(f"{owner}.weight")
            if codes is not None and codes.dtype in FLOAT8:
                finder.scaled(codes.name, owner + suffix, blocks, torch.float32)
    finder.unused(".activation_scale", ".input_scale", ".qscale_act")


def _given(*blocks: tuple[int, int] | None) -> tuple[tuple[int, int], ...]:
    return tuple(block for block in blocks if block is not None)


def _compressed(finder: Finder) -> None:
    for name in ("sparsity_config", "transform_config"):
        given = finder.fields.get(name)
        if given and (not isinstance(given, dict) or given.get("format", "") != "dense"):
            raise CaptureError(
                f"{finder.where}: weights with a {name} cannot be read by parts; dequantise the model and save that"
            )
    groups = finder.fields.get("config_groups", {})
    groups = list(groups.values()) if isinstance(groups, dict) else []
    weights = [
        group["weights"] for group in groups if isinstance(group, dict) and isinstance(group.get("weights"), dict)
    ]
    for form in (finder.fields.get("format"), *(group.get("format") for group in groups if isinstance(group, dict))):
        if form is not None and form not in _COMPRESSED:
            raise CaptureError(
                f"{finder.where}: compressed-tensors of format {str(form)[:100]!r}; those that can be read by parts: "
                f"{', '.join(_COMPRESSED)}; dequantise the model and save that"
            )
    structures = {finder.pair(each.get("block_structure"), "block_structure") for each in weights}
    blocks = _given(*sorted(structures - {None}))  # type: ignore[type-var]
    sizes = {finder.integer(each, "group_size", -1) for each in weights if each.get("group_size") is not None} - {-1}
    packed = finder.ending(".weight_packed")
    if packed:
        for each in weights:
            if each.get("type") == "int" and each.get("num_bits") != 8:
                finder.four_bits(each, "num_bits")
    has_zeros = bool(weights) and all(each.get("symmetric") is False for each in weights)
    for owner in packed:
        _compressed_words(finder, owner, sizes, has_zeros=has_zeros)
    for owner in finder.ending(".weight_scale"):
        if f"{owner}.weight_packed" not in finder.files.entries:
            if f"{owner}.weight_zero_point" in finder.files.entries:
                raise CaptureError(
                    f"{finder.where}: {owner + '.weight_zero_point'!r}: codes of a byte with zero points cannot be "
                    "read by parts; dequantise the model and save that"
                )
            finder.scaled(f"{owner}.weight", f"{owner}.weight_scale", blocks, None)
    finder.unused(".input_scale", ".input_zero_point", ".output_scale", ".input_global_scale")
    finder.unused(".k_scale", ".v_scale")


def _compressed_words(finder: Finder, owner: str, sizes: Set[int], *, has_zeros: bool) -> None:
    """`sizes`: of the groups that the configuration has; several where its modules differ. has_zeros: whether all have
    zero points.
    """
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
    finder.require(
        rows == codes.shape[0] > 0 and cols > 0 and -(-cols // 8) == codes.shape[1],
        codes,
        f"int32 of {[rows, cols]} codes, eight a word, as {true_shape.name!r} says",
    )
    groups = scales.shape[1] if len(scales.shape) == 2 else 0
    fitting = [size for size in sizes if -(-cols // size) == groups] or ([cols] if groups == 1 else [])
    finder.require(
        scales.dtype in SCALES and scales.shape[:1] == (rows,) and len(fitting) == 1,
        scales,
        f"scales of 16 or 32 bits, {rows} rows with one for each group of the {cols} columns, of "
        f"{' or '.join(map(str, sorted(sizes))) or cols}",
    )
    parts = {"codes": codes.name, "scales": scales.name}
    if has_zeros or f"{owner}.weight_zero_point" in finder.files.entries:
        zeros = finder.get(f"{owner}.weight_zero_point", name)
        finder.require(
            zeros.dtype == torch.int32 and zeros.shape == (-(-rows // 8), groups),
            zeros,
            f"int32 {[-(-rows // 8), groups]}",
        )
        parts["zeros"] = zeros.name
    packed = Packed(name, "packed", (rows, cols), parts, (1, fitting[0]), scales.dtype)
    finder.found.add(_ordered(finder, packed, f"{owner}.weight_g_idx"), true_shape.name)


def _mxfp4(finder: Finder) -> None:
    for name in finder.ending("_blocks"):
        codes, scales = finder.get(f"{name}_blocks", name), finder.get(f"{name}_scales", name)
        finder.require(
            codes.dtype == torch.uint8 and len(codes.shape) >= 3 and codes.shape[-1] == 16 and 0 not in codes.shape,
            codes,
            "uint8 [.., rows, groups, 16]",
        )
        finder.require(
            scales.dtype == torch.uint8 and scales.shape == codes.shape[:-1], scales, f"uint8 {list(codes.shape[:-1])}"
        )
        shape = (*codes.shape[:-2], codes.shape[-2] * 32)
        finder.found.add(Packed(name, "mxfp4", shape, {"codes": codes.name, "scales": scales.name}, (1, 32)))
        finder.found.turned.add(name)
    for name in finder.ending("_scales"):
        finder.get(f"{name}_blocks", name)


def _awq(finder: Finder) -> None:
    finder.four_bits(finder.fields, "bits")
    finder.one_of("version", "gemm", ("gemm", "GEMM"))
    if finder.fields.get("zero_point", True) is not True:
        raise CaptureError(f"{finder.where}: AWQ without zero points cannot be read by parts; dequantise it, save that")
    _words(finder, "awq", in_rows=False)


def _gptq(finder: Finder) -> None:
    finder.four_bits(finder.fields, "bits")
    known = ("gptq", "gptq_v2")
    form = finder.one_of("checkpoint_format", finder.one_of("format", "gptq", known), known)
    if finder.fields.get("is_marlin_format"):
        raise CaptureError(
            f"{finder.where}: GPTQ in marlin's order cannot be read by parts; take the checkpoint from before it was "
            "rearranged, or dequantise it and save that"
        )
    _words(finder, form, in_rows=True)


def _words(finder: Finder, form: str, *, in_rows: bool) -> None:
    """Linears of codes in words of eight; `in_rows`: of eight inputs of one output, else of eight outputs.

    Where the configuration has other sizes of groups for some modules (`dynamic`), the shapes say which.
    """
    size, differs = finder.integer(finder.fields, "group_size", 128), bool(finder.fields.get("dynamic"))
    for owner in finder.ending(".qweight"):
        name = f"{owner}.weight"
        codes, zeros, scales = (finder.get(f"{owner}.{role}", name) for role in ("qweight", "qzeros", "scales"))
        finder.require(
            codes.dtype == torch.int32 and len(codes.shape) == 2 and 0 not in codes.shape, codes, "int32 [K, N]"
        )
        if differs and len(zeros.shape) == len(scales.shape) == 2 and zeros.shape[1] * 8 > scales.shape[1] + 7:
            bits = zeros.shape[1] * 32 // max(scales.shape[1], 1)
            raise CaptureError(
                f"{finder.where}: {codes.name!r} is quantised to {bits} bits, other modules to 4: only 4 bits can be "
                "read by parts; dequantise it and save that"
            )
        cols, rows = (codes.shape[0] * 8, codes.shape[1]) if in_rows else (codes.shape[0], codes.shape[1] * 8)
        group = cols if size == -1 else size
        if differs and len(scales.shape) == 2 and scales.shape[0] and cols % scales.shape[0] == 0:
            group = cols // scales.shape[0]
        groups = -(-cols // group)
        finder.require(
            scales.dtype in SCALES and scales.shape == (groups, rows),
            scales,
            f"float16 {[groups, rows]}, as group_size is {size} and {codes.name!r} {said(codes)}",
        )
        words = (groups, -(-rows // 8))
        finder.require(zeros.dtype == torch.int32 and zeros.shape == words, zeros, f"int32 {list(words)}")
        parts = {"codes": codes.name, "zeros": zeros.name, "scales": scales.name}
        packed = Packed(name, form, (rows, cols), parts, (1, group), scales.dtype)
        finder.found.add(_ordered(finder, packed, f"{owner}.g_idx"))
    for suffix in (".qzeros", ".scales"):
        for owner in finder.ending(suffix):
            if f"{owner}{'.qzeros'}" in finder.files.entries:
                finder.get(f"{owner}.qweight", f"{owner}.weight")


def _ordered(finder: Finder, packed: Packed, groups: str) -> Packed:
    """With the group of each column, if a part tells it and it is another than that of its place."""
    if groups not in finder.files.entries:
        return packed
    entry = finder.get(groups, packed.name)
    cols, size = packed.shape[-1], packed.block[1]
    finder.require(
        entry.dtype in (torch.int32, torch.int64) and entry.shape == (cols,),
        entry,
        f"int32 {[cols]}, a group per column",
    )
    finder.found.used.add(groups)
    given = finder.numbers(entry)
    if torch.equal(given, torch.arange(cols) // size):
        return packed
    most = packed.grid[-1]
    finder.require(
        0 <= int(given.min()) <= int(given.max()) < most,
        entry,
        f"groups from 0 to {most - 1}, got {given.min()} to {given.max()}",
    )
    return dataclasses.replace(packed, groups=given)


METHODS: dict[str, Callable[[Finder], None]] = {
    "fp8": _fp8,
    "compressed-tensors": _compressed,
    "mxfp4": _mxfp4,
    "awq": _awq,
    "gptq": _gptq,
}
