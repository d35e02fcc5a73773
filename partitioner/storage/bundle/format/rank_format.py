"""One rank as data: its programs, its integers, and a description of its weights; the graphs are files of their own.

    {"coordinates": {..}, "weights": [..], "programs": {"text": {..}, "prefill": {..}, "decode": {..}}}

"prefill" and "decode" are absent where the model cannot generate, "decode" also where it is the same as "prefill".
Schema 1 had {.., "text": {..}, "generation": {..} or null} in place of "programs".

A weight says which indices of which tensor it holds, so that a bundle can be split anew without the original, and has a
digest of its bytes, which is checked whenever they are read.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from partitioner.errors import BundleError
from partitioner.sharding.index_set import IndexSet
from partitioner.sharding.mesh import AXES, Mesh
from partitioner.storage.bundle.format.stage_format import (
    MOST_DIMS,
    head_data,
    read_dims,
    read_head,
    read_stage,
    stage_data,
)
from partitioner.storage.bundle.format.tiling import MOST_BLOCKS, fills
from partitioner.storage.bundle.format.untrusted_json import (
    DOTTED,
    DTYPES,
    IDENTIFIER,
    Record,
    dtype_name,
    whole_number,
)
from runtime.program.rank_program import Bound, Entry, RankProgram, RunInput
from runtime.program.shards import Piece, StateShard, WeightShard, WeightSource

__all__ = ["Stored", "program_data", "read_entries", "read_program", "read_weight", "weight_data"]

Data = dict[str, Any]
_DEFAULTS = {name: name for name in ("required", "arange", "ones", "zeros")}
_HELD = {each: each for each in ("codes", "zeros", "parts")}
_SOURCES = {name: name for name in ("checkpoint", "computed", "constant", "made")}
_LONGEST = 2**31
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


# -- weights -----------------------------------------------------------------------------------------------------------


def weight_data(stored: Stored) -> Data:
    shard = stored.shard
    if not _is_weight_name(shard.name):
        raise BundleError(f"a bundle cannot hold a weight by the name {shard.name!r}: a module has that for itself")
    found: Data = {
        "name": shard.name,
        "dtype": dtype_name(shard.dtype),
        "global_shape": list(shard.global_shape),
        "indices": [None if own is None else [list(ends) for ends in own.intervals] for own in shard.indices],
        "source": shard.source,
        "aliases": list(shard.aliases),
        "file": stored.file,
        "key": stored.key,
        "pieces": None if stored.file is not None else [_piece_data(piece) for piece in shard.pieces],
        "sha256": stored.digest,
    }
    # of a checkpoint's quantised tensors; in a bundle's own files they are tensors like any other
    return found if stored.file is not None or shard.held is None else found | {"held": shard.held}


def _piece_data(piece: Piece) -> list[Any]:
    strides = None if piece.strides is None else list(piece.strides)
    blocks = ([list(ends) for ends in block] for block in (piece.source, piece.destination))
    return [piece.tensor, *blocks, piece.offset, strides]


def read_weight(record: Record) -> Stored:
    shape = record.integers("global_shape")
    given = record.any("indices")
    if not isinstance(given, list) or len(given) != len(shape) or len(shape) > MOST_DIMS:
        record.fail("indices", f"a list with one entry for each of the {len(shape)} dims")
    indices = tuple(_indices(record, dim, size) for dim, size in enumerate(shape))
    local = tuple(size if own is None else own.size for size, own in zip(shape, indices, strict=True))
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
    digest = record.digest("sha256")
    shard = WeightShard(
        name=_weight_name(record),
        dtype=record.one_of("dtype", DTYPES),
        global_shape=shape,
        local_shape=local,
        indices=indices,
        source=record.one_of("source", _SOURCES),
        aliases=record.texts("aliases", DOTTED),
        pieces=(Piece(key, whole, whole),) if pieces is None else pieces,
        digest=digest,
        held=held if pieces is not None else None,
    )
    stored = Stored(shard, file, key, digest)
    record.done()
    return stored


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


# -- programs ----------------------------------------------------------------------------------------------------------


def program_data(
    program: RankProgram,
    *,
    graph: str,
    integers: Sequence[int],
    weights: Sequence[int],
    head: tuple[str, Sequence[int]] | None = None,
) -> Data:
    """`graph`: the digest of its text; `weights`: places in the rank's list of weights, in the program's order.

    head: the digest and integers of the graph of a shared head.
    """
    found: Data = {
        "graph": graph,
        "integers": list(integers),
        "weights": list(weights),
        "inputs": [_input_data(given) for given in program.inputs],
        "states": [
            {
                "name": state.name,
                "shape": list(state.shape),
                "dtype": dtype_name(state.dtype),
                "sees": state.sees,
                "per_token": state.per_token,
                "block": state.block,
                "token_axes": list(state.token_axes),
            }
            for state in program.states
        ],
        "eos_token_id": list(program.eos_token_id),
        "generation_config": dict(program.generation),
        "vocab_size": program.vocab_size,
        "vocabulary": None
        if program.vocabulary is None
        else [[list(ends) for ends in own.intervals] for own in program.vocabulary],
        "limits": {name: list(limit) for name, limit in program.limits.items()},
        "stage": None if program.stage is None else stage_data(program.stage),
        **({"batch_axes": list(program.batch_axes)} if program.batch_axes else {}),
    }
    if head is not None and program.shared_head is not None:
        found["shared_head"] = head_data(program.shared_head, graph=head[0], integers=head[1])
        found["vocabulary_axes"] = list(program.vocabulary_axes)
    return found


def _input_data(given: RunInput) -> Data:
    bound = given.bound
    return {
        "name": given.name,
        "dtype": dtype_name(given.dtype),
        "shape": list(given.shape),
        "default": given.default,
        "bound": None
        if bound is None
        else {"low": bound.low, "high": bound.high, "rows": bound.rows, "table": bound.table},
    }


def read_entries(record: Record, read: Callable[[Record], RankProgram], *, schema: int) -> dict[Entry, RankProgram]:
    """The programs of a rank by entry; "prefill" and "decode" are one object where the file holds one."""
    if schema == 1:
        found: dict[Entry, RankProgram] = {"text": read(record.record("text"))}
        generation = record.maybe("generation", lambda name: read(record.record(name)))
        return found if generation is None else {**found, "prefill": generation, "decode": generation}
    programs = record.record("programs")
    found = {"text": read(programs.record("text"))}
    if programs.has("prefill"):
        found["prefill"] = found["decode"] = read(programs.record("prefill"))
        if programs.has("decode"):
            found["decode"] = read(programs.record("decode"))
    programs.done()
    return found


def read_program(
    record: Record,
    *,
    mesh: Mesh,
    coordinates: Mapping[str, int],
    weights: Sequence[WeightShard],
    read_graph: Callable[..., fx.Graph],
    source: WeightSource,
    where: str,
) -> RankProgram:
    """`read_graph(digest, integers=, inputs=, weights=)` builds a graph of the bundle, when it is asked for."""
    has_stage = record.has("stage")  # schema 1 knew none
    digest, integers = record.digest("graph"), record.integers("integers", low=-(2**62))
    mine = tuple(weights[place] for place in record.integers("weights", high=len(weights) - 1))
    inputs = tuple(map(_read_input, record.records("inputs")))
    for what, names in (("inputs", [x.name for x in inputs]), ("weights", [w.name for w in mine])):
        if len(set(names)) != len(names):
            record.fail(what, "of different names")
    known = {weight.name for weight in mine}
    inner = [name for name in sorted(known) if any(outer in known for outer in _outer(name))]
    if inner:
        raise BundleError(f"{record.where}: the weight {inner[0][:100]!r} lies within another weight")
    stage = record.maybe("stage", lambda name: read_stage(record.record(name), coordinates)) if has_stage else None
    received = [f"receive_{i}" for i in range(len(stage.receives))] if stage is not None else []
    build = functools.partial(read_graph, weights=[w.name for w in mine])
    given = [x.name for x in inputs]
    head = read_head(record.record("shared_head"), build, inputs=given) if record.has("shared_head") else None
    if head is not None and stage is None:
        record.fail("shared_head", "given where there are stages")
    axes = _read_vocabulary_axes(record)
    program = RankProgram(
        build_graph=functools.partial(build, digest, integers=integers, inputs=[*given, *received]),
        mesh=mesh,
        coordinates=coordinates,
        weights=mine,
        inputs=inputs,
        eos_token_id=record.integers("eos_token_id"),
        generation=_read_generation(record),
        states=tuple(map(_read_state, record.records("states"))),
        vocab_size=record.integer("vocab_size", high=_LONGEST),
        vocabulary=_read_vocabulary(record, mesh, axes),
        vocabulary_axes=axes,
        limits=_read_limits(record.record("limits")),
        stage=stage,
        batch_axes=_read_batch_axes(record, mesh),
        shared_head=head,
        source=source,
        read_from=where,
    )
    record.done()
    return program


def _read_batch_axes(record: Record, mesh: Mesh) -> tuple[str, ...]:
    """Of programs whose ranks have sequences of their own."""
    if not record.has("batch_axes"):
        return ()
    axes = record.texts("batch_axes", IDENTIFIER)
    if len(axes) != 1 or axes[0] not in AXES or mesh.size(*axes) == 1:
        record.fail("batch_axes", "one axis of attention with more than one rank")
    return axes


def _read_generation(record: Record) -> dict[str, Any]:
    """By names that `generate` checks, values with them; bundles that are older do not have it."""
    if not record.has("generation_config"):
        return {}
    said = record.record("generation_config")
    for name in said.fields():
        if not IDENTIFIER.fullmatch(name):
            record.fail("generation_config", "values by plain names")
    return {name: said.any(name) for name in said.fields()}


def _outer(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def _read_input(record: Record) -> RunInput:
    found = RunInput(
        record.text("name", IDENTIFIER),
        record.one_of("dtype", DTYPES),
        read_dims(record),
        record.one_of("default", _DEFAULTS),
        record.maybe("bound", lambda name: _read_bound(record.record(name))),
    )
    record.done()
    return found


def _read_bound(record: Record) -> Bound:
    low, high = record.integer("low", low=-(2**62)), record.integer("high", low=-(2**62))
    bound = Bound(low, high, record.integer("rows"), record.text("table", DOTTED, longest=1000))
    record.done()
    return bound


def _read_state(record: Record) -> StateShard:
    state = StateShard(
        record.text("name", DOTTED, longest=1000),
        record.integers("shape", high=2**31),
        record.one_of("dtype", DTYPES),
        record.maybe("sees", functools.partial(record.integer, low=1)),
        record.flag("per_token"),
        # schema 1 had neither
        record.maybe("block", functools.partial(record.integer, low=1)) if record.has("block") else None,
        record.texts("token_axes", IDENTIFIER) if record.has("token_axes") else (),
    )
    if state.bytes > 2**40:
        record.fail("shape", "of less than a terabyte")
    record.done()
    return state


def _read_vocabulary_axes(record: Record) -> tuple[str, ...]:
    """Those of a shared head; tp, where the last stage has it."""
    if not record.has("vocabulary_axes"):
        return ("tp",)
    axes = record.texts("vocabulary_axes", IDENTIFIER)
    if axes not in (("tp",), ("pp",), ("pp", "tp")):
        record.fail("vocabulary_axes", "pp, tp or both in this order")
    return axes


def _read_vocabulary(record: Record, mesh: Mesh, axes: tuple[str, ...]) -> tuple[IndexSet, ...] | None:
    given = record.any("vocabulary")
    if given is None:
        return None
    size = mesh.size(*axes)
    if not isinstance(given, list) or len(given) != size:
        record.fail("vocabulary", f"a list with one entry for each of the {size} ranks along {' x '.join(axes)}")
    owned = tuple(IndexSet(record.intervals("vocabulary", index)) for index in range(len(given)))
    size = record.integer("vocab_size", high=_LONGEST)
    if any(own.intervals and own.intervals[-1][1] > size for own in owned):
        record.fail("vocabulary", f"within the {size} indices of the vocabulary")
    return owned


def _read_limits(record: Record) -> dict[str, tuple[int, int | None]]:
    found: dict[str, tuple[int, int | None]] = {}
    for name in record.fields():
        ends = record.any(name)
        if not isinstance(ends, list) or len(ends) != 2 or not IDENTIFIER.fullmatch(name):
            record.fail(name, "the smallest and the largest size")
        low, high = ends
        if not whole_number(low, high=_LONGEST) or not (high is None or whole_number(high, low=low, high=_LONGEST)):
            record.fail(name, "the smallest and the largest size, or null for no limit")
        found[name] = (low, high)
    return found
