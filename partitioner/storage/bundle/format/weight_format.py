"""One weight of a rank as data: which indices of which tensor it holds, where its bytes lie, and their digest.

So a bundle can be split anew without the original. Codes of a quantised weight also say of which part of which weight
they are ("codes_of"); its scales say which rows and columns of all scales they are. The digest is checked whenever the
bytes are read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from partitioner.errors import BundleError
from partitioner.sharding.index_set import IndexSet
from partitioner.storage.bundle.format.stage_format import MOST_DIMS
from partitioner.storage.bundle.format.tiling import MOST_BLOCKS, fills
from partitioner.storage.bundle.format.untrusted_json import DOTTED, DTYPES, Record, dtype_name, whole_number
from runtime.program.shards import CODES, CodesOf, Piece, WeightShard

__all__ = ["Stored", "read_weight", "weight_data"]

Data = dict[str, Any]
_CODE_NAMES = {each: each for each in CODES}
_HELD = {each: each for each in ("codes", "zeros", "parts")}
_SOURCES = {name: name for name in ("checkpoint", "computed", "constant", "made")}
_OF_MODULES = frozenset(dir(nn.Module()))
"""Weights become attributes of modules, where they must not stand in the place of what a module is made of."""


@dataclass(frozen=True)
class Stored:
    """A weight of a rank, where its bytes lie (a file and the name in it), and their digest.

    file: None where they lie in a checkpoint, of whose tensors `shard.pieces` speaks.
    """

    shard: WeightShard
    file: str | None
    key: str
    digest: str


def weight_data(stored: Stored) -> Data:
    shard = stored.shard
    if not _is_weight_name(shard.name):
        raise BundleError(f"a bundle cannot hold a weight by the name {shard.name!r}: a module has that for itself")
    found: Data = {
        "name": shard.name,
        "dtype": dtype_name(shard.dtype),
        "global_shape": list(shard.global_shape),
        "indices": _indices_data(shard),
        "source": shard.source,
        "aliases": list(shard.aliases),
        "file": stored.file,
        "key": stored.key,
        "pieces": None if stored.file is not None else [_piece_data(piece) for piece in shard.pieces],
        "sha256": stored.digest,
    }
    # of a checkpoint's quantised tensors; in a bundle's own files they are tensors like any other
    if stored.file is None:
        return found if shard.held is None else found | {"held": shard.held}
    return found if shard.codes_of is None else found | {"codes_of": _codes_of_data(shard.codes_of)}


def _codes_of_data(of: CodesOf) -> Data:
    return {
        "dtype": dtype_name(of.weight.dtype),
        "global_shape": list(of.weight.global_shape),
        "indices": _indices_data(of.weight),
        "code": of.code,
        "computed_in": dtype_name(of.computed_in),
        "turned": of.turned,
    }


def _indices_data(shard: WeightShard) -> list[Any]:
    return [None if own is None else [list(ends) for ends in own.intervals] for own in shard.indices]


def _piece_data(piece: Piece) -> list[Any]:
    strides = None if piece.strides is None else list(piece.strides)
    blocks = ([list(ends) for ends in block] for block in (piece.source, piece.destination))
    return [piece.tensor, *blocks, piece.offset, strides]


def read_weight(record: Record) -> Stored:
    shape, indices, local = _read_part(record)
    key, file = record.text("key", longest=1000), record.maybe("file", lambda name: record.text(name, longest=200))
    whole = tuple((0, size) for size in local)
    held = record.one_of("held", _HELD) if record.has("held") else None
    counted = (*local[:-1], 2 * local[-1]) if held == "codes" and local else local
    pieces = record.maybe(
        "pieces", lambda name: tuple(_read_piece(record, piece, counted) for piece in record.list(name))
    )
    if (file is None) != (pieces is not None):
        record.fail("pieces", "given where there is no file, and only there")
    if pieces is not None and not fills(pieces, counted, held):
        record.fail("pieces", f"{MOST_BLOCKS} blocks that fill the rank's part, {list(local)}, each element once")
    digest, name = record.digest("sha256"), _weight_name(record)
    of = _read_codes_of(record.record("codes_of"), record, name) if record.has("codes_of") else None
    shard = WeightShard(
        name=name,
        dtype=record.one_of("dtype", DTYPES),
        global_shape=shape,
        local_shape=local,
        indices=indices,
        source=record.one_of("source", _SOURCES),
        aliases=record.texts("aliases", DOTTED),
        pieces=(Piece(key, whole, whole),) if pieces is None else pieces,
        digest=digest,
        held=held if pieces is not None else None,
        codes_of=of,
    )
    stored = Stored(shard, file, key, digest)
    record.done()
    return stored


def _read_part(record: Record) -> tuple[tuple[int, ...], tuple[IndexSet | None, ...], tuple[int, ...]]:
    """A tensor's shape, the indices that are held of each dim, and the shape of what is held."""
    shape = record.integers("global_shape")
    given = record.any("indices")
    if not isinstance(given, list) or len(given) != len(shape) or len(shape) > MOST_DIMS:
        record.fail("indices", f"a list with one entry for each of the {len(shape)} dims")
    indices = tuple(_indices(record, dim, size) for dim, size in enumerate(shape))
    return shape, indices, tuple(size if own is None else own.size for size, own in zip(shape, indices, strict=True))


def _read_codes_of(given: Record, record: Record, name: str) -> CodesOf:
    if not name.endswith(".codes"):
        record.fail("codes_of", "given for codes only, by a name that ends with .codes")
    shape, indices, local = _read_part(given)
    if not 2 <= len(shape) <= 3:
        given.fail("global_shape", "of a matrix, or of one for each expert")
    dtype, computed_in = given.one_of("dtype", DTYPES), given.one_of("computed_in", DTYPES)
    for field, found in (("dtype", dtype), ("computed_in", computed_in)):
        if not found.is_floating_point:
            given.fail(field, "a dtype of floating-point numbers")
    weight = WeightShard(name.removesuffix(".codes"), dtype, shape, local, indices, "checkpoint", (), ())
    of = CodesOf(weight, given.one_of("code", _CODE_NAMES), computed_in, given.flag("turned"))
    given.done()
    return of


def _weight_name(record: Record) -> str:
    name = record.text("name", DOTTED, longest=1000)
    if not _is_weight_name(name):
        record.fail("name", "a name that a module can give to a weight")
    return name


def _is_weight_name(name: str) -> bool:
    parts = name.split(".")
    return DOTTED.fullmatch(name) is not None and not any(p.startswith("__") or p in _OF_MODULES for p in parts)


def _read_piece(record: Record, given: Any, local: tuple[int, ...]) -> Piece:
    if not isinstance(given, list) or len(given) != 5 or not isinstance(given[0], str) or len(given[0]) > 1000:
        record.fail("pieces", "lists of a tensor, two blocks, an offset and strides")
    tensor, source, destination, offset, strides = given
    for block in (source, destination):
        if not isinstance(block, list) or not all(
            isinstance(ends, list) and len(ends) == 2 and all(map(whole_number, ends)) and ends[0] <= ends[1]
            for ends in block
        ):
            record.fail("pieces", "with blocks of intervals [start, stop]")
    if len(destination) != len(local) or any(stop > size for (_, stop), size in zip(destination, local, strict=True)):
        record.fail("pieces", f"within the rank's part, {list(local)}")
    plain = strides is None or (isinstance(strides, list) and all(map(whole_number, strides)))
    if not whole_number(offset) or not plain or (strides is not None and len(strides) != len(local)):
        record.fail("pieces", f"with an offset, and null or {len(local)} strides")
    read, filled = (tuple((a, b) for a, b in block) for block in (source, destination))
    return Piece(tensor, read, filled, offset, None if strides is None else tuple(strides))


def _indices(record: Record, dim: int, size: int) -> IndexSet | None:
    if record.any("indices")[dim] is None:
        return None
    owned = record.intervals("indices", dim)
    if owned and owned[-1][1] > size:
        record.fail("indices", f"within the {size} indices of dim {dim}")
    return IndexSet(owned)
