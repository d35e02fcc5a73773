"""Checkpoints that compressed-tensors itself has written: read by parts, as transformers dequantises them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from partitioner import Plan, partition
from partitioner.storage.checkpoint.open_checkpoint import open_checkpoint
from tests.support import zoo
from tests.supported_models.checkpoints import differences, without_scales

GROUP = 32
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "channel": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    "tensor": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
    "group": ("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP}),
}


def written(form: str, folder: Path) -> None:
    """A tiny model whose linears the tool compresses and saves; scales are those of the largest magnitude."""
    model = zoo.tiny("llama")[0].to(torch.bfloat16)
    kind, args = FORMS[form]
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(symmetric=True, **args))
    apply_quantization_config(model, QuantizationConfig(config_groups={"all": scheme}, ignore=["lm_head"], format=kind))
    for module in model.modules():
        if "quantization_scheme" in vars(module):
            weight = module.weight.detach().float().abs()
            if form == "group":
                top = weight.unflatten(1, (-1, GROUP)).amax(-1)
            else:
                top = weight.amax(1, keepdim=True) if form == "channel" else weight.max().reshape(1)
            module.weight_scale.data = (top / (448 if args["type"] == "float" else 7)).to(torch.bfloat16)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)


@pytest.mark.parametrize(
    "form", [pytest.param(form, marks=pytest.mark.slow) if form == "tensor" else form for form in FORMS]
)
def test_what_the_tool_writes_is_read_to_the_bit(form: str, tmp_path: Path) -> None:
    written(form, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the folder's own configuration is used
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=CompressedTensorsConfig(dequantize=True), dtype="auto"
        )
    opened = open_checkpoint(tmp_path)
    assert len(opened.origins.files.packed) == 14
    assert not list(differences(opened, without_scales(model)))
    ids = torch.arange(3, 15)[None]
    both = [partition(tmp_path, Plan(tp=3, weights=way)).simulate(input_ids=ids) for way in ("expanded", "stored")]
    assert torch.equal(*both)
    assert (both[0] - model(ids).logits).abs().max() < 0.1
