import io
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from partitioner.errors import WeightError
from partitioner.sharding.index_set import IndexSet
from runtime.program.shards import Block, Piece, WeightShard, at, extents
from runtime.weights import read_shards as reading
from runtime.weights.progress import Progress
from runtime.weights.read_shards import Reader
from runtime.weights.safetensors_files import TensorFiles

CPU = torch.device("cpu")
ROWS, COLUMNS = 300, 5000
TENSORS = {
    "w": torch.arange(ROWS * COLUMNS, dtype=torch.float32).reshape(ROWS, COLUMNS),
    "v": torch.arange(COLUMNS, dtype=torch.float64),
    "scalar": torch.tensor(3.0),
}


@pytest.fixture
def reader(tmp_path: Path) -> Reader:
    save_file(TENSORS, tmp_path / "model.safetensors")
    return Reader(TensorFiles(tmp_path))


def shard(name: str, block: Block, *, dtype: torch.dtype | None = None) -> WeightShard:
    source, local = TENSORS[name], extents(block)
    indices = tuple(IndexSet.range(*ends) for ends in block)
    piece = Piece(name, block, tuple((0, size) for size in local))
    return WeightShard(name, dtype or source.dtype, tuple(source.shape), local, indices, "checkpoint", (), (piece,))


def load(reader: Reader, *shards: WeightShard) -> list[Tensor]:
    return reader.load(shards, CPU)


BLOCKS = {
    "rows": ("w", ((100, 200), (0, COLUMNS)), 1.0),
    "wide columns": ("w", ((0, ROWS), (0, 2500)), 1.0),
    "narrow columns": ("w", ((0, ROWS), (2000, 2500)), 10.0),
    "corner": ("w", ((7, 8), (3, 9)), 1.0),
    "vector": ("v", ((10, 4000),), 1.0),
    "scalar": ("scalar", (), 1.0),
}


@pytest.mark.parametrize("strip", [1 << 12, 1 << 16, 8 << 20])
@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_is_read_and_little_else(
    reader: Reader, name: str, strip: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "STRIP_BYTES", strip)
    of, block, factor = BLOCKS[name]
    (found,) = load(reader, shard(of, block))
    wanted = TENSORS[of][at(block)]
    assert torch.equal(found, wanted)
    assert found.untyped_storage().nbytes() == wanted.nbytes, "a tensor of its own"
    assert wanted.nbytes <= reader.bytes_read <= factor * wanted.nbytes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_pieces_are_cast_while_they_are_read(reader: Reader, dtype: torch.dtype) -> None:
    (found,) = load(reader, shard("w", ((0, 10), (1, 4000)), dtype=dtype))
    assert torch.equal(found, TENSORS["w"][:10, 1:4000].to(dtype))


def test_a_column_slice_needs_no_more_memory_than_a_strip(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "STRIP_BYTES", 1 << 16)
    sizes: list[int] = []
    real = torch.empty

    def empty(*args, **options) -> Tensor:
        made = real(*args, **options)
        sizes.append(made.nbytes)
        return made

    monkeypatch.setattr(torch, "empty", empty)
    load(reader, shard("w", ((0, ROWS), (2000, 2500))))
    local, *buffers = sizes
    assert local == ROWS * 500 * 4
    assert len(buffers) > 10
    assert max(buffers) <= 1 << 16


def test_what_lies_in_the_file_as_needed_can_be_mapped(reader: Reader) -> None:
    mapped = Reader(reader.files, mapped=True)
    rows, columns, scalar = load(
        mapped, shard("w", ((5, 200), (0, COLUMNS))), shard("w", ((0, ROWS), (0, 2500))), shard("scalar", ())
    )
    cast, vector = load(mapped, shard("w", ((5, 6), (0, 9)), dtype=torch.bfloat16), shard("v", ((3, 4000),)))
    assert torch.equal(rows, TENSORS["w"][5:200])
    assert torch.equal(columns, TENSORS["w"][:, :2500])
    assert torch.equal(cast, TENSORS["w"][5:6, :9].bfloat16())
    assert torch.equal(vector, TENSORS["v"][3:4000])
    assert scalar.item() == 3
    assert mapped.bytes_read == rows.nbytes + columns.nbytes + 4 + 9 * 4 + vector.nbytes
    again = load(mapped, shard("w", ((5, 200), (0, COLUMNS))), shard("w", ((0, ROWS), (0, 2500))))
    assert again[0].data_ptr() == rows.data_ptr(), "no copy"
    assert again[1].data_ptr() == columns.data_ptr()
    assert columns.stride() == (COLUMNS, 1)
    rows.zero_()
    assert not columns[5:200].any(), "of the same memory"
    assert torch.equal(load(reader, shard("w", ((5, 200), (0, COLUMNS))))[0], TENSORS["w"][5:200]), "the file is whole"


@pytest.mark.parametrize("mapped", [False, True])
def test_what_is_large_is_read_as_what_is_small(reader: Reader, mapped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "HUGE_BYTES", 1)  # into memory of another kind
    shards = [shard(*BLOCKS[name][:2]) for name in BLOCKS] + [shard("v", ((1, 9),), dtype=torch.float32)]
    for one, found in zip(shards, load(Reader(reader.files, mapped=mapped), *shards), strict=True):
        wanted = TENSORS[one.name][at(one.pieces[0].source)].to(one.dtype)
        assert torch.equal(found, wanted)
        if not mapped:
            found.zero_()  # the caller's own
    assert torch.equal(load(reader, shards[0])[0], TENSORS["w"][100:200])


def test_memory_that_there_is_not_is_told_in_bytes(reader: Reader) -> None:
    shape = (1 << 24, 1 << 24)  # beyond the addresses of a process
    weight = WeightShard("w", torch.float32, shape, shape, (None, None), "checkpoint", (), ())
    with pytest.raises(RuntimeError, match=str(weight.bytes)):
        load(reader, weight)


def test_several_pieces_and_an_order_of_their_own(reader: Reader) -> None:
    pieces = (
        Piece("w", ((0, 4), (0, 3)), ((0, 3), (0, 4)), 0, (1, COLUMNS)),
        Piece("v", ((0, 4),), ((3, 4), (0, 4))),
    )
    given = WeightShard("made", torch.float64, (4, 4), (4, 4), (None, None), "checkpoint", (), pieces)
    (found,) = load(reader, given)
    assert torch.equal(found, torch.cat([TENSORS["w"][:4, :3].t().double(), TENSORS["v"][None, :4]]))


@pytest.mark.parametrize("mapped", [False, True])
def test_a_file_that_was_written_anew_is_refused(tmp_path: Path, mapped: bool) -> None:
    """Of the same size and header, so that nothing else would tell."""
    save_file(TENSORS, tmp_path / "model.safetensors")
    reader = Reader(TensorFiles(tmp_path), mapped=mapped)
    os.utime(tmp_path / "model.safetensors", ns=(0, 10**9))
    with pytest.raises(WeightError, match=r"model\.safetensors was written anew after it was opened"):
        load(reader, shard("w", ((0, 2), (0, COLUMNS))))


def test_another_checkpoint_is_refused(reader: Reader) -> None:
    with pytest.raises(WeightError, match=r"'w' of shape \[300, 5000\] does not hold what 'w' needs of it"):
        load(
            reader, WeightShard(**{**vars(shard("w", ((0, 2), (0, 2)))), "pieces": (Piece("w", ((0, 2),), ((0, 2),)),)})
        )
    with pytest.raises(WeightError, match=r"holds no tensor 'x', needed for 'w'"):
        load(reader, WeightShard(**{**vars(shard("w", ((0, 2), (0, 2)))), "pieces": (Piece("x", (), ()),)}))


def test_a_file_that_shrinks_while_it_is_read_is_seen(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TensorFiles, "open", lambda self, file: os.open(file, os.O_RDONLY))
    (file,) = {entry.file for entry in reader.files.entries.values()}
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(WeightError, match="is cut short: it ends within"):
        load(reader, shard("w", ((0, ROWS), (0, COLUMNS))), shard("v", ((0, COLUMNS),)))


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_for_terminals(reader: Reader, terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    said = io.StringIO()
    said.isatty = lambda: terminal  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", said)
    reader.load([shard("w", ((0, ROWS), (0, COLUMNS)))], CPU, progress=True)
    assert ("0.01 of 0.01 GB" in said.getvalue()) == terminal
    with Progress("nothing", 0, show=True) as shown:
        shown.advance(0)
