"""Loading a checkpoint at tp = 2: time, memory and bytes read, against transformers.

    ours                 partition(folder, Plan(tp=2)) and the rank's shard: the trace, the compilation, the reading
    ours, mapped         the same with mapped=True: weights stay in the page cache; and with read_ahead=True
    second start         as `partitioner run` and `serve` start when they have compiled the model before, mapped: what
                         is known of the program is found in the user's cache, which the clock includes
    a bundle             load(bundle, mapped=True): compiled before; it refers to the checkpoint's weights, and they
                         are compared with their digests
    a bundle, unchecked  the same without the comparison: nobody else compares either
    tp_plan="auto"       transformers' own tensor parallelism, from_pretrained

A Llama-shaped checkpoint in bfloat16 is written into a temporary folder, a file per layer, so that making it takes
little memory. Each contestant is two processes over gloo on this machine, started afresh, one thread each; they take
turns, and of the two ranks the worse counts. Times are from after the imports and the connection until every page of
the rank's weights has been touched (transformers maps files, which are read only then). `reading` leaves out what ours
does before: tracing and compiling, which does not grow with the weights, or reading the bundle's program. `warm`: the
files are in the page cache. `cold`: the kernel was asked to drop them.

private: the highest Private_Dirty of /proc/self/smaps_rollup, sampled: what is the process's own and cannot be dropped.
What the imports take is in it. resident: VmHWM, mapped files included. Both are printed because they are not the same
for a mapped file: its pages can be dropped, and come from the disk again.

    python -m benchmarks.loading                    4.3 GB, three rounds, ten minutes
    python -m benchmarks.loading --gb 0.5
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: it reads this once
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import transformers
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import distributed as dist
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.support.peers import AUTO, OURS, tp_plan_auto
from benchmarks.support.ranks import launch_ranks
from benchmarks.support.rounds import Ratio
from partitioner import Parts, Plan, load, partition
from partitioner.analysis.report.report import Report
from partitioner.cli.common.tables import print_table
from partitioner.program.ranks import Ranks
from partitioner.storage.compiled import found_or_kept, key_of
from runtime.communication.process_groups import ProcessGroups
from runtime.processes.launch import begin_worker
from runtime.program.rank_program import RankProgram
from runtime.weights.load_weights import load_weights
from runtime.weights.read_shards import Reader

SIZES = {
    "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 11008,
    "vocab_size": 32000,
}  # fmt: skip
PLAN = Plan.parse("tp=2")
MAPPED, SECOND, BUNDLE, UNCHECKED = "ours, mapped", "second start", "a bundle", "a bundle, unchecked"
PAGE_BYTES = 4096
SAMPLED_EVERY_S = 0.05
ALLOWED, ALLOWED_BYTES, ALLOWED_READ = 1.05, 250e6, 1.1

console = Console(width=None if sys.stdout.isatty() else 110)


def make_checkpoint(folder: Path, gigabytes: float) -> float:
    """Writes one file per layer; returns the bytes of all."""
    with torch.device("meta"):
        layer = sum(
            p.numel() for p in LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=1)).model.layers[0].parameters()
        )
        layers = max(1, round((gigabytes * 1e9 / 2 - 2 * SIZES["vocab_size"] * SIZES["hidden_size"]) / layer))
        model = LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=layers, dtype="bfloat16"))
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    files: dict[str, dict[str, torch.Size]] = {}
    for name, tensor in model.state_dict().items():
        part = name.split(".")[2] if ".layers." in name else name.split(".")[-2]
        files.setdefault(f"model-{part}.safetensors", {})[name] = tensor.shape
    values = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16) * 0.02
    total = 0
    for file, shapes in files.items():
        # what the weights are makes no difference to loading them
        tensors = {
            name: values.repeat(-(-shape.numel() // len(values)))[: shape.numel()].view(shape)
            for name, shape in shapes.items()
        }
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / file, metadata={"format": "pt"})
        total += sum(tensor.nbytes for tensor in tensors.values())
    places = {name: file for file, shapes in files.items() for name in shapes}
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def forget(folder: Path) -> None:
    """Asks the kernel to drop the files from its page cache."""
    for file in folder.glob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


# -- a rank ------------------------------------------------------------------------------------------------------------


def private_bytes() -> int:
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Private_Dirty:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/smaps_rollup has no Private_Dirty")


@contextmanager
def peak() -> Iterator[list[int]]:
    """[highest value so far], sampled by a thread."""
    highest, ended = [private_bytes()], threading.Event()

    def sample() -> None:
        while not ended.wait(SAMPLED_EVERY_S):
            highest[0] = max(highest[0], private_bytes())

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield highest
    finally:
        ended.set()
        thread.join()
        highest[0] = max(highest[0], private_bytes())


def touch(tensors: list[torch.Tensor]) -> None:
    """Reads something of every page: a mapped file is only read then."""
    for tensor in tensors:
        tensor[..., :: PAGE_BYTES // tensor.dtype.itemsize].sum()


def resident_bytes() -> int:
    """The highest so far, mapped files included."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM:")).split()[1]) * 1024


def compiled(contestant: str, folder: Path, bundle: Path, rank: int) -> RankProgram:
    if contestant in (BUNDLE, UNCHECKED):
        return load(bundle, rank=rank, checkpoint=folder, mapped=True, checked=contestant == BUNDLE)
    mapped = contestant != OURS

    def compile() -> Parts[Report]:
        if contestant == SECOND:
            raise LookupError("the cache of compiled programs holds no program of this checkpoint")
        return partition(folder, PLAN, mapped=mapped, read_ahead=mapped)

    key = key_of(folder, PLAN, dtype=None, max_length=None) if contestant == SECOND else None
    ranks: Ranks = found_or_kept(key, folder, compile, mapped=mapped)
    return ranks.rank(rank)


def rank_main(contestant: str, folder: Path, bundle: Path, answers: Path) -> None:
    begin_worker()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    mesh = PLAN.mesh
    communicator = ProcessGroups.connect(mesh)  # both use its process group
    rank = communicator.rank
    found: dict[str, Any] = {"imports": private_bytes()}
    with peak() as highest:
        dist.barrier()
        started = time.perf_counter()
        if contestant != AUTO:
            program = compiled(contestant, folder, bundle, rank)
            program.graph  # noqa: B018 - builds it
            ready = time.perf_counter()
            assert isinstance(program.source, Reader)
            tensors = load_weights(program.weights, program.weight_data, program.source, torch.device("cpu"))
            stored = sum(weight.bytes for weight in program.weights if weight.source == "checkpoint")
            found |= {"shard": stored, "read": program.source.bytes_read}
        else:
            ready = started
            model = tp_plan_auto(folder)
            tensors = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
            tensors = [tensor.detach() for tensor in tensors]
            found["shard"] = sum(tensor.nbytes for tensor in tensors)
        touch(tensors)
        ended = time.perf_counter()
        found |= {"reading": ended - ready, "seconds": ended - started}
    found |= {"peak": highest[0], "resident": resident_bytes()}
    (answers / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    communicator.close()


# -- all of them -------------------------------------------------------------------------------------------------------


def turn(contestant: str, folder: Path, bundle: Path) -> dict[str, float]:
    """The worse of the two ranks, in each respect."""
    with tempfile.TemporaryDirectory() as answers:
        command = ["benchmarks.loading", "--rank", contestant, str(folder), str(bundle), answers]
        launch_ranks(command, num_ranks=PLAN.mesh.world_size, timeout_s=600)
        ranks = [json.loads(path.read_text()) for path in sorted(Path(answers).iterdir())]
    return {field: max(rank[field] for rank in ranks) for field in ranks[0]}


def compare(folder: Path, bundle: Path, rounds: int, *, cold: bool) -> None:
    ours = [OURS, MAPPED, SECOND, BUNDLE, UNCHECKED]
    contestants = [*ours, *([AUTO] if importlib.util.find_spec("accelerate") is not None else [])]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in contestants}
    for number in range(rounds):
        for name in contestants[:: 1 if number % 2 == 0 else -1]:
            if cold:
                forget(folder)
            found[name].append(turn(name, folder, bundle))
    table = Table()
    for column in ("contestant", "reading s", "in all s", "shard GB", "private GB", "resident GB", "read / shard"):
        table.add_column(column, justify="left" if column == "contestant" else "right", no_wrap=True)
    for name, turns in found.items():
        middle = {field: statistics.median(turn[field] for turn in turns) for field in turns[0]}
        giga = (f"{middle[field] / 1e9:.3f}" for field in ("shard", "peak", "resident"))
        read = f"{middle['read'] / middle['shard']:.3f}" if "read" in middle else ""
        table.add_row(name, f"{middle['reading']:.2f}", f"{middle['seconds']:.2f}", *giga, read)
    print_table("cold: from the disk" if cold else "warm: from the page cache", table)
    copied = found[OURS]
    worst = max(turn["peak"] / (ALLOWED * turn["shard"] + ALLOWED_BYTES) for turn in copied)
    read = max(turn["read"] / turn["shard"] for turn in copied)
    imports = max(turn["imports"] for turn in copied) / 1e9
    console.print(
        f"ours: private / (1.05 shard + 250 MB) {worst:.3f}, of it the imports {imports:.3f} GB; "
        f"bytes read / shard {read:.3f} (at most 1 and {ALLOWED_READ})"
    )
    if AUTO in found:
        for name in ours:
            ratios = {
                field: Ratio.of(*([turn[field] for turn in found[which]] for which in (name, AUTO)))
                for field in ("reading", "seconds", "peak", "resident")
            }
            said = ", ".join(f"{field} {ratio}" for field, ratio in ratios.items())
            console.print(f"{name} / {AUTO}: {said}", markup=False)
    else:
        console.print(f"left out: transformers' {AUTO}, which needs accelerate (pip install accelerate)", markup=False)


def main() -> None:
    parser = argparse.ArgumentParser(description="Loading a checkpoint, against transformers.")
    parser.add_argument("--gb", type=float, default=4.3)
    parser.add_argument("--rounds", type=int, default=3, help="at least 2")
    parser.add_argument("--rank", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rank is not None:
        rank_main(given.rank[0], *map(Path, given.rank[1:]))
        return
    with tempfile.TemporaryDirectory() as made:
        folder, bundle = Path(made, "checkpoint"), Path(made, "bundle")
        folder.mkdir()
        total = make_checkpoint(folder, given.gb)
        console.print(f"a checkpoint of {total / 1e9:.2f} GB in {len(list(folder.glob('*.safetensors')))} files")
        os.environ["XDG_CACHE_HOME"] = str(Path(made, "cache"))
        parts = partition(folder, PLAN)
        parts.save(bundle, reference=True)
        found_or_kept(key_of(folder, PLAN, dtype=None, max_length=None), folder, lambda: parts, mapped=True)
        for cold in (False, True):
            compare(folder, bundle, max(2, given.rounds), cold=cold)


if __name__ == "__main__":
    main()
