"""The options that commands share: each has one name, one default and one help text, wherever it stands.

A new one gets a type here, a field of `Compile`, and a parameter of the commands in `app.py`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Self

import torch
import typer

from partitioner.analysis.report.report import Report
from partitioner.compile.partition import partition
from partitioner.compile.parts import Parts
from partitioner.compile.pass_order import check_plan
from partitioner.errors import InputError
from partitioner.program.plan import Plan
from partitioner.program.ranks import Ranks
from partitioner.sharding.mesh import DEGREES
from partitioner.storage import compiled
from partitioner.storage.bundle.bundle import load
from partitioner.storage.checkpoint.open_checkpoint import can_open
from partitioner.storage.named_model import dtype_named, load_model
from partitioner.storage.recognise import is_bundle

__all__ = [
    "CacheDtype",
    "Checkpoint",
    "Compile",
    "CompileSteps",
    "Device",
    "Dp",
    "Dtype",
    "Ep",
    "Job",
    "KeepWhole",
    "MaxBatch",
    "MaxLength",
    "Model",
    "ModelWithTokenizer",
    "NoCache",
    "Passes",
    "PlanText",
    "Pp",
    "Revision",
    "Simulate",
    "Timeout",
    "Tp",
    "Verbose",
]

Model = Annotated[
    str,
    typer.Argument(
        help="a checkpoint folder, a hub's org/name, a bundle to reshard, config:FILE.json, or a model type"
    ),
]
PlanText = Annotated[
    str | None,
    typer.Option("--plan", help='degrees and options of passes, such as "tp=2,pp=2" or "tp=4,keep_whole=[*.head]"'),
]
Tp = Annotated[
    int | None,
    typer.Option(
        "--tp",
        "--tensor-parallel-size",
        "--tensor_parallel_size",
        "--tp-size",
        "-tp",
        help="tensor-parallel ranks; by default 1, or those of the bundle",
    ),
]
Pp = Annotated[
    int | None,
    typer.Option(
        "--pp",
        "--pipeline-parallel-size",
        "--pipeline_parallel_size",
        "--pp-size",
        "-pp",
        help="pipeline stages; by default 1, or those of the bundle",
    ),
]
Ep = Annotated[
    int | None,
    typer.Option(
        "--ep",
        "--expert-parallel-size",
        "--expert_parallel_size",
        "--ep-size",
        help="ranks that share out the experts of each layer; by default 1, or those of the bundle",
    ),
]
Sp = Annotated[
    int | None,
    typer.Option(
        "--sp",
        "--context-parallel-size",
        "--context_parallel_size",
        help="ranks that share out the tokens of each sequence; by default 1, or those of the bundle",
    ),
]
Dp = Annotated[
    int | None,
    typer.Option(
        "--dp",
        "--data-parallel-size",
        "--data_parallel_size",
        "--dp-size",
        "-dp",
        help="replicas, which share out requests; by default 1, or those of the bundle",
    ),
]
ModelWithTokenizer = Annotated[
    str,
    typer.Argument(
        help="a checkpoint folder with its tokenizer, a hub's org/name, or a bundle; by default a small trained one"
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(help="dtype of the weights; by default (or auto) the checkpoint's, or what the configuration names"),
]
Device = Annotated[
    str, typer.Option(help="cpu, cuda, or auto: GPUs if this machine has one for each of its ranks, else cpu")
]
CompileSteps = Annotated[
    bool, typer.Option("--compile/--no-compile", help="compile decode steps by torch.compile, which takes a minute")
]
Revision = Annotated[
    str | None, typer.Option(help="branch, tag or commit of a repository on a hub; by default its main branch")
]
MaxBatch = Annotated[int | None, typer.Option(help="how many prompts run at a time, at most; by default all")]
KeepWhole = Annotated[
    list[str] | None, typer.Option(help="weights that stay whole on every rank: names, in which * matches anything")
]
Passes = Annotated[list[str] | None, typer.Option("--pass", help="name of an installed pass to run as well")]
Verbose = Annotated[bool, typer.Option("--verbose", help="print what compiling did, and how long each step took")]
CacheDtype = Annotated[
    str | None,
    typer.Option(
        "--cache-dtype",
        "--kv-cache-dtype",
        help="fp8: cache keys and values as float8 with a scale per token and head",
    ),
]
NoCache = Annotated[bool, typer.Option("--no-cache", help="do not use or keep compiled programs in the user's cache")]
MaxLength = Annotated[
    int | None,
    typer.Option(help="length of the longest text, in tokens; matters for rotary embeddings that depend on it"),
]
Simulate = Annotated[bool, typer.Option("--simulate", help="run all ranks in this process, one thread each")]
Timeout = Annotated[float, typer.Option("--timeout", help="kill the whole run after this many seconds")]
Checkpoint = Annotated[
    str | None, typer.Option(help="folder with the weights of a bundle that was exported with --reference")
]


@dataclass(frozen=True)
class Compile:
    """How a model is compiled. None and (): the default of every command. text: a plan, as `Plan.parse` reads it."""

    tp: int | None = None
    keep_whole: tuple[str, ...] = ()
    passes: tuple[str, ...] = ()
    max_length: int | None = None
    text: str | None = None
    pp: int | None = None
    ep: int | None = None
    sp: int | None = None
    dp: int | None = None
    verbose: bool = False

    @classmethod
    def of(
        cls,
        *,
        dp: int | None,
        tp: int | None,
        pp: int | None,
        ep: int | None,
        sp: int | None,
        plan: str | None,
        keep_whole: list[str] | None,
        passes: list[str] | None,
        max_length: int | None,
        verbose: bool = False,
    ) -> Compile:
        """What the command line was given; its passes are installed, and serve what it asks for."""
        how = cls(tp, tuple(keep_whole or ()), tuple(passes or ()), max_length, plan, pp, ep, sp, dp, verbose)
        check_plan(how.plan)
        return how

    @classmethod
    def from_data(cls, fields: Mapping[str, Any]) -> Compile:
        """What `dataclasses.asdict` made, after JSON."""
        given: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()
        }
        return cls(**given)

    @property
    def plan(self) -> Plan:
        return self.plan_of(None)

    def plan_of(self, model: str | None) -> Plan:
        """The plan for MODEL, which may be a bundle with a number of ranks of its own."""
        plan = Plan.parse(self.text or "")
        asked = {"dp": self.dp, "tp": self.tp, "pp": self.pp, "ep": self.ep, "sp": self.sp}
        given = {axis: size for axis, size in asked.items() if size is not None}
        for axis, size in given.items():
            if self.text and size != plan.degree(axis):
                raise InputError(f"--{axis} {size} and --plan {self.text!r} disagree: give one of them")
        degrees = {axis: plan.degree(axis) for axis in DEGREES}
        if not self.text and not given.keys() - {"dp"} and model is not None and is_bundle(model):
            bundle = load(model)
            degrees = {axis: bundle.mesh.size(axis) for axis in DEGREES}
            degrees["dp"] *= bundle.replicas
        elif plan.dp_follows:
            del degrees["dp"]  # it follows from the others, which are not all here yet
        axes: dict[str, Any] = {**degrees, **given}
        return Plan(
            **axes,
            sp_attention=plan.sp_attention,
            weights=plan.weights,
            cache=plan.cache,
            keep_whole=(*plan.keep_whole, *self.keep_whole),
            passes=(*plan.passes, *self.passes),
        )

    def require_none(self, model: str) -> None:
        """Raises where anything is asked for that a bundle, which runs as it is, has decided already."""
        given = {"--keep-whole": self.keep_whole, "--pass": self.passes, "--max-length": self.max_length}
        for option, value in given.items():
            if value:
                raise InputError(
                    f"{model!r} is a bundle, which is compiled already: leave {option} out, or reshard it by "
                    f"partitioner export, which takes it"
                )

    def compile(
        self, model: str, *, dtype: str | None, meta: bool = False, mapped: bool = False, read_ahead: bool = False
    ) -> Parts[Report]:
        """MODEL compiled. `meta`: where it is no folder, without data. `read_ahead`: of a checkpoint."""
        kind: torch.dtype | None = None if dtype in (None, "auto") else dtype_named(str(dtype))
        plan = self.plan_of(model)
        if is_bundle(model) or (can_open(model) if meta else Path(model).is_dir()):
            return partition(model, plan, dtype=kind, max_length=self.max_length, mapped=mapped, read_ahead=read_ahead)
        return partition(load_model(model, dtype=kind, meta=meta), plan, max_length=self.max_length)

    def ranks(self, model: str, *, dtype: str | None, mapped: bool, cached: bool) -> Ranks:
        """The checkpoint folder MODEL, compiled to be run; taken from the user's cache where it was before."""
        plan = self.plan_of(model)
        named = None if dtype in (None, "auto") else dtype
        key = compiled.key_of(Path(model), plan, dtype=named, max_length=self.max_length) if cached else None
        first = os.environ.get("RANK", "0") == "0"  # of several processes that compile the same
        here = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")  # all ranks, or this is the only one

        def compile() -> Parts[Report]:
            return self.compile(model, dtype=dtype, mapped=mapped, read_ahead=here)

        return compiled.found_or_kept(key, Path(model), compile, mapped=mapped, keeps=first)


@dataclass(frozen=True)
class Job:
    """What is done with MODEL, as the ranks that do it are told: plain data, lists as tuples."""

    model: str
    compile: Compile = field(default_factory=Compile)

    def __post_init__(self) -> None:
        self.plan  # noqa: B018 - checks the degrees

    @property
    def plan(self) -> Plan:
        return self.compile.plan

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        told: dict[str, Any] = json.loads(text)
        fields: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in told.items()}
        return cls(**{**fields, "compile": Compile.from_data(told["compile"])})
