"""One rank as data: its programs, its integers, and a description of its weights; the graphs are files of their own.

    {"coordinates": {..}, "weights": [..], "programs": {"text": {..}, "prefill": {..}, "decode": {..}}}

"prefill" and "decode" are absent where the model cannot generate, "decode" also where it is the same as "prefill".
Schema 1 had {.., "text": {..}, "generation": {..} or null} in place of "programs".

What a weight says is in `partitioner.storage.bundle.format.weight_format`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx

from partitioner.errors import BundleError
from partitioner.sharding.index_set import IndexSet
from partitioner.sharding.mesh import AXES, Mesh
from partitioner.storage.bundle.format.stage_format import (
    head_data,
    read_dims,
    read_head,
    read_stage,
    stage_data,
)
from partitioner.storage.bundle.format.untrusted_json import (
    DOTTED,
    DTYPES,
    IDENTIFIER,
    Record,
    dtype_name,
    whole_number,
)
from runtime.program.rank_program import Bound, Entry, RankProgram, RunInput
from runtime.program.shards import StateShard, WeightShard, WeightSource

__all__ = ["program_data", "read_entries", "read_program"]

Data = dict[str, Any]
_DEFAULTS = {name: name for name in ("required", "arange", "ones", "zeros")}
_LONGEST = 2**31


def program_data(
    program: RankProgram,
    *,
    graph: str,
    integers: Sequence[int],
    weights: Sequence[int],
    head: tuple[str, Sequence[int]] | None,
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
        **({"tokens_as_rows": True} if program.tokens_as_rows else {}),
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
        "without": given.without,
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
        tokens_as_rows=record.flag("tokens_as_rows") if record.has("tokens_as_rows") else False,
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
        record.maybe("without", record.integer) if record.has("without") else None,
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
