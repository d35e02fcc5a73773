"""How a model is compiled, as the options that commands share say it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partitioner.errors import InputError
from partitioner.program.plan import Plan
from partitioner.sharding.mesh import DEGREES
from partitioner.storage.dtypes import dtype_asked
from partitioner.storage.recognise import is_bundle

if TYPE_CHECKING:
    from partitioner.analysis.report.report import Report
    from partitioner.compile.parts import Parts
    from partitioner.program.ranks import Ranks

__all__ = ["Compile"]


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
        from partitioner.compile.pass_manager.pass_order import check_plan

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
            from partitioner.storage.bundle.bundle import load

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
        from partitioner.compile.partition import partition
        from partitioner.storage.checkpoint.open_checkpoint import can_open
        from partitioner.storage.named_model import load_model

        kind = dtype_asked(dtype)
        plan = self.plan_of(model)
        if is_bundle(model) or (can_open(model) if meta else Path(model).is_dir()):
            return partition(model, plan, dtype=kind, max_length=self.max_length, mapped=mapped, read_ahead=read_ahead)
        return partition(load_model(model, dtype=kind, meta=meta), plan, max_length=self.max_length)

    def ranks(self, model: str, *, dtype: str | None, mapped: bool, cached: bool) -> Ranks:
        """The checkpoint folder MODEL, compiled to be run; taken from the user's cache where it was before."""
        from partitioner.storage import compiled

        plan = self.plan_of(model)
        named = None if dtype in (None, "auto") else dtype
        key = compiled.key_of(Path(model), plan, dtype=named, max_length=self.max_length) if cached else None
        first = os.environ.get("RANK", "0") == "0"  # of several processes that compile the same
        here = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")  # all ranks, or this is the only one

        def compile() -> Parts[Report]:
            return self.compile(model, dtype=dtype, mapped=mapped, read_ahead=here)

        return compiled.found_or_kept(key, Path(model), compile, mapped=mapped, keeps=first)
