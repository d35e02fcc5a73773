"""Ranks of this machine, started and served from one plain Python process.

    with partitioner.launch("checkpoint/", Plan(dp=2, tp=2)) as llm:
        llm.generate(prompts, max_new_tokens=20)

    python -m partitioner.serving.launch        one of its ranks; the launcher says what to load

A checkpoint folder is partitioned by each rank, as `partitioner run` has it, or taken from the user's cache of compiled
programs; of a bundle each rank reads its own part.
A model in memory is written to a bundle in a temporary folder first, which goes with this process, however that ends.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from partitioner.analysis.report.report import Report
from partitioner.compile.partition import partition
from partitioner.compile.parts import Parts
from partitioner.compile.pass_manager.pass_order import check_plan
from partitioner.errors import InputError, PlanError
from partitioner.program.plan import Plan
from partitioner.program.ranks import Ranks
from partitioner.storage import compiled
from partitioner.storage.bundle.bundle import Bundle, load
from partitioner.storage.dtypes import dtype_named
from partitioner.storage.hub import hub_hint
from partitioner.storage.recognise import is_bundle
from runtime.communication.process_groups import Sharing
from runtime.engine.engine import Engine
from runtime.kv_cache.cache_size import CacheSize
from runtime.launching.launched import Launched
from runtime.launching.replica import Replica
from runtime.launching.serve import serve
from runtime.launching.supervisor import Supervisor
from runtime.processes.capacity import require_capacity
from runtime.processes.choose_device import choose_device
from runtime.processes.launch import begin_worker, read_given, require_timeout
from runtime.processes.place import Place

__all__ = ["launch"]

_REMOVE = "import sys, shutil; sys.stdin.read(); shutil.rmtree(sys.argv[1], ignore_errors=True)"


def launch(
    model: str | Path | PreTrainedModel | Ranks,
    plan: Plan | None = None,
    *,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    max_length: int | None = None,
    checkpoint: str | Path | None = None,
    mapped: bool = False,
    checked: bool = True,
    shared_memory: Sharing = "auto",
    compile: bool = False,
    cuda_graph: bool = False,
    compiled_cache: bool = False,
    cache: CacheSize | None = None,
    max_batch: int | None = None,
    vocabulary: str | None = None,
    timeout_s: float = 60.0,
    start_timeout_s: float = 600.0,
    restart: bool = False,
) -> Launched:
    """Starts the ranks of `plan` on this machine, each replica (`dp`) with process groups of its own, and serves them.

    - model: a checkpoint folder, a bundle or its folder, what `partition` returned, or a model of transformers.
    - plan: None for that of the parts or the bundle. A plan with another number of replicas does not change these.
    - dtype, max_length: as in `partition`. mapped: as in `partition` and `load`. checkpoint, checked: as in `load`.
    - device, shared_memory, compile, cuda_graph: as in `Engine.connect`, for every rank.
    - compiled_cache: compile a checkpoint folder here, once for all ranks, and keep the program in the user's cache,
      where the next start with the same plan finds it.
    - cache: room for this many tokens in all, which requests of any length share. None: half of the free memory.
    - max_batch: how many prompts a replica runs at a time, at most. None: the `max_batch` of `cache`, or 32.
    - vocabulary: the texts of tokens, which requests with a grammar need (`partitioner.serving.grammar.vocabulary`).
    - timeout_s: how long a rank may be silent. start_timeout_s: how long all ranks may take to load.
    - restart: start a lost replica again, while others go on. Its requests raise RankLost.

    Raises in this process what keeps a rank from starting. No port is opened, except those over which the ranks of one
    replica reach each other.
    """
    if sys.platform != "linux":
        raise InputError("ranks are started by us on Linux only; use torchrun here, or parts.generate()")
    for timeout in (timeout_s, start_timeout_s):
        require_timeout(timeout)
    if max_batch is not None and max_batch < 1:
        raise InputError(f"max_batch must be at least 1, got {max_batch}")
    with contextlib.ExitStack() as stack:
        how = {"dtype": dtype, "max_length": max_length, "mapped": mapped, "checked": checked, "checkpoint": checkpoint}
        opened, plan = _opened(model, plan, how, stack)
        if compiled_cache and "folder" in opened:
            opened["key"] = _kept(opened, plan)
        ranks = plan.replica_mesh.world_size * plan.replicas
        require_capacity(ranks)
        choose_device(device, num_ranks=ranks)
        connected = {
            "device": device,
            "timeout_s": timeout_s,
            "shared_memory": shared_memory,
            "compile": compile,
            "cuda_graph": cuda_graph,
        }
        served = {"size": None if cache is None else vars(cache), "rows": max_batch, "vocabulary": vocabulary}
        given = json.dumps({"model": opened, "engine": connected, "served": served}).encode()
        places = [Place(plan.replica_mesh, 0, number, plan.replicas, False) for number in range(plan.replicas)]
        replicas = [Replica(place, timeout_s=timeout_s) for place in places]
        supervisor = Supervisor(replicas, restarts=restart)
        supervisor.start(["partitioner.serving.launch"], given, timeout_s=start_timeout_s)
        stack.callback(supervisor.close)
        return Launched(supervisor, closing=stack.pop_all())


def _opened(
    model: str | Path | PreTrainedModel | Ranks,
    plan: Plan | None,
    how: Mapping[str, Any],
    stack: contextlib.ExitStack,
) -> tuple[dict[str, Any], Plan]:
    """What ranks are told to load, and the plan."""
    said = {**how, "dtype": None if how["dtype"] is None else str(how["dtype"]).removeprefix("torch.")}
    said["checkpoint"] = None if how["checkpoint"] is None else str(how["checkpoint"])
    if isinstance(model, (str, Path)):
        if not Path(model).is_dir():
            raise InputError(f"{str(model)!r} is no folder: give a checkpoint or a bundle" + hub_hint(str(model)))
        if not is_bundle(str(model)):
            plan = check_plan(plan or Plan())
            if Plan.parse(str(plan)) == plan:
                return {**said, "folder": str(Path(model).absolute()), "plan": str(plan), "key": None}, plan
            # a pass that only this process has
            model = partition(model, plan, dtype=how["dtype"], max_length=how["max_length"], mapped=how["mapped"])
        else:
            model = load(model, checkpoint=how["checkpoint"], mapped=how["mapped"], checked=how["checked"])
    if isinstance(model, PreTrainedModel):
        model = partition(model, plan or Plan(), max_length=how["max_length"])
    if not isinstance(model, Ranks):
        raise InputError(f"launch takes a folder, a bundle, parts or a model; got a {type(model).__name__}")
    plan = _replicated(model) if plan is None else check_plan(plan)
    if plan.replica_mesh != model.mesh:
        raise PlanError(
            f"the plan {plan} has replicas of {plan.replica_mesh}, and what is there is divided as {model.mesh}: "
            "partition it for this plan, or change dp alone"
        )
    if isinstance(model, Bundle):
        return {**said, "bundle": str(model.folder.path.absolute())}, plan
    if not isinstance(model, Parts):
        raise InputError(f"a {type(model).__name__} cannot be written for other processes: give parts, or a bundle")
    folder = _temporary(stack)
    model.save(folder / "bundle")
    # the ranks of all replicas use the same pages of it
    return {**said, "bundle": str(folder / "bundle"), "mapped": True, "checkpoint": None}, plan


def _kept(opened: Mapping[str, Any], plan: Plan) -> str | None:
    """The key of the program in the user's cache, where it is from now on; None where it is not."""
    folder = Path(opened["folder"])
    if compiled.cache_folder() is None:
        return None
    key = compiled.key_of(folder, plan, dtype=opened["dtype"], max_length=opened["max_length"])
    compiled.found_or_kept(key, folder, lambda: _partitioned(opened), mapped=opened["mapped"])
    return key


def _partitioned(opened: Mapping[str, Any]) -> Parts[Report]:
    dtype = None if opened["dtype"] is None else dtype_named(opened["dtype"])
    return partition(
        opened["folder"],
        Plan.parse(opened["plan"]),
        dtype=dtype,
        max_length=opened["max_length"],
        mapped=opened["mapped"],
        read_ahead=True,
    )


def _replicated(ranks: Ranks) -> Plan:
    size = ranks.mesh.size
    dp = size("dp") * ranks.replicas
    return Plan(dp=dp, pp=size("pp"), sp=size("sp"), tp=size("tp"), ep=size("ep"), etp=size("etp"))


def _temporary(stack: contextlib.ExitStack) -> Path:
    """A folder of this user alone, removed at the end by a process that waits for the end of this one."""
    folder = tempfile.mkdtemp(prefix="partitioner-")
    remover = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _REMOVE, folder], stdin=subprocess.PIPE, start_new_session=True
    )
    stack.callback(remover.wait)
    assert remover.stdin is not None
    stack.callback(remover.stdin.close)
    return Path(folder)


def _connect() -> Engine:
    """In a rank."""
    transformers_logging.disable_progress_bar()
    given = json.loads(read_given().decode())
    model, engine = given["model"], given["engine"]
    if "folder" in model:
        ranks: Ranks = compiled.found_or_kept(
            model["key"], Path(model["folder"]), lambda: _partitioned(model), mapped=model["mapped"], keeps=False
        )
    else:
        ranks = load(model["bundle"], checkpoint=model["checkpoint"], mapped=model["mapped"], checked=model["checked"])
    return Engine.connect(ranks, **engine)


if __name__ == "__main__":
    begin_worker()
    served = json.loads(read_given().decode())["served"]
    serve(
        _connect,
        size=None if served["size"] is None else CacheSize(**served["size"]),
        rows=served["rows"],
        vocabulary=served["vocabulary"],
    )
