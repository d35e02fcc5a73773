"""Save every architecture of the zoo, and compare what is read by parts with what from_pretrained loads, bit for bit.

python -m tests.supported_models.checkpoints [names]    a line each: verdict, tensors stored, weights, why it is refused

Each is built tiny, saved with small shards, and loaded in its own dtype, in bfloat16 and in float16. equal: every
weight and buffer has the dtype and, whole and cut in 2 and in 3 along every dim, the bits of the model that
from_pretrained yields. wrong: must never happen. refused: an error says why. unbuilt: transformers cannot save or load
it itself.
"""

from __future__ import annotations

import itertools
import logging
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from partitioner.capture.trace.fake_model import named_tensors
from partitioner.capture.trace.weight_names import ModelWeights
from partitioner.errors import PartitionerError, WeightError
from partitioner.sharding.index_set import IndexSet
from partitioner.storage.checkpoint.open_checkpoint import Checkpoint, open_checkpoint
from runtime.program.shards import WeightShard, at
from runtime.weights.safetensors_files import TensorFiles
from tests.support import zoo

SHARD = "40KB"
DTYPES = (None, torch.bfloat16, torch.float16)


def same_bits(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    one, other = (t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (one, other))
    return torch.equal(one, other)


def blocks(shape: tuple[int, ...]) -> Iterator[tuple[tuple[int, int], ...]]:
    """The whole, and every third and half of every dim."""
    full = tuple((0, size) for size in shape)
    yield full
    for dim, size in enumerate(shape):
        for parts in (2, 3):
            ends = [size * i // parts for i in range(parts + 1)]
            for low, high in itertools.pairwise(ends):
                if low < high:
                    yield (*full[:dim], (low, high), *full[dim + 1 :])


def shard(name: str, tensor: Tensor, block: tuple[tuple[int, int], ...]) -> WeightShard:
    indices = tuple(IndexSet.range(low, high) for low, high in block)
    local = tuple(high - low for low, high in block)
    return WeightShard(name, tensor.dtype, tuple(tensor.shape), local, indices, "checkpoint", (), ())


def without_scales(model: PreTrainedModel) -> PreTrainedModel:
    """`model`, which from_pretrained has dequantised, without the scales that some versions leave beside weights."""
    for name in model.state_dict().keys() - type(model)(model.config).state_dict().keys():
        module, _, tensor = name.rpartition(".")
        assert re.fullmatch("weight_(scale|zero_point|shape|packed)", tensor), name
        delattr(model.get_submodule(module), tensor)
    return model


def differences(opened: Checkpoint, expected: PreTrainedModel) -> Iterator[str]:
    """What of `opened` is not as in `expected`, which from_pretrained loaded."""
    wanted = dict(named_tensors(expected))
    found = dict(named_tensors(opened.model))
    if wanted.keys() != found.keys():
        yield f"other tensors: {sorted(wanted.keys() ^ found.keys())[:3]}"
        return
    known = ModelWeights(opened.model)
    reader = opened.origins.source
    saved = set(expected.state_dict())
    shards = []
    for name, tensor in wanted.items():
        if tuple(found[name].shape) != tuple(tensor.shape) or found[name].dtype != tensor.dtype:
            yield f"{name}: {found[name].dtype}{list(found[name].shape)} for {tensor.dtype}{list(tensor.shape)}"
        elif name in known.computed:
            (value,) = known.data([known.canonical[name]]).values()
            if not same_bits(value, tensor.to(value.dtype)):
                yield f"{name}: computed differently"
        elif name in opened.origins.moved:
            shards += [(block, shard(name, found[name], block)) for block in blocks(tuple(tensor.shape))]
        elif name in opened.origins.computed:
            raise WeightError(opened.origins.computed[name])
        elif name in saved:
            yield f"{name}: not read from the checkpoint"
    pieces = [(block, WeightShard(**{**vars(s), "pieces": opened.origins.of(s)})) for block, s in shards]
    loaded = reader.load([s for _, s in pieces], torch.device("cpu"))
    for (block, s), tensor in zip(pieces, loaded, strict=True):
        if not same_bits(tensor, wanted[s.name][at(block)]):
            yield f"{s.name}{list(block)}: other values"
            return


def survey(name: str) -> tuple[str, str]:
    """(verdict, line)."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            model, _ = zoo.tiny(name)
            model = model.float()
            model.save_pretrained(folder, max_shard_size=SHARD)
            loaded = [type(model).from_pretrained(folder, dtype=dtype or "auto") for dtype in DTYPES]
        except Exception as error:
            return "unbuilt", f"{type(error).__name__}: {error}"
        try:
            for dtype, expected in zip(DTYPES, loaded, strict=True):
                opened = open_checkpoint(folder, dtype=dtype)
                if type(opened.model) is not type(expected):
                    return "wrong", f"{type(opened.model).__name__} for {type(expected).__name__}"
                for complaint in differences(opened, expected):
                    return "wrong", f"{dtype}: {complaint}"
        except PartitionerError as error:
            return "refused", str(error).replace(folder, "FOLDER")
        except Exception as error:
            return "crashed", f"{type(error).__name__}: {error}"
        return "equal", f"{len(TensorFiles(folder).entries)} tensors, {len(opened.origins.moved)} weights"


def main(names: list[str]) -> int:
    logging.disable(logging.WARNING)
    transformers_logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    counts: dict[str, Any] = {}
    for name in names or zoo.names():
        verdict, line = survey(name)
        counts[verdict] = counts.get(verdict, 0) + 1
        print(f"{name:32} {verdict:8} {' '.join(line.split())[:500]}", flush=True)
    print(counts)
    return 1 if counts.get("wrong") or counts.get("crashed") else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
