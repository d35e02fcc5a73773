"""Quantised folders read by parts, against the model that transformers dequantises when it loads them."""

import functools
import json
import math
import re
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import CompressedTensorsConfig, FineGrainedFP8Config, Mxfp4Config

from partitioner import CaptureError, Plan, WeightError, partition
from partitioner.compile.partition import compile_program
from partitioner.compile.tracing.trace import trace
from partitioner.storage.checkpoint.open_checkpoint import open_checkpoint
from partitioner.storage.checkpoint.quantized_tensors import find_quantized
from partitioner.storage.named_model import load_model
from runtime.program.shards import Piece, WeightShard
from runtime.weights.read_shards import Reader
from runtime.weights.safetensors_files import TensorFiles
from tests.support import zoo
from tests.supported_models import quantise
from tests.supported_models.checkpoints import blocks, differences, same_bits, shard, without_scales

CPU = torch.device("cpu")
OWN = {"fp8": FineGrainedFP8Config, "mxfp4": Mxfp4Config, "compressed-tensors": CompressedTensorsConfig}
EXPERTS = {"qwen3_moe": {"moe_intermediate_size": 96}, "deepseek_v3": {"moe_intermediate_size": 96}}


@functools.cache
def plain(name: str) -> tuple[Path, Any, Any]:
    kept = tempfile.TemporaryDirectory()
    model, _ = zoo.tiny(name, **EXPERTS.get(name, {}))
    model.bfloat16().save_pretrained(kept.name)
    return Path(kept.name), type(model), kept


@functools.cache
def quantised(name: str, form: str, *, ragged: bool = False) -> tuple[Path, tuple[str, ...], Any]:
    """A folder, and the names of what is quantised in it."""
    kept = tempfile.TemporaryDirectory()
    done = quantise.quantise(plain(name)[0], Path(kept.name), form, ragged=ragged)
    return Path(kept.name), tuple(done), kept


@functools.cache
def dequantised(name: str, form: str, dtype: torch.dtype | None = None) -> Any:
    folder, _, _ = quantised(name, form)
    method = quantise.FORMATS[form][1]["quant_method"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the folder's own configuration is used
        return without_scales(
            plain(name)[1].from_pretrained(
                folder, quantization_config=OWN[method](dequantize=True), dtype=dtype or "auto"
            )
        )


def expected(form: str, tensors: dict[str, Tensor], name: str) -> Tensor:
    """The numbers of `name` by the formulas of the papers, in float64."""
    owner = name.removesuffix(".weight")
    part = {key.removeprefix(f"{owner}."): tensor for key, tensor in tensors.items() if key.startswith(f"{owner}.")}
    if form == "fp8":
        rows, cols = part["weight"].shape
        scales = part["weight_scale_inv"].double()
        spread = scales.repeat_interleave(quantise.BLOCK, 0).repeat_interleave(quantise.BLOCK, 1)[:rows, :cols]
        return part["weight"].double() * spread
    places = [0, 4, 1, 5, 2, 6, 3, 7] if form == "awq" else list(range(8))

    def unpack(words: Tensor) -> Tensor:
        """Codes along the last dim, bit by bit."""
        return torch.stack([words.long() >> (4 * place) & 15 for place in places], -1).flatten(-2)

    if form == "awq":
        codes, zeros = unpack(part["qweight"]), unpack(part["qzeros"])
        groups = torch.arange(codes.shape[0]) // quantise.GROUP
    else:
        codes, zeros = unpack(part["qweight"].T).T, unpack(part["qzeros"]) + 1
        groups = part["g_idx"].long()
    scales = part["scales"]
    return ((codes - zeros[groups]).half() * scales[groups]).T.double()


def stored(folder: Path) -> dict[str, Tensor]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("llama", "fp8"),
        ("qwen3_moe", "fp8"),
        ("deepseek_v3", "fp8"),
        ("gpt_oss", "mxfp4"),
        ("llama", "fp8-tensor"),
        ("llama", "fp8-channel"),
        ("qwen3_moe", "fp8-channel"),
        ("llama", "packed"),
        ("qwen3_moe", "packed"),
    ],
)
def test_every_part_has_the_bits_that_transformers_dequantises_to(name: str, form: str) -> None:
    """The whole of each weight, and a half and a third of it along every dim: beside the blocks too."""
    folder, done, _ = quantised(name, form)
    assert len(done) >= 4
    opened = open_checkpoint(folder)
    assert not list(differences(opened, dequantised(name, form)))
    assert {opened.model.dtype, opened.origins.files.packed.keys() >= {done[0]}} == {torch.bfloat16, True}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("name", "form"), [("qwen3_moe", "fp8"), ("gpt_oss", "mxfp4"), ("llama", "fp8-channel")])
def test_the_numbers_are_rounded_once_to_the_dtype_asked_for(name: str, form: str, dtype: torch.dtype) -> None:
    """transformers leaves what is not quantised in its own dtype, for fp8."""
    opened = open_checkpoint(quantised(name, form)[0], dtype=dtype)
    model = dequantised(name, form, dtype)
    wanted = {name: parameter.dtype for name, parameter in opened.model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(wanted[name])
    assert not list(differences(opened, model))


def test_the_model_to_compare_with_is_of_one_dtype() -> None:
    """Without a GPU, transformers dequantises FP8 to 16 bits whatever is asked for."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = load_model(str(quantised("qwen3_moe", "fp8")[0]), dtype=torch.float64)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}


def test_another_scale_is_another_weight(tmp_path: Path) -> None:
    """The comparison above can fail."""
    tensors = stored(quantised("llama", "fp8")[0])
    name = "model.layers.1.mlp.up_proj.weight_scale_inv"
    tensors[name][-1, -1] *= 2
    spoilt = copied(tmp_path, tensors)
    assert any("up_proj" in line for line in differences(open_checkpoint(spoilt), dequantised("llama", "fp8")))


@pytest.mark.parametrize("form", ["awq", "gptq", "gptq-ordered", "fp8"])
def test_every_part_has_the_numbers_of_the_formulas(form: str) -> None:
    """transformers leaves awq and gptq to kernels of GPUs, and refuses fp8 whose last blocks are cut off."""
    if form == "fp8":
        model, _ = zoo.tiny("llama", intermediate_size=90)
        with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
            model.bfloat16().save_pretrained(one)
            done = quantise.quantise(Path(one), Path(other), form, ragged=True)
            compare(Path(other), done, form)
    else:
        folder, names, _ = quantised("llama", form)
        compare(folder, names, form)


def compare(folder: Path, names: Any, form: str) -> None:
    assert len(names) >= 14
    tensors = stored(folder)
    opened = open_checkpoint(folder, dtype=torch.float32)
    parameters = dict(opened.model.named_parameters())
    for name in names:
        whole = expected(form, tensors, name).float()
        for block in blocks(tuple(whole.shape)):
            described = shard(name, parameters[name], block)
            pieces = opened.origins.of(described)
            (found,) = opened.origins.source.load([WeightShard(**{**vars(described), "pieces": pieces})], CPU)
            assert same_bits(found, whole[tuple(slice(*ends) for ends in block)]), (name, block)


@pytest.mark.parametrize("form", ["gptq", "awq"])
def test_weights_whose_inputs_are_rows_are_turned_as_they_were_packed(tmp_path: Path, form: str) -> None:
    """GPT-2's projection after attention is square: it fitted as it was, and was the transpose of the right numbers."""
    model, _ = zoo.tiny("gpt2")
    model.bfloat16().save_pretrained(tmp_path / "plain")
    pack, config = quantise.FORMATS[form]
    tensors, names = stored(tmp_path / "plain"), []
    for name in [name for name in tensors if re.search(r"c_(attn|proj|fc)\.weight$", name)]:
        tensors |= pack(name.removesuffix(".weight"), tensors.pop(name).float().T)
        names.append(name)
    fields = json.loads((tmp_path / "plain" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | {"quantization_config": config}))
    quantise.write(tmp_path, tensors)
    opened = open_checkpoint(tmp_path, dtype=torch.float32)
    parameters = dict(opened.model.named_parameters())
    assert len([name for name in names if len(set(parameters[name].shape)) == 1]) == 2
    for name in names:
        whole = expected(form, tensors, name).float().T
        for block in blocks(tuple(whole.shape)):
            described = shard(name, parameters[name], block)
            pieces = opened.origins.of(described)
            (found,) = opened.origins.source.load([WeightShard(**{**vars(described), "pieces": pieces})], CPU)
            assert same_bits(found, whole[tuple(slice(*ends) for ends in block)]), (name, block)


@pytest.mark.parametrize(
    ("name", "form", "plan"),
    [
        ("llama", "fp8", Plan(tp=2)),
        ("llama", "gptq-ordered", Plan(tp=3)),
        pytest.param("qwen3_moe", "fp8", Plan(ep=2), marks=pytest.mark.slow),
        pytest.param("deepseek_v3", "fp8", Plan(tp=3), marks=pytest.mark.slow),
        pytest.param("gpt_oss", "mxfp4", Plan(tp=3), marks=pytest.mark.slow),
        pytest.param("gpt_oss", "mxfp4", Plan(ep=2), marks=pytest.mark.slow),
    ],
)
def test_a_quantised_folder_is_split_like_its_dequantised_model(name: str, form: str, plan: Plan) -> None:
    folder, _, _ = quantised(name, form)
    parts = partition(folder, plan)
    ids = torch.arange(2, 18).reshape(2, 8)
    if quantise.FORMATS[form][1]["quant_method"] in OWN:
        model = dequantised(name, form)
        assert same_bits(parts.simulate(input_ids=ids), compile_program(trace(model), plan).simulate(input_ids=ids))
    else:
        whole = partition(folder, Plan(), dtype=torch.float32).simulate(input_ids=ids)
        split = partition(folder, plan, dtype=torch.float32).simulate(input_ids=ids)
        torch.testing.assert_close(split, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["fp8", "packed", "awq", "gptq"])
def test_a_rank_reads_its_part_of_codes_and_scales(tmp_path: Path, form: str) -> None:
    """Column- and row-parallel; at sizes where a row of a half is longer than what is read through."""
    folder, (rows, cols) = tmp_path, (1024, 8192)
    weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(0))
    pack, config = quantise.FORMATS[form]
    quantise.write(folder, pack("up_proj", weight))
    files = TensorFiles(folder)
    files.packed = find_quantized(files, config, "here").packed
    total = sum(entry.bytes for entry in files.entries.values())
    for block in (((rows // 2, rows), (0, cols)), ((0, rows), (cols // 2, cols))):
        local = tuple((0, b - a) for a, b in block)
        piece = Piece("up_proj.weight", block, local)
        described = shard("up_proj.weight", torch.empty(rows, cols, dtype=torch.bfloat16, device="meta"), block)
        reader = Reader(files)
        reader.load([WeightShard(**{**vars(described), "pieces": (piece,)})], CPU)
        assert reader.bytes_read <= 1.1 * total / 2


def copied(target: Path, tensors: dict[str, Tensor], **fields: Any) -> Path:
    """The fp8 folder of llama with other tensors, or another quantization_config."""
    folder = quantised("llama", "fp8")[0]
    for file in folder.glob("*.json"):
        (target / file.name).write_text(file.read_text())
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= fields
    (target / "config.json").write_text(json.dumps(config))
    quantise.write(target, tensors)
    return target


UP = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "fields", "message"),
    [
        (lambda t: t.pop(f"{UP}_scale_inv"), {}, r"up_proj.weight' is stored as float8_e4m3fn .* and has no scales"),
        (lambda t: t.pop(UP), {}, r"lacks '.*up_proj.weight', which the quantised tensor '.*up_proj.weight' needs"),
        (
            lambda t: t.update({f"{UP}_scale_inv": torch.ones(7, 2)}),
            {},
            r"scale_inv' is float32 \[7, 2\]; required: one scale for each block of \(32, 32\).*damaged",
        ),
        (lambda t: t.update({f"{UP}_scale_inv": torch.ones(3, 2).long()}), {}, r"is int64 .*required: scales of 16"),
        (lambda t: t.update({UP: torch.ones(96, 64)}), {}, r"is float32 \[96, 64\]; required: a matrix of float8"),
        (lambda t: t.update({f"{UP}_scale_inv": torch.ones(0, 2)}), {}, r"is float32 \[0, 2\]; required"),
        (lambda t: None, {"weight_block_size": [10**30, 2]}, r"weight_block_size .* two whole numbers"),
        (lambda t: None, {"weight_block_size": "all"}, r"weight_block_size .* two whole numbers"),
        (lambda t: None, {"quant_method": "aqlm"}, r"quantised by 'aqlm'.*those that can: fp8.*dequantise it"),
        (lambda t: None, {"quant_method": None}, r"quantised by 'None'"),
    ],
    ids=[
        "no scales",
        "no codes",
        "scales of another shape",
        "scales of integers",
        "codes of floats",
        "no scale at all",
        "hostile block",
        "block of words",
        "another method",
        "no method",
    ],
)
def test_what_is_damaged_is_refused_by_name(
    tmp_path: Path, change: Callable, fields: dict[str, Any], message: str
) -> None:
    tensors = stored(quantised("llama", "fp8")[0])
    change(tensors)
    with pytest.raises((WeightError, CaptureError), match=message):
        open_checkpoint(copied(tmp_path, tensors, **fields))


@pytest.mark.parametrize(
    ("form", "part", "wrong", "message"),
    [
        ("gptq", "g_idx", lambda t: t + 100, r"g_idx' is int32 \[64\]; required: groups from 0 to 1, got 100 to 101"),
        ("gptq", "qzeros", lambda t: t[:, :-1], r"qzeros' is int32 .*; required: int32 \[2, 12\]"),
        ("awq", "scales", lambda t: t[:-1], r"scales' is float16 .*; required: float16 \[2, 96\], as group_size is 32"),
        ("awq", "qweight", lambda t: t.float(), r"qweight' is float32 .*; required: int32 \[K, N\]"),
        (
            "packed",
            "weight_shape",
            lambda t: t * 1000,
            r"weight_packed' is int32 .* required: int32 of \[96000, 64000\]",
        ),
        ("packed", "weight_scale", lambda t: t[:, :0], r"weight_scale' is bfloat16 \[96, 0\]; required: scales of 16"),
    ],
)
def test_damaged_words_are_refused_by_name(tmp_path: Path, form: str, part: str, wrong: Callable, message: str) -> None:
    folder, _, _ = quantised("llama", form)
    tensors = stored(folder)
    name = f"{UP.removesuffix('.weight')}.{part}"
    tensors[name] = wrong(tensors[name])
    for file in folder.glob("*.json"):
        (tmp_path / file.name).write_text(file.read_text())
    quantise.write(tmp_path, tensors)
    with pytest.raises((WeightError, CaptureError), match=message):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("form", "fields", "message"),
    [
        ("awq", {"bits": 3}, r"quantised to 3 bits by awq: only 4 bits"),
        ("awq", {"version": "gemv"}, r"version='gemv'; those that can be read by parts: gemm"),
        ("awq", {"version": None, "format": "gemv_fast"}, r"format='gemv_fast'; those that can be read by parts: gemm"),
        ("gptq", {"group_size": -7}, r"group_size .* whole number of at least 1, got '-7'"),
        ("gptq", {"checkpoint_format": "marlin"}, r"checkpoint_format='marlin'"),
        ("gptq", {"format": "marlin"}, r"format='marlin'; those that can be read by parts: gptq, gptq_v2"),
        ("gptq", {"is_marlin_format": True}, r"GPTQ in marlin's order"),
        ("packed", {"sparsity_config": {"format": "sparse-24"}}, r"weights with a sparsity_config"),
        ("packed", {"format": "mxfp4-pack-quantized"}, r"of format 'mxfp4-pack-quantized'; those that can"),
        (
            "packed",
            {
                "config_groups": {
                    "all": {"weights": {"type": "int", "num_bits": 4, "group_size": 32, "symmetric": False}}
                }
            },
            r"lacks '.*weight_zero_point'",
        ),
    ],
)
def test_variants_that_cannot_be_read_are_refused_by_name(
    tmp_path: Path, form: str, fields: dict[str, Any], message: str
) -> None:
    folder, _, _ = quantised("llama", form)
    for file in (*folder.glob("*.json"), *folder.glob("*.safetensors")):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= fields
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises((WeightError, CaptureError), match=message):
        open_checkpoint(tmp_path)


def linear(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any], **fields: Any) -> Any:
    """What is found in a folder of these tensors."""
    quantise.write(folder, tensors)
    return find_quantized(TensorFiles(folder), {**config, **fields}, "here").packed["up_proj.weight"]


def test_groups_are_of_the_size_that_the_configuration_has(tmp_path: Path) -> None:
    """Four groups of 32, the last one cut off, are not four of 28; of several sizes the one that fits is taken."""
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(0))
    pack, config = quantise.FORMATS["packed"]
    tensors = pack("up_proj", weight)
    tensors |= {
        "up_proj.weight_packed": tensors["up_proj.weight_packed"][:, :14],
        "up_proj.weight_shape": torch.tensor([8, 112]),
    }
    assert linear(tmp_path, tensors, config).block == (1, 32)
    both = {size: {"weights": {"type": "int", "num_bits": 4, "group_size": size}} for size in (32, 64)}
    assert linear(tmp_path, tensors, config, config_groups=both).block == (1, 32)
    alike = {size: {"weights": {"type": "int", "num_bits": 4, "group_size": size}} for size in (32, 30)}
    with pytest.raises(WeightError, match=r"weight_scale' is .*one for each group of the 112 columns, of 30 or 32"):
        linear(tmp_path, tensors, config, config_groups=alike)
    words = tensors | {"up_proj.weight_packed": torch.zeros(8, 28, dtype=torch.int32)}
    with pytest.raises(CaptureError, match=r"'up_proj.weight_packed' holds codes of 8 bits in words"):
        linear(tmp_path, words, config)


def test_blocks_are_of_the_size_that_the_configuration_has(tmp_path: Path) -> None:
    """Five blocks of 128 rows, of which the last is cut off, are not five of 120; transformers' default is 128."""
    tensors = {
        "up_proj.weight": torch.zeros(600, 128).to(torch.float8_e4m3fn),
        "up_proj.weight_scale_inv": torch.ones(5, 1),
    }
    for fields in ({}, {"weight_block_size": [128, 128]}):
        assert linear(tmp_path, tensors, {"quant_method": "fp8"}, **fields).block == (128, 128)
    tensors["up_proj.weight_scale"] = tensors.pop("up_proj.weight_scale_inv")
    config = quantise.FORMATS["fp8-channel"][1]
    groups = [{"weights": {"type": "float", "num_bits": 8, "block_structure": [rows, 128]}} for rows in (128, 125)]
    with pytest.raises(WeightError, match=r"one scale for each block of \(125, 128\) or \(128, 128\)"):
        linear(tmp_path, tensors, config, config_groups=dict(enumerate(groups)))


def test_gptq_whose_modules_differ(tmp_path: Path) -> None:
    pack, config = quantise.FORMATS["gptq"]
    tensors = pack("up_proj", torch.randn(16, 64, generator=torch.Generator().manual_seed(0)))
    dynamic = {"+:.*up_proj": {"group_size": 32}}
    assert linear(tmp_path, tensors, config, group_size=128, dynamic=dynamic).block == (1, 32)
    tensors["up_proj.qzeros"] = torch.zeros(2, 4, dtype=torch.int32)
    with pytest.raises(CaptureError, match=r"'up_proj.qweight' is quantised to 8 bits, other modules to 4"):
        linear(tmp_path, tensors, config, dynamic=dynamic)


def test_gptq_in_activation_order_needs_the_order(tmp_path: Path) -> None:
    """Without it each column had the scale of its place: other numbers, and no error."""
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    pack, config = quantise.FORMATS["gptq-ordered"]
    tensors = pack("up_proj", weight)
    assert linear(tmp_path, tensors, config).groups is not None
    del tensors["up_proj.g_idx"]
    for fields in ({}, {"desc_act": False, "dynamic": {"+:.*up_proj": {"desc_act": True}}}):
        with pytest.raises(WeightError, match=r"lacks 'up_proj.g_idx', which the quantised tensor 'up_proj.weight'"):
            linear(tmp_path, tensors, config, **fields)
    assert linear(tmp_path, tensors, config, desc_act=False).groups is None
    whole = quantise._gptq("up_proj", weight, torch.zeros(64, dtype=torch.long))
    del whole["up_proj.g_idx"]  # one group has no order
    assert linear(tmp_path, whole, config, group_size=-1).groups is None


@pytest.mark.parametrize("form", ["gptq", "awq", "packed"])
def test_a_weight_beside_its_codes_is_refused(tmp_path: Path, form: str) -> None:
    """The codes were taken, and the other one dropped without a word."""
    pack, config = quantise.FORMATS[form]
    tensors = pack("up_proj", torch.randn(16, 64, generator=torch.Generator().manual_seed(0)))
    assert linear(tmp_path, tensors, config).shape == (16, 64)
    with pytest.raises(WeightError, match=r"holds 'up_proj.weight' twice: as float32 \[16, 64\], and quantised as"):
        linear(tmp_path, {**tensors, "up_proj.weight": torch.zeros(16, 64)}, config)


@pytest.mark.parametrize(
    ("shape", "grid", "block"),
    [
        ((104, 96), (4, 3), None),  # cut-off blocks of 32, and 26 x 32 by division
        ((104, 96), (2, 3), None),
        ((96, 96), (3, 3), (32, 32)),
        ((96, 96), (96, 1), (1, 96)),
        ((104, 96), (1, 3), (104, 32)),
        ((104, 96), (104, 3), (1, 32)),
    ],
)
def test_blocks_that_the_configuration_does_not_have_are_likely_ones(
    tmp_path: Path, shape: tuple[int, int], grid: tuple[int, int], block: tuple[int, int] | None
) -> None:
    """26 rows to a scale fit the shapes as well, and were other numbers than those of a configuration with 32."""
    tensors = {
        "up_proj.weight": torch.zeros(shape).to(torch.float8_e4m3fn),
        "up_proj.weight_scale_inv": torch.ones(grid),
    }
    if block is None:
        with pytest.raises(WeightError, match=r"weight_scale_inv' is float32 .*; required: one scale for each block"):
            linear(tmp_path, tensors, {"quant_method": "fp8"})
    else:
        assert linear(tmp_path, tensors, {"quant_method": "fp8"}).block == block
    if grid == (4, 3):
        assert linear(tmp_path, tensors, {"quant_method": "fp8"}, weight_block_size=[32, 32]).block == (32, 32)


def test_bytes_that_are_no_float8_are_no_numbers(tmp_path: Path) -> None:
    """transformers takes them for pairs of FP4."""
    tensors = {"up_proj.weight": torch.ones(64, 64, dtype=torch.int8), "up_proj.weight_scale_inv": torch.ones(2, 2)}
    with pytest.raises(CaptureError, match=r"'up_proj.weight' holds bytes that are no float8, FP4 in pairs"):
        linear(tmp_path, tensors, {"quant_method": "fp8", "weight_block_size": [32, 32]})


def test_gptq_of_the_second_version_by_its_older_name(tmp_path: Path) -> None:
    pack, config = quantise.FORMATS["gptq"]
    tensors = pack("up_proj", torch.randn(16, 64, generator=torch.Generator().manual_seed(0)))
    assert linear(tmp_path, tensors, config, format="gptq_v2").format == "gptq_v2"
    assert linear(tmp_path, tensors, config, format="GPTQ_V2").format == "gptq_v2"
    assert linear(tmp_path, tensors, config).format == "gptq"


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.int8])
def test_codes_that_no_configuration_names_are_refused(tmp_path: Path, kind: torch.dtype) -> None:
    """transformers casts them to numbers, without their scales."""
    tensors = stored(quantised("llama", "fp8")[0])
    for name in [name for name in tensors if f"{name}_scale_inv" in tensors]:
        tensors[name] = tensors[name].float().to(kind)
    folder = copied(tmp_path, tensors)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightError, match=r"weight' is stored as \w+, and no quantization_config in config.json says"):
        open_checkpoint(folder)


@pytest.mark.parametrize(("form", "codes"), [("gptq", "qweight"), ("packed", "weight_packed")])
@pytest.mark.parametrize("config", [None, {"quant_method": "fp8"}])
def test_words_that_no_configuration_explains_are_named(
    tmp_path: Path, form: str, codes: str, config: dict[str, Any] | None
) -> None:
    """They were told as weights that are missing, to be completed."""
    folder = quantised("llama", form)[0]
    for file in (*folder.glob("*.json"), *folder.glob("*.safetensors")):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    fields = json.loads((folder / "config.json").read_text()) | {"quantization_config": config}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(WeightError, match=rf"lacks 14 weights .*_proj.{codes}' looks like codes of a quantised weight"):
        open_checkpoint(tmp_path)


def test_layers_that_predict_further_tokens_are_left_out_and_told(tmp_path: Path) -> None:
    folder = quantised("deepseek_v3", "fp8")[0]
    tensors = stored(folder)
    tensors |= {
        name.replace(".layers.1.", ".layers.2."): t.clone() for name, t in tensors.items() if ".layers.1." in name
    }
    tensors["model.layers.2.eh_proj.weight"] = torch.zeros(64, 128)
    for file in folder.glob("*.json"):
        (tmp_path / file.name).write_text(file.read_text())
    quantise.write(tmp_path, tensors)
    opened = open_checkpoint(tmp_path)
    assert any("not loaded" in note and "model.layers.2." in note for note in opened.notes)
    assert not list(differences(opened, dequantised("deepseek_v3", "fp8")))


def test_modules_that_were_not_converted_stay_as_they_are() -> None:
    folder, done, _ = quantised("llama", "fp8")
    listed = json.loads((folder / "config.json").read_text())["quantization_config"]["modules_to_not_convert"]
    assert "lm_head" in listed
    assert "lm_head.weight" not in done
    opened = open_checkpoint(folder)
    assert "lm_head.weight" not in opened.origins.files.packed
    assert math.prod(opened.model.lm_head.weight.shape) == 128 * 64
