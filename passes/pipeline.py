"""The pipeline pass: marks which stage computes each node; the graph itself stays whole.

    node.meta["stages"]    {0}, {1}, ...; several for what is made of inputs, which each stage computes for itself
    program.stages         weight -> the stages that hold it: chosen by cost for the first entry, reused by the others
    the vocabulary head    where its rows are divided among all stages, {number of stages}: they compute it together

Sends and receives belong to the schedule, not to the graph: `compile.emit` cuts the graph, and `runtime.pipeline` runs
the stages one behind the other. GPipe: arXiv:1811.06965, section 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from partitioner.analysis.stages.assign_stages import assign_stages
from partitioner.analysis.stages.choose_cuts import choose_cuts
from partitioner.analysis.stages.order_nodes import sizes_from_inputs
from partitioner.analysis.stages.shared_head import share_head
from partitioner.errors import PlanError
from partitioner.program.node_arguments import arguments
from partitioner.program.program import Program
from runtime.ops.attention import attention

__all__ = ["Pipeline"]

_BALANCE = ("prefill", "decode")


@dataclass(frozen=True)
class Pipeline:
    """See the module's docstring.

    - balance: for which entry all stages should take equally long, "prefill" or "decode"; None: "decode" if the model
      is causal.
    - stage_weights: how fast the ranks of each stage are, relative to each other. Empty: all alike.
    - stage_starts: modules or weights at which the second stage and the later ones begin. Empty: chosen by cost.
    - share_head: whether the rows of the vocabulary head are divided among all stages; None: in decode, where the
      slowest stage gains by it.
    """

    name: ClassVar[str] = "pipeline"
    balance: str | None = None
    stage_weights: tuple[float, ...] = ()
    stage_starts: tuple[str, ...] = ()
    share_head: bool | None = None

    def __post_init__(self) -> None:
        if self.balance is not None and self.balance not in _BALANCE:
            raise PlanError(f"balance must be one of {', '.join(_BALANCE)}; got {self.balance!r}")
        if self.stage_weights and self.stage_starts:
            raise PlanError("stage_weights and stage_starts both say where stages end: give one of them")

    def run(self, program: Program) -> Program:
        count = program.mesh.size("pp")
        if count == 1:
            return program
        sizes_from_inputs(program)
        program.graph.eliminate_dead_code()
        if program.stages is None:
            program.stages = choose_cuts(
                program,
                count,
                balance=self.balance or ("decode" if _is_causal(program) else "prefill"),
                speeds=self.stage_weights,
                starts=self.stage_starts,
                shares_head=self.share_head,
            )
        if program.stages.shares_head:
            share_head(program, program.stages.speeds)
        assign_stages(program, program.stages)
        return program


def _is_causal(program: Program) -> bool:
    return any(node.target is attention and arguments(node)["causal"] for node in program.graph.nodes)
