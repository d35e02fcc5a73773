"""Whether two tensors of a checkpoint hold the same values, a strip of both at a time."""

from __future__ import annotations

import torch

from partitioner.sharding.index_set import IndexSet
from partitioner.storage.checkpoint.recording_tensor import Equal, RecordingTensor
from partitioner.storage.checkpoint.strided_windows import Moved, piece
from runtime.program.shards import WeightShard
from runtime.weights.read_shards import Reader
from runtime.weights.safetensors_files import TensorFiles

__all__ = ["same_values"]

_ROWS_BYTES = 8 << 20


def same_values(files: TensorFiles) -> Equal:
    reader = Reader(files)

    def same(first: RecordingTensor, second: RecordingTensor) -> bool:
        if not first.numel():
            return True
        rows = first.shape[0] if first.ndim else 1
        step = max(1, _ROWS_BYTES * rows // (first.numel() * first.dtype.itemsize))
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            one, other = (_read(files, reader, x, start, stop) for x in (first, second))
            if not torch.equal(one, other):
                return False
        return True

    return same


def _read(files: TensorFiles, reader: Reader, of: RecordingTensor, start: int, stop: int) -> torch.Tensor:
    shape = tuple(of.shape)
    block = tuple((0, size) for size in shape) if not shape else ((start, stop), *((0, size) for size in shape[1:]))
    local = tuple(high - low for low, high in block)
    moved: Moved = of.moved
    pieces = tuple(piece(w, files.shape(w.tensor), [0] * len(shape)) for w in moved.block(block))
    indices = tuple(IndexSet.range(*ends) for ends in block)
    shard = WeightShard("rows", of.dtype, shape, local, indices, "checkpoint", (), pieces)
    return reader.load([shard], torch.device("cpu"))[0]
