"""Checkpoints as they are released: a folder of save_pretrained, its linears quantised by the formats' own rules.

    quantise(folder, target, "fp8")            writes target, like folder but for the weights of its linears
    quantise(..., skip=["lm_head"])            but for these modules, which the configuration then names
    FORMATS                                    name -> (weight) -> the tensors that stand for it

Written from the papers and the formats' descriptions, independently of what reads them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

BLOCK = 32
"""Of fp8: rows and columns. FFNs of 96 and heads of 16 are cut beside it."""
GROUP = 32
FLOAT4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
Parts = dict[str, Tensor]


def fp8(name: str, weight: Tensor) -> Parts:
    rows, cols = (-(-size // BLOCK) for size in weight.shape)
    padded = torch.zeros(rows * BLOCK, cols * BLOCK)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    scales = padded.view(rows, BLOCK, cols, BLOCK).abs().amax((1, 3)).clamp(min=1e-6) / 448
    spread = scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    codes = (padded / spread)[: weight.shape[0], : weight.shape[1]].to(torch.float8_e4m3fn)
    return {f"{name}.weight": codes, f"{name}.weight_scale_inv": scales}


def fp8_tensor(name: str, weight: Tensor) -> Parts:
    scale = (weight.abs().max() / 448).reshape(1).bfloat16()
    return {f"{name}.weight": (weight / scale.float()).to(torch.float8_e4m3fn), f"{name}.weight_scale": scale}


def fp8_channel(name: str, weight: Tensor) -> Parts:
    scale = (weight.abs().amax(1, keepdim=True).clamp(min=1e-6) / 448).bfloat16()
    return {f"{name}.weight": (weight / scale.float()).to(torch.float8_e4m3fn), f"{name}.weight_scale": scale}


def mxfp4(name: str, weight: Tensor) -> Parts:
    """Of experts [E, in, out]: their outputs are rows there."""
    groups = weight.transpose(-1, -2).unflatten(-1, (-1, 32))
    top = groups.abs().amax(-1, keepdim=True).clamp(min=2.0**-100)
    exponent = torch.floor(torch.log2(top)) - 2
    codes = (groups * 2.0**-exponent)[..., None].sub(FLOAT4).abs().argmin(-1).to(torch.uint8)
    low, high = codes.unflatten(-1, (-1, 2)).unbind(-1)
    return {f"{name}_blocks": low | high << 4, f"{name}_scales": (exponent[..., 0] + 127).to(torch.uint8)}


def _int4(weight: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [N, K], zeros [N, K/g], scales [N, K/g] in float16; `groups`: that of each column."""
    count = int(groups.max()) + 1
    spread = [weight[:, groups == group] for group in range(count)]
    low = torch.stack([part.amin(1).clamp(max=0) for part in spread], 1)
    high = torch.stack([part.amax(1).clamp(min=0) for part in spread], 1)
    scales = ((high - low).clamp(min=1e-4) / 15).half()
    zeros = (-low / scales.float()).round().clamp(1, 15)
    codes = (weight / scales.float()[:, groups] + zeros[:, groups]).round().clamp(0, 15)
    return codes.to(torch.int32), zeros.to(torch.int32), scales


def _words(codes: Tensor, order: Sequence[int] = range(8)) -> Tensor:
    """Eight of the last dim in an int32."""
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % 8)).unflatten(-1, (-1, 8))
    found = torch.zeros(codes.shape[:-1], dtype=torch.int64)
    for place, which in enumerate(order):
        found |= codes[..., which].long() << (4 * place)
    return torch.where(found >= 2**31, found - 2**32, found).to(torch.int32)


def awq(name: str, weight: Tensor) -> Parts:
    codes, zeros, scales = _int4(weight, torch.arange(weight.shape[1]) // GROUP)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return {
        f"{name}.qweight": _words(codes.T, order),
        f"{name}.qzeros": _words(zeros.T, order),
        f"{name}.scales": scales.T,
    }


def _gptq(name: str, weight: Tensor, groups: Tensor) -> Parts:
    codes, zeros, scales = _int4(weight, groups)
    return {
        f"{name}.qweight": _words(codes).T,
        f"{name}.qzeros": _words(zeros.T - 1),
        f"{name}.scales": scales.T,
        f"{name}.g_idx": groups.to(torch.int32),
    }


def gptq(name: str, weight: Tensor) -> Parts:
    return _gptq(name, weight, torch.arange(weight.shape[1]) // GROUP)


def gptq_ordered(name: str, weight: Tensor) -> Parts:
    """With activation order: columns belong to groups in the order in which they were quantised."""
    order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(weight.shape[1]))
    return _gptq(name, weight, order // GROUP)


def packed(name: str, weight: Tensor) -> Parts:
    """compressed-tensors: symmetric, codes from -8 to 7."""
    groups = weight.unflatten(-1, (-1, GROUP))
    scales = (groups.abs().amax(-1).clamp(min=1e-6) / 7.5).bfloat16()
    codes = (groups / scales.float()[..., None]).round().clamp(-8, 7).flatten(-2) + 8
    return {
        f"{name}.weight_packed": _words(codes.to(torch.int32)),
        f"{name}.weight_scale": scales,
        f"{name}.weight_shape": torch.tensor(weight.shape),
    }


def _weights(**fields: Any) -> dict[str, Any]:
    return {"symmetric": True, "dynamic": False, "group_size": None, **fields}


def _compressed(form: str, weights: dict[str, Any]) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": groups,
    }


FORMATS: dict[str, tuple[Callable[[str, Tensor], Parts], dict[str, Any]]] = {
    "fp8": (fp8, {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"}),
    "fp8-tensor": (
        fp8_tensor,
        _compressed("float-quantized", _weights(num_bits=8, type="float", strategy="tensor")),
    ),
    "fp8-channel": (
        fp8_channel,
        _compressed("float-quantized", _weights(num_bits=8, type="float", strategy="channel")),
    ),
    "packed": (
        packed,
        _compressed("pack-quantized", _weights(num_bits=4, type="int", strategy="group") | {"group_size": GROUP}),
    ),
    "mxfp4": (mxfp4, {"quant_method": "mxfp4"}),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}),
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": False}),
    "gptq-ordered": (
        gptq_ordered,
        {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": True, "sym": False},
    ),
}
LISTS = {"compressed-tensors": "ignore"}
"""How the configuration names the modules that were left as they are."""


def divides(form: str, shape: Sequence[int]) -> bool:
    """Whether the whole of a linear consists of full blocks or groups."""
    if form == "fp8":
        return all(size % BLOCK == 0 for size in shape[-2:])
    return form.startswith("fp8") or (shape[-1] % GROUP == 0 and shape[-2] % 8 == 0)


def quantise(
    folder: Path, target: Path, form: str, *, skip: Sequence[str] = ("lm_head", "embed_tokens"), ragged: bool = False
) -> list[str]:
    """Writes the checkpoint; returns the names of what was quantised. `ragged`: blocks may be cut off at the end."""
    pack, config = FORMATS[form]
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors*"), dirs_exist_ok=True)
    tensors, done, left = {}, [], []
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - it is no dict
                weight = opened.get_tensor(name)
                owner = name.removesuffix(".weight")
                is_experts = form == "mxfp4" and weight.ndim == 3
                is_linear = form != "mxfp4" and name.endswith("_proj.weight") and weight.ndim == 2
                if not (is_linear or is_experts) or any(each in name for each in skip):
                    tensors[name] = weight
                elif ragged or is_experts or divides(form, weight.shape):
                    tensors |= pack(owner, weight.float())
                    done.append(name)
                else:
                    tensors[name] = weight
                    left.append(owner)
    write(target, tensors)
    fields = json.loads((folder / "config.json").read_text())
    names = [*skip, *left] if form != "mxfp4" else []
    config = config | {LISTS.get(config["quant_method"], "modules_to_not_convert"): names}
    (target / "config.json").write_text(json.dumps(fields | {"quantization_config": config}))
    return done


def write(target: Path, tensors: Parts) -> None:
    """In several files, so that codes and scales may lie apart."""
    names = sorted(tensors)
    files = {f"model-{n + 1:05}-of-00003.safetensors": names[n::3] for n in range(3)}
    for file, own in files.items():
        save_file({name: tensors[name].contiguous() for name in own}, target / file, {"format": "pt"})
    places = {name: file for file, own in files.items() for name in own}
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
