"""What the ranks of a bundle hold of weights as a quantised checkpoint stores them: checked, and as quantised tensors.

    "q.weight.codes" [.., N, K]   ".scales", ".zeros" [R, G]   ".rows" [.., N]   ".columns" [K]        of one rank
    ->   HeldSlice: which part of "q.weight" that is, and which row and column of the table of all scales is whose
    ->   Packed: the same part as a quantised tensor, to be read as numbers

Nothing of it is believed before it was compared: an index that names no scale would be read out of bounds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from partitioner.errors import BundleError
from partitioner.sharding.index_set import IndexSet
from partitioner.storage.bundle.slice_pieces import Part, part_of
from partitioner.storage.checkpoint.quantized_finder import FLOAT8, SCALES
from partitioner.storage.checkpoint.stored_form import inputs_last
from runtime.ops.kernels.stored.stored_linear import stored_grouped_linear, stored_linear, stored_weight
from runtime.program.rank_program import RankProgram
from runtime.program.shards import CodesOf, WeightShard
from runtime.weights.quantized.packed import Packed
from runtime.weights.read_shards import Reader

__all__ = ["HeldSlice", "held_by", "require_described"]

_CODES_AT = {stored_grouped_linear: 1, stored_linear: 1, stored_weight: 0}
"""Where the codes stand among the arguments."""


@dataclass(frozen=True, eq=False)
class HeldSlice:
    """One rank's part of a weight. part: in the order of its codes, inputs last. rows [.., N], groups [K]: the row and
    the column of the table of all scales for each of its rows and inputs.
    """

    key: str
    of: CodesOf
    part: Part
    codes: WeightShard
    scales: WeightShard
    zeros: WeightShard | None
    rows: Tensor
    groups: Tensor
    packed: Packed

    @property
    def kind(self) -> tuple[object, ...]:
        """What all slices of a weight have in common."""
        zeros = None if self.zeros is None else self.zeros.global_shape
        whole = self.of.weight.global_shape, self.of.weight.dtype, self.scales.global_shape, self.scales.dtype
        return (*whole, zeros, self.codes.dtype, self.of.code, self.of.computed_in, self.of.turned)


def held_by(programs: Iterable[RankProgram], reader: Reader, where: str) -> dict[tuple[str, ...], HeldSlice]:
    """What programs hold as stored, by the keys of its tensors. Raises `BundleError` where these do not fit."""
    found: dict[tuple[str, ...], HeldSlice] = {}
    for program in programs:
        named = {weight.name: weight for weight in program.weights}
        for codes in program.weights:
            if codes.codes_of is not None:
                of = codes.codes_of
                roles = {role: named.get(f"{of.weight.name}.{role}") for role in ("scales", "zeros", "rows", "columns")}
                keys = tuple(each.pieces[0].tensor for each in (codes, *roles.values()) if each is not None)
                if keys not in found:
                    found[keys] = _slice(codes, of, roles, reader, f"{where}: the stored weight {of.weight.name!r}")
    return found


def require_described(program: RankProgram, where: str) -> None:
    """Raises `BundleError` where a graph uses codes, and nothing says of which part of which weight they are."""
    described = {weight.name for weight in program.weights if weight.codes_of is not None}
    for node in program.graph.nodes:
        if node.op == "call_function" and node.target in _CODES_AT:
            codes = node.args[_CODES_AT[node.target]]
            if codes.op != "get_attr" or codes.target not in described:
                raise BundleError(
                    f"{where} holds weights as a quantised checkpoint stores them, and does not say which part of "
                    f"which weight {str(codes.target)[:100]!r} is: an older version wrote it, or it was altered; it "
                    "runs with the plan that it was made for; to reshard it, partition the checkpoint again"
                )


def _slice(
    codes: WeightShard, of: CodesOf, roles: Mapping[str, WeightShard | None], reader: Reader, where: str
) -> HeldSlice:
    mine = inputs_last(of.weight, of.turned)
    scales, zeros, rows, columns = (roles[role] for role in ("scales", "zeros", "rows", "columns"))
    if scales is None or rows is None or columns is None:
        missing = next(role for role in ("scales", "rows", "columns") if roles[role] is None)
        raise BundleError(f"{where} lacks its {missing}: the bundle is incomplete, or was altered; write it anew")
    *outer, inputs = mine.local_shape
    in_bytes = of.code == "float8"
    _require(
        codes,
        (*FLOAT8, torch.int8) if in_bytes else (torch.uint8,),
        (*outer, inputs if in_bytes else -(-inputs // 2)),
        where,
    )
    if len(scales.local_shape) != 2:
        _fail(scales, "a table of rows and columns", where)
    _require(scales, (*SCALES, torch.uint8), scales.local_shape, where)
    if zeros is not None:
        _require(zeros, (torch.uint8,) if of.code == "int4" else (), scales.local_shape, where)
        if (zeros.global_shape, zeros.indices) != (scales.global_shape, scales.indices):
            _fail(zeros, "the same part of the table as the scales", where)
    _require(rows, (torch.int32,), tuple(outer), where)
    _require(columns, (torch.int32,), (inputs,), where)
    places = []
    for shard, count, what in ((rows, scales.local_shape[0], "rows"), (columns, scales.local_shape[1], "columns")):
        (given,) = reader.load([shard], torch.device("cpu"))
        if given.numel() and not 0 <= int(given.min()) <= int(given.max()) < count:
            wrong = int(given.min()) if int(given.min()) < 0 else int(given.max())
            raise BundleError(
                f"{where}: {shard.name!r} names number {wrong} of the {count} {what} of its scales; required is 0 to "
                f"{count - 1}; the bundle was altered, or whoever wrote it is wrong: write it anew"
            )
        places.append(given.long())
    names = {"codes": codes, "scales": scales, "zeros": zeros}
    parts = {role: shard.pieces[0].tensor for role, shard in names.items() if shard is not None}
    key = codes.pieces[0].tensor
    packed = Packed(
        key, f"held-{of.code}", mine.local_shape, parts, (1, 1), of.computed_in, groups=places[1], rows=places[0]
    )
    table = part_of(scales)
    at_rows, at_groups = (_numbers(own)[place] for own, place in zip(table, places, strict=True))
    return HeldSlice(key, of, part_of(mine), codes, scales, zeros, at_rows, at_groups, packed)


def _numbers(indices: IndexSet) -> Tensor:
    runs = [torch.arange(*ends) for ends in indices.intervals]
    return torch.cat(runs) if runs else torch.zeros(0, dtype=torch.int64)


def _require(shard: WeightShard, dtypes: Sequence[torch.dtype], shape: tuple[int, ...], where: str) -> None:
    if shard.dtype not in dtypes or shard.local_shape != shape:
        known = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes) or "none at all"
        _fail(shard, f"{known} {list(shape)}", where)


def _fail(shard: WeightShard, required: str, where: str) -> NoReturn:
    got = f"{str(shard.dtype).removeprefix('torch.')} {list(shard.local_shape)}"
    raise BundleError(f"{where}: {shard.name!r} is {got}; required: {required}; the bundle was altered: write it anew")
