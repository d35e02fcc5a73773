"""Makes words.safetensors: one linear each, quantised to 4 bits by the tools that define the formats.

    python -m tests.partitioner.storage.checkpoint.own_tools.make

Needs gptqmodel and autoawq, which the tests do not: installed without their dependencies they run on a CPU. A tensor
is called FORM/NAME: those of a checkpoint, and `expected`, the numbers [K, N] that the tool itself makes of them, in
float16. The quantization_config of each is in the metadata.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from tests.support import zoo

__all__ = ["GPTQ", "main"]

OWNER = "model.layers.0.self_attn.o_proj"
GROUP = 32
GPTQ: dict[str, dict[str, Any]] = {
    "gptq": {"group_size": GROUP, "sym": False, "desc_act": False},
    "gptq-ordered": {"group_size": GROUP, "sym": False, "desc_act": True},
    "gptq-symmetric": {"group_size": GROUP, "sym": True, "desc_act": False},
    "gptq-v2": {"group_size": 16, "sym": False, "desc_act": False, "format": "gptq_v2"},
    "gptq-one-group": {"group_size": -1, "sym": False, "desc_act": False, "act_group_aware": False},
}


def by_gptqmodel(options: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    torch.manual_seed(0)
    model = zoo.tiny("llama")[0]
    for name, parameter in model.named_parameters():
        if name.endswith("_proj.weight"):
            parameter.data[::3] = parameter.data[::3].abs()  # zero points of 0 and 15 among them
            parameter.data[1::3] = -parameter.data[1::3].abs()
    with tempfile.TemporaryDirectory() as plain, tempfile.TemporaryDirectory() as folder:
        model.half().save_pretrained(plain)
        words = Tokenizer(models.WordLevel({str(n): n for n in range(128)}, unk_token="0"))
        PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0", pad_token="1").save_pretrained(plain)
        tool = GPTQModel.load(plain, QuantizeConfig(bits=4, **options), device="cpu")
        ids = torch.randint(3, 120, (16, 64)).tolist()
        tool.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids], batch_size=1)
        tool.save(folder)
        fields = json.loads((Path(folder) / "config.json").read_text())["quantization_config"]
        tensors = {name: each for file in Path(folder).glob("*.safetensors") for name, each in load_file(file).items()}
        loaded = GPTQModel.load(folder, backend=BACKEND.TORCH, device="cpu", dtype=torch.float16)
        numbers = loaded.model.get_submodule(OWNER).dequantize_weight()
    kept = {name: each for name, each in tensors.items() if name.startswith(f"{OWNER}.")}
    told = ("bits", "group_size", "quant_method", "checkpoint_format", "desc_act", "sym")
    return kept | {"expected": numbers}, {name: fields[name] for name in told}


def by_autoawq() -> tuple[dict[str, Tensor], dict[str, Any]]:
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.utils.packing_utils import dequantize_gemm

    torch.manual_seed(0)
    linear = nn.Linear(64, 64, bias=False).half()
    linear.weight.data[::3] = linear.weight.data[::3].abs()
    groups = linear.weight.data.float().unflatten(1, (-1, GROUP))
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scales = (high - low) / 15
    zeros = (-low / scales).round()
    made = WQLinear_GEMM.from_linear(linear, 4, GROUP, scales=scales.T.contiguous(), zeros=zeros.T.contiguous())
    numbers = dequantize_gemm(made.qweight, made.qzeros, made.scales, 4, GROUP)
    kept = {f"{OWNER}.{name}": tensor for name, tensor in made.state_dict().items()}
    fields = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
    return kept | {"expected": numbers}, fields


def main() -> None:
    made = {form: by_gptqmodel(options) for form, options in GPTQ.items()} | {"awq": by_autoawq()}
    tensors = {f"{form}/{name}": each.contiguous() for form, (found, _) in made.items() for name, each in found.items()}
    told = {form: json.dumps(fields) for form, (_, fields) in made.items()}
    save_file(tensors, Path(__file__).with_name("words.safetensors"), told)


if __name__ == "__main__":
    main()
