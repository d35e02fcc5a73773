"""Linears that the tools of AWQ and GPTQ have packed (`make.py`), read to the bits that these tools dequantise to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from partitioner.storage.checkpoint.quantized_tensors import checkpoint_files
from runtime.program.shards import Piece
from runtime.weights.read_shards import Reader
from tests.partitioner.storage.checkpoint.own_tools import make
from tests.supported_models.checkpoints import blocks, same_bits, shard

WORDS = Path(__file__).with_name("words.safetensors")
NAME = f"{make.OWNER}.weight"
FORMS = [*make.GPTQ, "awq"]


def written(form: str, folder: Path) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of a folder that holds them, and the numbers [N, K]."""
    found = {
        name.removeprefix(f"{form}/"): each for name, each in load_file(WORDS).items() if name.startswith(f"{form}/")
    }
    with safe_open(WORDS, "pt") as opened:
        fields = json.loads(opened.metadata()[form])
    expected = found.pop("expected").T.contiguous()
    put(folder, found, fields)
    return found, expected


def put(folder: Path, tensors: dict[str, Tensor], fields: dict[str, Any]) -> None:
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": fields}))


def read(folder: Path, block: tuple[tuple[int, int], ...]) -> Tensor:
    files = checkpoint_files(folder)
    numbers = torch.empty(files.packed[NAME].shape, dtype=torch.float16, device="meta")
    described = shard(NAME, numbers, block)
    piece = Piece(NAME, block, tuple((0, stop - start) for start, stop in block))
    own = type(described)(**{**vars(described), "pieces": (piece,)})
    return Reader(files).load([own], torch.device("cpu"))[0]


@pytest.mark.parametrize("form", FORMS)
def test_what_the_tool_packed_is_read_to_its_bits(form: str, tmp_path: Path) -> None:
    """Whole, and cut in two and three along both dims: words of eight, and groups, lie across the cuts."""
    _, expected = written(form, tmp_path)
    for block in blocks(tuple(expected.shape)):
        assert same_bits(read(tmp_path, block), expected[tuple(slice(*ends) for ends in block)]), block


def test_zeros_of_0_have_borrowed_from_their_neighbours(tmp_path: Path) -> None:
    """Version 1 takes one of each zero by whole words. Without a zero of 0 the forms above would not show it."""
    tensors, expected = written("gptq", tmp_path)
    stored = tensors[f"{make.OWNER}.qzeros"].long()
    each = torch.stack([stored >> 4 * place & 15 for place in range(8)], -1)
    true = torch.stack([(stored + 0x11111111) >> 4 * place & 15 for place in range(8)], -1)
    assert bool((true == 0).any())
    assert not torch.equal((each + 1) & 15, true)
    tensors[f"{make.OWNER}.qzeros"][0, 0] += 1  # the negative control
    put(tmp_path, tensors, {"quant_method": "gptq", "bits": 4, "group_size": make.GROUP})
    assert not same_bits(read(tmp_path, ((0, 64), (0, 64))), expected)


@pytest.mark.slow
def test_autoawq_still_packs_so() -> None:
    pytest.importorskip("awq", reason="autoawq is not installed: what it packed is in words.safetensors")
    made, _ = make.by_autoawq()
    kept = load_file(WORDS)
    assert all(torch.equal(tensor, kept[f"awq/{name}"]) for name, tensor in made.items())
