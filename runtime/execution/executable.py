"""From a rank's graph to what runs it: weights as leading arguments, communicating ops bound to a communicator.

    get_attr "model.norm.weight"     -> an argument: no module attributes are looked up while running
    all_reduce(x, "tp")              -> the communicator's own function of x
    cached_attention(.., state=..)   -> the cache's own function of the tensors
    device=... in the graph          -> the engine's device, and of what is made of no tensor

Values are dropped after their last use, as torch.fx's generated code does. On a GPU, ops in a row that go over memory
one after the other are one (`fusion/fuse_elementwise.py`), and in captured steps products with what stands around them
(`fusion/fuse_products.py`); what is profiled, or compiled by torch, runs op by op.
"""

from __future__ import annotations

import functools
import linecache
import traceback
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from runtime.communication.communicator import Binder, Communicator
from runtime.execution.fusion.few_tokens import for_single_tokens
from runtime.execution.fusion.fuse_elementwise import fused
from runtime.execution.fusion.fuse_products import is_mostly_products, with_products
from runtime.execution.overflow import Overflow
from runtime.execution.profile import Profiled, Profiler, Recording
from runtime.execution.prompts.in_turns import InTurns
from runtime.execution.prompts.tokens_as_rows import tokens_as_rows
from runtime.kv_cache.cache import Cache
from runtime.kv_cache.sharded_cache import ShardedCache
from runtime.ops.cached_attention import cached_attention
from runtime.ops.collectives import all_reduce
from runtime.ops.communicating import COMMUNICATING, read_call
from runtime.ops.experts import limit_experts
from runtime.ops.kernels.native import few_rows
from runtime.ops.rows.sequence_attention import cached_sequence_attention
from runtime.ops.state import cache_append, state_read, state_write
from runtime.ops.state.latent_attention import latent_attention
from runtime.ops.state.latent_sequence_attention import latent_sequence_attention
from runtime.program.rank_program import RankProgram

__all__ = ["OVER_CACHE", "Executable", "build", "failing_node", "has_mask", "use_few_rows"]

# operations that always return memory of their own, which a collective may therefore overwrite
_FRESH = frozenset({"add", "addmm", "baddbmm", "bmm", "embedding", "linear", "matmul", "mm", "mul"})
_FRESH_OWN = frozenset({"vocab_parallel_embedding"})


_TENSORS = ("mask", "sinks")
OVER_CACHE = {cached_attention: 4, latent_attention: 7}
"""Attentions over a cache, with the place of the mask among their operands."""
_OVER_RANKS = frozenset({cached_sequence_attention, latent_sequence_attention})
_WITH_STATE = frozenset({cached_attention, latent_attention, cache_append, state_read, state_write})


class Executable:
    """The graph of one rank, ready to run: called with its inputs, in their order, it returns the result.

    `weights` in the order of `program.weights`. A failure names its node, and wakes the ranks that wait for this one.
    """

    def __init__(
        self,
        program: RankProgram,
        weights: Sequence[Tensor],
        communicator: Communicator,
        device: torch.device,
        cache: Cache | None = None,
        profiler: Profiler | None = None,
        *,
        captured: bool = False,
    ) -> None:
        """captured: its runs are to be captured as CUDA graphs, where launches cost the host nothing."""
        self.program, self.communicator, self.device = program, communicator, device
        self.weights, self.profiler = weights, profiler
        overflow = Overflow() if profiler is None else profiler.overflow
        self._graph = bound_graph(program, communicator, device, cache, overflow)
        if device.type == "cpu" and not captured:
            use_few_rows(self._graph, weights)
        self._runs = fused(self._graph) if captured or device.type == "cuda" else self._graph
        if captured:
            length = None if cache is None else lambda: cache.max_length
            self._runs = for_single_tokens(self._runs, len(program.weights), length)
            self._runs = with_products(self._runs, len(program.weights))
        self.is_by_own_kernels = captured and is_mostly_products(self._runs, weights)
        """Whether a run of few tokens leaves a compiler little to gain."""
        limits = any(node.target is limit_experts for node in program.graph.nodes)
        self._overflow = overflow if limits else None
        self.function = functools.partial(fx.GraphModule({}, self._runs).forward, *weights)
        """What runs, bare: of the inputs in their order."""
        self._profiled: Profiled | None = None
        self._no_grad = torch.no_grad()
        self._seen: set[Hashable] = set()

    @functools.cached_property
    def _in_turns(self) -> InTurns:
        # fused on a CPU too, where its ops do what those before did: norms behind sums are begun with these
        return InTurns(self.program, fused(self._graph), self.communicator, self.weights, overwrites=_is_last_use)

    def __call__(self, values: Sequence[Tensor], *, like: Hashable = None) -> Any:
        """like: runs that are alike have an equal one, on all ranks; None: those with inputs of the same shapes."""
        return self._told(_shapes(values) if like is None else like, lambda: self._once(values))

    def in_turns(self, several: Sequence[Sequence[Tensor]], resume: Callable[[int], None]) -> list[Any]:
        """Several runs, which take turns where others would wait: see `in_turns.py`. One by one where that is observed.

        `resume(i)` is called whenever the i-th of them goes on.
        """

        def one_by_one() -> list[Any]:
            found = []
            for number, values in enumerate(several):
                resume(number)
                found.append(self._once(values))
            return found

        return self._told(  # type: ignore[no-any-return]
            ("in turns", *map(_shapes, several)),
            one_by_one if self.is_observed else lambda: self._in_turns(several, resume),
        )

    @property
    def is_observed(self) -> bool:
        """Whether runs are recorded, or counted, node by node."""
        profiler = self.profiler
        return profiler is not None and (profiler.recording is not None or profiler.routing is not None)

    def bare_in_turns(self, several: Sequence[Sequence[Tensor]], resume: Callable[[int], None]) -> list[Any]:
        """The same, as `function` is one run."""
        return self._in_turns(several, resume)

    def _once(self, values: Sequence[Tensor]) -> Any:
        profiler = self.profiler
        recording = None if profiler is None else profiler.recording
        if profiler is not None and profiler.routing is not None:
            return profiler.routing.run(self.program, self._graph, (*self.weights, *values))
        return self.function(*values) if recording is None else self._run_profiled(recording, values)

    def _told(self, shapes: Hashable, run: Callable[[], Any]) -> Any:
        """`run` between what others are told before and after, or of its failure."""
        self.communicator.begin_run(new_shapes=shapes not in self._seen)
        try:
            # not inference_mode: the caller may write to what comes back
            with self._no_grad:
                result = run()
        except BaseException as error:
            name = failing_node(error)
            for node in self.program.graph.nodes:
                if node.name == name:
                    error.add_note(
                        f"at node {name!r} of {node.meta.get('path') or 'the graph'}, rank {self.program.rank}"
                    )
            self.communicator.abort(error)
            raise
        self._seen.add(shapes)
        if self._overflow is not None:
            self._overflow.tell()
        return result

    def _run_profiled(self, recording: Recording, values: Sequence[Tensor]) -> Any:
        if not recording.by_node:
            start = recording.now()
            result = self.function(*values)
            recording.add_run(values, start, recording.now())
            return result
        if self._profiled is None:
            self._profiled = Profiled(self.program, self._graph, self.weights)
            # generating code takes longer than many a run: without this the others' first wait would be for that
            if self.program.stage is None:  # stages come here one after the other
                self.communicator.barrier()
        return self._profiled(recording, values)


def _shapes(values: Sequence[Tensor]) -> Hashable:
    return tuple(value.shape for value in values)


def build(program: RankProgram, communicator: Binder, device: torch.device, cache: Cache | None) -> Callable[..., Any]:
    """A function of the weights in the order of `program.weights`, then of the inputs in their order."""
    function: Callable[..., Any] = fx.GraphModule({}, bound_graph(program, communicator, device, cache)).forward
    return function


def bound_graph(
    program: RankProgram,
    communicator: Binder,
    device: torch.device,
    cache: Cache | None,
    overflow: Overflow | None = None,
) -> fx.Graph:
    """The graph of that function. overflow: where choices are counted that full experts leave out."""
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    arguments = {weight.name: graph.placeholder(f"weight_{index}") for index, weight in enumerate(program.weights)}
    source = program.graph
    if program.tokens_as_rows:
        source = tokens_as_rows(source, whole=None if cache else {state.name: state.shape for state in program.states})
    for node in source.nodes:
        if node.op == "get_attr":
            copied[node] = arguments[str(node.target)]
            continue
        new = copied[node] = graph.node_copy(node, copied.__getitem__)
        if node.op == "call_function":
            assert callable(node.target)
            if node.target in _OVER_RANKS and isinstance(cache, ShardedCache):
                call = read_call(new)
                channel = communicator.channel(call.axes, node=node.name)
                new.target = cache.bind_over_ranks(channel, call.options, op=node.target)
                new.args, new.kwargs = call.operands, {}
            elif node.target in COMMUNICATING:
                _bind(new, node, communicator)
            elif node.target is limit_experts and overflow is not None:
                path, options = str(node.meta.get("path") or node.name), dict(new.kwargs)
                new.target, new.kwargs = overflow.bind(path, device=device, **options), {}  # type: ignore[arg-type]
            elif node.target in _WITH_STATE and cache is not None:
                options = dict(new.kwargs)
                masked = has_mask(new)
                state = str(options.pop("state"))
                tensors = {name: options.pop(name) for name in list(options) if name in _TENSORS}
                new.target, new.kwargs = cache.bind(node.target, state, options, masked=masked), tensors
            else:
                new.args = fx.node.map_aggregate(new.args, lambda leaf: _moved(leaf, device))
                new.kwargs = fx.node.map_aggregate(new.kwargs, lambda leaf: _moved(leaf, device))
                if _makes_from_nothing(node.target):
                    new.kwargs = {**new.kwargs, "device": device}
    return graph


def use_few_rows(graph: fx.Graph, weights: Sequence[Tensor]) -> None:
    """Puts linears that read their weights faster in the place of torch's, which what torch compiles keeps."""
    if not any(few_rows.may_take(weight) for weight in weights) or few_rows.missing():
        return
    for node in graph.nodes:
        if node.target is functional.linear:
            node.target = few_rows.linear


def has_mask(node: fx.Node) -> bool:
    """Whether an attention over a cache is given a mask as a tensor."""
    place = OVER_CACHE.get(node.target)  # type: ignore[arg-type]
    if place is None:
        return False
    return node.kwargs.get("mask") is not None or (len(node.args) > place and node.args[place] is not None)


def failing_node(error: BaseException) -> str | None:
    """The name of the node at which an executable raised `error`, read off the generated line; None: somewhere else."""
    found = None
    for frame, line in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_filename.startswith("<eval_with_key>"):
            found = linecache.getline(frame.f_code.co_filename, line).partition(" = ")[0].strip()
    return found


def _bind(new: fx.Node, node: fx.Node, communicator: Binder) -> None:
    call = read_call(new)
    assert callable(node.target)
    new.target = communicator.bind(
        node.target, call.axes, node=node.name, options=call.options, overwrite=_is_last_use(node)
    )
    new.args, new.kwargs = call.operands, {}
    if node.target is all_reduce and isinstance(communicator, Communicator):  # what is compiled by torch is not fused
        new.meta["channel"] = communicator.channel(call.axes, node=node.name)


def _is_last_use(node: fx.Node) -> bool:
    source = node.all_input_nodes[0]
    if not callable(source.target) or len(source.users) != 1:
        return False
    name = source.target.__name__.partition(".")[0]
    is_torch = source.target.__module__ is None or source.target.__module__.partition(".")[0] == "torch"
    return name in (_FRESH if is_torch else _FRESH_OWN)


@functools.cache
def _makes_from_nothing(target: Any) -> bool:
    """Whether an op makes a tensor of no other, on a device that it is told: `zeros`, `arange` and their like."""
    if not isinstance(target, torch._ops.OpOverload):
        return False
    given = target._schema.arguments
    return any(each.name == "device" for each in given) and not any("Tensor" in str(each.type) for each in given)


def _moved(leaf: Any, device: torch.device) -> Any:
    return device if isinstance(leaf, torch.device) else leaf
