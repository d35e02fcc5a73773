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

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from partitioner.errors import CaptureError, WeightError
from partitioner.storage.checkpoint.quantized_compressed import compressed
from partitioner.storage.checkpoint.quantized_finder import FLOAT8, SCALES, Finder, Quantized, said
from partitioner.storage.json_fields import read_fields
from runtime.weights.quantized.packed import Packed
from runtime.weights.safetensors_files import TensorFiles

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
    for name in found.packed:
        if name in files.entries and name not in found.used:
            codes = found.packed[name].parts["codes"]
            raise WeightError(
                f"{where} holds {name!r} twice: as {said(files.entries[name])}, and quantised as {codes!r}; which of "
                "them the model was saved with is not said: remove the other one"
            )
    for name, entry in files.entries.items():
        if name not in found.used and entry.dtype in (*FLOAT8, torch.float8_e8m0fnu):
            raise WeightError(
                f"{where}: {name!r} is stored as {said(entry)} and has no scales: required is a tensor such as "
                f"{name + '_scale_inv'!r}, or one of 16 bits or more; the checkpoint is incomplete"
            )
    return found


def _fp8(finder: Finder) -> None:
    block = finder.block_of("weight_block_size", [128, 128])  # transformers' default too
    blocks = [] if block is None else [block]
    for name in finder.ending("_scale_inv"):
        _fp8_matrix(finder, name, name + "_scale_inv", blocks)
    for suffix in (".scale", ".qscale_weight"):
        for owner in finder.ending(suffix):
            codes = finder.files.entries.get(f"{owner}.weight")
            if codes is not None and codes.dtype in FLOAT8:
                _fp8_matrix(finder, codes.name, owner + suffix, blocks)
    finder.unused(".activation_scale", ".input_scale", ".qscale_act")


def _fp8_matrix(finder: Finder, name: str, scales: str, blocks: Sequence[tuple[int, int]]) -> None:
    if finder.get(name, name).dtype == torch.int8:  # transformers takes these for two codes of 4 bits in a byte
        raise CaptureError(
            f"{finder.where}: {name!r} holds bytes that are no float8, FP4 in pairs: these cannot be read by parts "
            "beside FP8; dequantise the model and save that"
        )
    finder.scaled(name, scales, blocks, torch.float32)


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
    # the newer name counts where the older one is not there
    finder.one_of("format" if finder.fields.get("version") is None else "version", "gemm", ("gemm",))
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
    is_ordered = _has_activation_order(finder.fields)
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
        finder.found.add(finder.ordered(packed, f"{owner}.g_idx", is_needed=is_ordered and groups > 1))
    for suffix in (".qzeros", ".scales"):
        for owner in finder.ending(suffix):
            if f"{owner}{'.qzeros'}" in finder.files.entries:
                finder.get(f"{owner}.qweight", f"{owner}.weight")


def _has_activation_order(fields: Mapping[str, Any]) -> bool:
    """Whether columns are not in the groups that their places tell, in all modules or in those of `dynamic`."""
    own = fields.get("dynamic")
    others = [each for each in own.values() if isinstance(each, dict)] if isinstance(own, dict) else []
    return any(each.get("desc_act") is True for each in (fields, *others))


METHODS: dict[str, Callable[[Finder], None]] = {
    "fp8": _fp8,
    "compressed-tensors": compressed,
    "mxfp4": _mxfp4,
    "awq": _awq,
    "gptq": _gptq,
}
