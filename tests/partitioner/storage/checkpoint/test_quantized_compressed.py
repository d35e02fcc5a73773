"""Which scheme of a compressed-tensors configuration a tensor has, and what that scheme needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from partitioner import CaptureError, WeightError
from partitioner.storage.checkpoint.quantized_tensors import find_quantized
from runtime.weights.quantized.packed import Packed
from runtime.weights.safetensors_files import TensorFiles
from tests.supported_models import quantise

OWNER = "model.layers.0.mlp.up_proj"
INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True}


def found(folder: Path, tensors: dict[str, Tensor], *groups: tuple[dict[str, Any], list[str]]) -> Packed:
    quantise.write(folder, tensors)
    config = {
        "quant_method": "compressed-tensors",
        "config_groups": {
            f"group_{n}": {"weights": weights, "targets": targets} for n, (weights, targets) in enumerate(groups)
        },
    }
    return find_quantized(TensorFiles(folder), config, "here").packed[f"{OWNER}.weight"]


def words(**others: Tensor) -> dict[str, Tensor]:
    """16 outputs, 64 inputs, in groups of 32."""
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    return quantise.packed(OWNER, weight) | {f"{OWNER}.{name}": tensor for name, tensor in others.items()}


def codes(dtype: torch.dtype, *grid: int, **others: Tensor) -> dict[str, Tensor]:
    named = {"weight": torch.zeros(96, 64).to(dtype), "weight_scale": torch.ones(grid), **others}
    return {f"{OWNER}.{name}": tensor for name, tensor in named.items()}


ASYMMETRIC = {**INT4, "symmetric": False}
ZEROS = torch.zeros(2, 2, dtype=torch.int32)


@pytest.mark.parametrize(
    ("groups", "is_needed"),
    [
        ([(ASYMMETRIC, ["Linear"])], True),
        ([(ASYMMETRIC, ["Linear"]), (INT4, ["re:.*down_proj$"])], True),
        ([(ASYMMETRIC, ["re:.*up_proj$"]), (INT4, ["Linear"])], True),
        ([(ASYMMETRIC, ["Linear"]), (INT4, [OWNER])], False),
        ([(ASYMMETRIC, [OWNER]), (INT4, ["re:.*up_proj$"])], True),
        ([(ASYMMETRIC, ["re:.*down_proj$"]), (INT4, ["Linear"])], False),
        ([(ASYMMETRIC, ["re:up_proj"]), (INT4, ["Linear"])], False),  # a name begins with it
        ([(ASYMMETRIC, ["Linear"]), (INT4, ["Conv1d"])], True),  # which class it has is not known
    ],
)
def test_zero_points_are_needed_where_the_scheme_has_them(
    tmp_path: Path, groups: list[tuple[dict[str, Any], list[str]]], is_needed: bool
) -> None:
    """Where some modules had none, those that had lost theirs were read as if they were symmetric."""
    if is_needed:
        with pytest.raises(WeightError, match=r"lacks '.*up_proj.weight_zero_point'"):
            found(tmp_path, words(), *groups)
        assert "zeros" in found(tmp_path, words(weight_zero_point=ZEROS), *groups).parts
    else:
        assert "zeros" not in found(tmp_path, words(), *groups).parts
        with pytest.raises(WeightError, match=r"zero_point' is int32 .*required: no zero points, as config_groups"):
            found(tmp_path, words(weight_zero_point=ZEROS), *groups)


@pytest.mark.parametrize("order", ["group", "dynamic", True])
def test_an_activation_order_is_needed_where_the_scheme_has_one(tmp_path: Path, order: str | bool) -> None:
    scheme = {**INT4, "actorder": order}
    with pytest.raises(WeightError, match=r"lacks '.*up_proj.weight_g_idx'"):
        found(tmp_path, words(), (scheme, ["Linear"]))
    turned = torch.arange(64, dtype=torch.int32) % 2
    assert found(tmp_path, words(weight_g_idx=turned), (scheme, ["Linear"])).groups is not None
    # as compressed-tensors begins, and leaves it where nothing was reordered
    assert found(tmp_path, words(weight_g_idx=torch.full_like(turned, -1)), (scheme, ["Linear"])).groups is None
    assert found(tmp_path, words(), ({**INT4, "actorder": "weight"}, ["Linear"])).groups is None


@pytest.mark.parametrize(
    ("scheme", "grid", "block"),
    [
        ({"strategy": "tensor"}, (1,), (96, 64)),
        ({"strategy": "channel"}, (96, 1), (1, 64)),
        ({"strategy": "channel"}, (96,), (1, 64)),
        ({"strategy": "group", "group_size": 32}, (96, 2), (1, 32)),
        ({"group_size": 32}, (96, 2), (1, 32)),
        ({"group_size": -1}, (96, 1), (1, 64)),
        ({}, (1,), (96, 64)),
        ({"strategy": "block", "block_structure": [40, 32]}, (3, 2), (40, 32)),
    ],
)
def test_scales_are_those_of_the_strategy(
    tmp_path: Path, scheme: dict[str, Any], grid: tuple[int, ...], block: tuple[int, int]
) -> None:
    """A grid that only divides the tensor was taken for one of blocks or groups that nobody had named."""
    assert found(tmp_path, codes(torch.float8_e4m3fn, *grid), ({**FLOAT8, **scheme}, ["Linear"])).block == block
    for other in ((1,), (96, 1), (96, 2), (3, 2), (96, 4), (2, 2), (24, 16)):
        if other not in (grid, (96, 1)) or (other == (96, 1) and 96 not in grid):
            with pytest.raises(WeightError, match=r"weight_scale' is float32 .*; required: one scale for each block"):
                found(tmp_path, codes(torch.float8_e4m3fn, *other), ({**FLOAT8, **scheme}, ["Linear"]))


def test_codes_are_of_the_type_of_the_scheme(tmp_path: Path) -> None:
    int8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    float8 = {**FLOAT8, "strategy": "channel"}
    for dtype, mine, other in ((torch.int8, int8, float8), (torch.float8_e4m3fn, float8, int8)):
        assert found(tmp_path, codes(dtype, 96, 1), (mine, ["Linear"])).block == (1, 64)
        assert found(tmp_path, codes(dtype, 96, 1), (mine, ["Linear"]), (other, ["Embedding"])).block == (1, 64)
        with pytest.raises(WeightError, match=r"up_proj.weight' is .*; required: codes of the type '(int|float)', as"):
            found(tmp_path, codes(dtype, 96, 1), (other, ["Linear"]))
    with pytest.raises(CaptureError, match=r"zero_point': codes of a byte with zero points cannot be read by parts"):
        found(tmp_path, codes(torch.int8, 96, 1), ({**int8, "symmetric": False}, ["Linear"]))
    with pytest.raises(CaptureError, match=r"weight_packed' is quantised to 8 bits of the type 'int', says config_gr"):
        found(tmp_path, words(), (int8, ["Linear"]))


@pytest.mark.parametrize(
    ("scheme", "targets", "message"),
    [
        ({**INT4, "strategy": "tensor_group"}, ["Linear"], r"strategy 'tensor_group', group_size 32 .*those that can"),
        ({**INT4, "group_size": None}, ["Linear"], r"strategy 'group', group_size None"),
        ({**INT4, "strategy": "block"}, ["Linear"], r"strategy 'block', group_size 32 and block_structure None"),
        ({**INT4, "num_bits": "4"}, ["Linear"], r"num_bits of quantization_config must be a whole number"),
        (INT4, ["re:(up_proj"], r"target '\(up_proj' in config_groups .* is no regular expression"),
    ],
)
def test_schemes_that_cannot_be_read_are_refused_by_name(
    tmp_path: Path, scheme: dict[str, Any], targets: list[str], message: str
) -> None:
    with pytest.raises(CaptureError, match=message):
        found(tmp_path, words(), (scheme, targets))
