"""The report of a program that continues sequences: what each rank remembers of them, split or whole and why.

    way        by the graph of the whole text with a cache, or by the model's own use of one
    caches     whether keys and values are cached, or the narrower value that they are made of, and why
    states     how each is split over the ranks, its bytes per rank, how far back it is seen
    whole      states that every rank keeps all of, with what keeps the weights that they are made with whole
    prefill    how many tokens of a prompt run at a time
    notes      what the compiler tells the user of this program

Bytes are per token, or for states that do not grow, per sequence.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import fx

from partitioner.analysis.report.report import matrix_users, pattern_of, reason_for, split_text
from partitioner.program.node_arguments import arguments, node_values, operation
from partitioner.program.program import Program, State
from runtime.kv_cache.cache_size import in_float8, longest_text, why_not_float8
from runtime.kv_cache.device_memory import readable
from runtime.ops.cached_attention import cached_attention
from runtime.ops.communicating import COMMUNICATING, axes_text
from runtime.ops.rows.sequence_attention import cached_sequence_attention
from runtime.ops.state import cache_append, position_mask, state_write
from runtime.ops.state.latent_attention import latent_attention
from runtime.ops.state.latent_sequence_attention import latent_sequence_attention
from runtime.program.rank_program import RankProgram
from runtime.program.shards import StateShard

__all__ = ["GenerationReport", "StateRow", "make_generation_report"]

_ATTENDING = (cached_attention, latent_attention, cached_sequence_attention, latent_sequence_attention)


@dataclass(frozen=True)
class StateRow:
    """States in the same place of several layers, kept alike. bytes: of one of them, whole and on each rank."""

    names: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    per_token: bool
    sees: int | None
    """How many positions back a token may look, itself included; None: all."""
    bytes: int
    bytes_per_rank: tuple[int, ...]
    split: str
    """"" for a state that every rank keeps whole; otherwise the axis, the dim and the sizes."""
    reason: str
    """Why it is whole, or why some of it is on several ranks."""

    @property
    def pattern(self) -> str:
        return pattern_of(self.names[0]) if len(self.names) > 1 else self.names[0]

    def __str__(self) -> str:
        count = f"{len(self.names)} x " if len(self.names) > 1 else ""
        per = "token" if self.per_token else "sequence"
        far = "" if self.sees is None else f", of the last {self.sees} tokens only"
        ranks = f"{_sizes(self.bytes_per_rank)} of {readable(self.bytes)}" if self.split else readable(self.bytes)
        how = f": {self.split}" if self.split else ""
        why = f": {self.reason}" if self.reason and not self.split else f" ({self.reason})" if self.reason else ""
        return f"{count}{self.pattern} {list(self.shape)} {self.dtype}, {ranks} per {per}{far}{how}{why}"


@dataclass(frozen=True)
class GenerationReport:
    """See the module's docstring. longest_text: prompt and new tokens together, None: any."""

    model: str
    plan: str
    way: str
    states: tuple[StateRow, ...]
    bytes_per_token: tuple[int, ...]
    """Of the cache on each rank, for every token of a sequence that is not out of sight yet."""
    bytes_per_sequence: tuple[int, ...]
    tokens_at_a_time: int | None
    """Of a prompt; None: any number."""
    longest_text: int | None
    further_weights: tuple[int, ...]
    """Bytes on each rank of weights that the program for whole texts does not hold in the same way."""
    notes: tuple[str, ...] = ()
    float8_per_token: tuple[int, ...] = ()
    """As `bytes_per_token`, of a cache of dtype fp8; empty where not all that is remembered is keys and values."""
    caches: tuple[str, ...] = ()
    """Of the attentions alike: what is cached for them, and why."""

    @property
    def whole(self) -> tuple[StateRow, ...]:
        """States that every rank keeps all of."""
        return tuple(row for row in self.states if not row.split)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        at_a_time = {None: "as many tokens at a time as wanted", 1: "token by token"}
        most = at_a_time.get(self.tokens_at_a_time, f"up to {self.tokens_at_a_time} tokens at a time")
        longest = "any length" if self.longest_text is None else f"up to {self.longest_text} tokens"
        lines = [f"{self.model}, {self.plan}, generation", "", f"by {self.way}"]
        lines.append(f"prompts run {most}; texts of {longest}")
        lines += [f"cache of {each}" for each in self.caches]
        lines.append("remembered, split:")
        lines += [f"  {row}" for row in self.states if row.split] or ["  nothing"]
        lines.append("remembered, whole on every rank:")
        lines += [f"  {row}" for row in self.whole] or ["  nothing"]
        if any(self.bytes_per_token):
            float8 = f", in fp8 {_sizes(self.float8_per_token)}" if self.float8_per_token else ""
            lines.append(f"cache per token: per rank {_sizes(self.bytes_per_token)}{float8}")
        if any(self.bytes_per_sequence):
            lines.append(f"cache per sequence: per rank {_sizes(self.bytes_per_sequence)}")
        if any(self.further_weights):
            lines.append(f"weights besides those of the whole text: per rank {_sizes(self.further_weights)}")
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)


def make_generation_report(
    program: Program, ranks: Sequence[RankProgram], whole_text: Sequence[RankProgram], *, prefill: Program
) -> GenerationReport:
    """Describes a program that continues sequences, after its passes; `ranks`: what it is on each of them.

    prefill: that for prompts, which remembers the same.
    """
    makers = _makers(program)
    users = matrix_users(program)
    groups: dict[tuple[object, ...], list[State]] = defaultdict(list)
    reasons: dict[str, str] = {}
    for state in program.states.values():
        reasons[state.name] = _reason(program, state, makers.get(state.name), users)
        alike = (
            pattern_of(state.name), state.shape, state.dtype, state.layout, state.sees, state.per_token,
            state.token_axes, pattern_of(reasons[state.name]),
        )  # fmt: skip
        groups[alike].append(state)
    shards = [{shard.name: shard for shard in rank.states} for rank in ranks]
    rows = tuple(
        StateRow(
            names=tuple(state.name for state in states),
            shape=states[0].shape,
            dtype=str(states[0].dtype).removeprefix("torch."),
            per_token=states[0].per_token,
            sees=states[0].sees,
            bytes=math.prod(states[0].shape) * states[0].dtype.itemsize,
            # of several stages, each has those of its own layers
            bytes_per_rank=tuple(next((held[s.name].bytes for s in states if s.name in held), 0) for held in shards),
            split=", ".join(filter(None, (split_text(states[0].layout), _tokens_text(program, states[0])))),
            reason=reasons[states[0].name],
        )
        for states in groups.values()
    )
    own = any(node.target in (cache_append, state_write, position_mask) for node in program.graph.nodes)
    return GenerationReport(
        model=program.name,
        plan=", ".join(f"{axis}={n}" for axis, n in program.mesh.degrees.items()) or "tp=1",
        way="the model's own use of a cache" if own else "attention that reads keys and values from a cache",
        states=rows,
        bytes_per_token=tuple(sum(_share(program, s) for s in rank.states if s.per_token) for rank in ranks),
        bytes_per_sequence=tuple(sum(s.bytes for s in rank.states if not s.per_token) for rank in ranks),
        tokens_at_a_time=prefill.limits.get("sequence", (1, None))[1],
        longest_text=longest_text(ranks[0]),
        further_weights=tuple(
            sum(weight.bytes for weight in rank.weights if weight not in set(known.weights))
            for rank, known in zip(ranks, whole_text, strict=True)
        ),
        notes=tuple(program.notes),
        float8_per_token=_float8_per_token(program, ranks),
        caches=_caches(program),
    )


def _float8_per_token(program: Program, ranks: Sequence[RankProgram]) -> tuple[int, ...]:
    if any(why_not_float8(rank) is not None for rank in ranks):
        return ()
    return tuple(sum(_share(program, state) for state in in_float8(rank).states) for rank in ranks)


def _caches(program: Program) -> tuple[str, ...]:
    alike: dict[tuple[str, str], list[str]] = defaultdict(list)
    for node in program.graph.nodes:
        if node.target in _ATTENDING:
            why = str(node.meta.get("why", "")).partition("; ")[2]
            state = str(node.kwargs["state"])
            alike[pattern_of(state), pattern_of(why)].append(f"{state}: {why}")
    return tuple(
        f"{len(each)} x {pattern}: {why}" if len(each) > 1 else each[0] for (pattern, why), each in alike.items()
    )


def _tokens_text(program: Program, state: State) -> str:
    axes = state.token_axes
    return f"of one token in {program.mesh.size(*axes)}, over {axes_text(axes)}" if axes else ""


def _share(program: Program, shard: StateShard) -> int:
    """Bytes for each token of a sequence, of which the rank keeps some only where it shares them out."""
    ranks = program.mesh.size(*shard.token_axes) if shard.token_axes else 1
    return -(-shard.bytes // ranks)


def _makers(program: Program) -> dict[str, fx.Node]:
    """The value that each state is filled with."""
    found: dict[str, fx.Node] = {}
    for node in program.graph.nodes:
        if node.target in (cached_attention, cached_sequence_attention):
            a = arguments(node)
            found[f"{a['state']}.key"], found[f"{a['state']}.value"] = a["k"], a["v"]
        elif node.target in (latent_attention, latent_sequence_attention):
            found[f"{node.kwargs['state']}.latent"] = arguments(node)["latent"]
        elif node.target in (cache_append, state_write):
            found[str(node.kwargs["state"])] = node.args[0]
    return found


def _reason(program: Program, state: State, maker: fx.Node | None, users: dict[str, fx.Node]) -> str:
    split = state.layout.splits
    if split:
        shared = any(sum(part.sizes) > state.shape[dim] for dim, part in split)
        return "some of it is needed, and kept, by several ranks" if shared else ""
    if state.token_axes:
        return ""
    if program.mesh.world_size == program.mesh.size("pp"):
        return "one rank" if program.mesh.world_size == 1 else "one rank in each stage"
    cause = None if maker is None else _cause(program, maker, users)
    return cause or "what fills it is the same on every rank"


def _cause(program: Program, node: fx.Node, users: dict[str, fx.Node]) -> str | None:
    """What comes first, going back from a whole value: a whole weight, or a collective that has put it together."""
    seen, queue = {node}, deque([node])
    while queue:
        node = queue.popleft()
        if node.op == "call_function" and node.target in COMMUNICATING:
            why = node.meta.get("why")
            return f"put together by {operation(node).__name__}" + (f": {why}" if why else "")
        if node.op == "get_attr" and (name := str(node.target)) in users and name not in program.weight_layouts:
            why = reason_for(program, program.weights[name], users)
            return f"made with {pattern_of(name)}, which is whole: {why}"
        new = [other for other in node.all_input_nodes if other not in seen and node_values(other)]
        seen.update(new)
        queue.extend(new)
    return None


def _sizes(counts: tuple[int, ...]) -> str:
    if len(set(counts)) == 1:
        return readable(counts[0])
    return ", ".join(map(readable, counts[:8])) + (", ..." if len(counts) > 8 else "")
