"""Checkpoints that compressed-tensors itself has written: read by parts, as transformers dequantises them."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import ModelCompressor, PackedQuantizationCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from partitioner import Plan, partition
from partitioner.storage.checkpoint.open_checkpoint import open_checkpoint
from partitioner.storage.checkpoint.quantized_tensors import find_quantized
from runtime.program.shards import Piece
from runtime.weights.read_shards import Reader
from runtime.weights.safetensors_files import TensorFiles
from tests.support import zoo
from tests.supported_models.checkpoints import differences, same_bits, shard, without_scales

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


@pytest.mark.parametrize("strategy", ["group", "channel"])
def test_zero_points_of_sizes_that_nothing_divides(strategy: str, tmp_path: Path) -> None:
    """20 outputs and 50 inputs in groups of 10, packed by the tool, read in parts of every kind."""
    args = QuantizationArgs(
        num_bits=4, symmetric=False, strategy=strategy, group_size=10 if strategy == "group" else None
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    groups = 5 if strategy == "group" else 1
    generator = torch.Generator().manual_seed(0)
    tensors = PackedQuantizationCompressor.compress(
        {
            "weight": torch.randn(20, 50, generator=generator),
            "weight_scale": torch.rand(20, groups, generator=generator) / 4 + 0.1,
            "weight_zero_point": torch.randint(-8, 8, (20, groups), generator=generator).to(torch.int8),
        },
        scheme,
    )
    whole = PackedQuantizationCompressor.decompress(tensors, scheme)["weight"]
    save_file({f"up.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    files = TensorFiles(tmp_path)
    config = {"config_groups": {"all": {"targets": ["Linear"], "weights": args.model_dump(mode="json")}}}
    files.packed = find_quantized(files, {"quant_method": "compressed-tensors", **config}, "here").packed
    for block in [
        ((a, b), (c, d)) for a, b in ((0, 20), (3, 9), (17, 20)) for c, d in ((0, 50), (9, 11), (12, 18), (45, 50))
    ]:
        described = shard("up.weight", torch.empty(20, 50, device="meta"), block)
        piece = Piece("up.weight", block, tuple((0, stop - start) for start, stop in block))
        (found,) = Reader(files).load([replace(described, pieces=(piece,))], torch.device("cpu"))
        assert same_bits(found, whole[tuple(slice(*ends) for ends in block)]), block
