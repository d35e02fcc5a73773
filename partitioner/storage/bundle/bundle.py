"""A bundle, loaded: the ranks of a partitioned model, read when they are asked for.

bundle = load("bundle/")             the manifest
bundle.generate(ids)                 as `Parts` has it; Engine.connect(bundle) reads this process's rank only
load("bundle/", rank=2)              one rank's program, which knows where its weights are
partition("bundle/", Plan(tp=4))     resharded: ranks take what they need from these files
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import overload

import torch
from torch import fx

from partitioner.errors import BundleError, PlanError
from partitioner.program.ranks import Ranks
from partitioner.proof.meetings import check_meetings
from partitioner.sharding.mesh import AXES, Mesh
from partitioner.storage.bundle.format.bundle_files import Folder
from partitioner.storage.bundle.format.graph_format import build
from partitioner.storage.bundle.format.manifest import DIGEST, File, Manifest
from partitioner.storage.bundle.format.rank_format import read_entries, read_program
from partitioner.storage.bundle.format.untrusted_json import CONTROL, Record
from partitioner.storage.bundle.format.weight_format import Stored, read_weight
from partitioner.storage.bundle.held_slices import HeldSlice, held_by
from partitioner.storage.checkpoint.quantized_tensors import checkpoint_files
from partitioner.storage.recognise import MANIFEST
from runtime.program.bundle_errors import attribute_errors
from runtime.program.host_default import host_default
from runtime.program.rank_program import Entry, RankProgram, require_entry
from runtime.weights.read_shards import Reader
from runtime.weights.safetensors_files import TensorFiles

__all__ = ["Bundle", "load"]

_CPU = torch.device("cpu")


@overload
def load(
    folder: str | Path, *, checkpoint: str | Path | None = None, mapped: bool = False, checked: bool = True
) -> Bundle: ...
@overload
def load(
    folder: str | Path, *, rank: int, checkpoint: str | Path | None = None, mapped: bool = False, checked: bool = True
) -> RankProgram: ...
def load(
    folder: str | Path,
    *,
    rank: int | None = None,
    checkpoint: str | Path | None = None,
    mapped: bool = False,
    checked: bool = True,
) -> Bundle | RankProgram:
    """Reads what `parts.save(folder)` wrote. Executes nothing of it, and checks all that it reads.

    - rank: return this rank's program only.
    - checkpoint: the folder with the weights, if the bundle only refers to them; it is never taken from the bundle.
    - mapped: on a CPU, memory-map the weights; the files must not change (`runtime.weights.read_shards`).
    - checked: compare the weights with the digests that were recorded, which reads all of their bytes. Shapes, dtypes
      and offsets are checked in any case.

    Raises `BundleError` if the bundle is damaged, altered, or of a newer version; for weights, engines raise
    `WeightError` when they read them.
    """
    bundle = Bundle(folder, checkpoint=checkpoint, mapped=mapped, checked=checked)
    return bundle if rank is None else bundle.rank(rank)


class Bundle(Ranks):
    """See the module's docstring."""

    def __init__(
        self,
        folder: str | Path,
        *,
        checkpoint: str | Path | None = None,
        mapped: bool = False,
        checked: bool = True,
    ) -> None:
        self.mapped = mapped
        self._checked = checked
        self.folder = Folder(folder)
        self.manifest = Manifest.read(self.folder)
        if checkpoint is not None and not self.manifest.checkpoint:
            raise BundleError(f"{folder} holds its weights itself: leave checkpoint={str(checkpoint)!r} out")
        self._checkpoint = checkpoint
        self._ranks: dict[int, dict[Entry, RankProgram]] = {}
        self._lock = threading.Lock()  # simulated ranks ask at the same time

    @property
    def mesh(self) -> Mesh:
        return self.manifest.mesh

    @property
    def replicas(self) -> int:
        return self.manifest.replicas

    @cached_property
    def report(self) -> str:
        """What was split, what was not and why, as it was when the bundle was written."""
        return CONTROL.sub("?", self.read("report.txt").decode(errors="replace")).rstrip("\n")

    @host_default
    def entry(self, entry: Entry, rank: int) -> RankProgram:
        require_entry(entry)
        programs = self._rank(rank)
        if entry not in programs:
            raise PlanError(self.manifest.refused or f"the bundle {self.folder.path} has no program for generation")
        return programs[entry]

    def read(self, name: str) -> bytes:
        """A file of the bundle, as it was written; not for weights."""
        file = self._file(name)
        return self.folder.read(name, bytes=file.bytes, digest=file.digest)

    def programs(self, rank: int) -> tuple[RankProgram, ...]:
        """Those of a rank, each once."""
        return tuple({id(program): program for program in self._rank(rank).values()}.values())

    def held(self) -> tuple[HeldSlice, ...]:
        """What the ranks hold of weights as a quantised checkpoint stores them, in this bundle's own files."""
        found: dict[tuple[str, ...], HeldSlice] = {}
        for rank in range(self.mesh.world_size):
            if any(each.shard.codes_of is not None for each in self.stored(rank)):
                reader = Reader(self.files(self.stored(rank)))
                found |= held_by(self.programs(rank), reader, str(self.folder.path))
        return tuple(found.values())

    def stored(self, rank: int) -> tuple[Stored, ...]:
        """The weights of a rank, and where they are."""
        return self._read(rank)[1]

    def files(self, stored: Sequence[Stored]) -> TensorFiles:
        names = dict.fromkeys(each.file for each in stored if each.file is not None)
        for name in names:
            if not name.startswith("weights/"):
                raise BundleError(f"{name!r} is no file of weights")
            self.folder.check(name, bytes=self._file(name).bytes)
        files = TensorFiles(self.folder.path, list(names))
        if all(each.file is not None for each in stored):
            return files
        if self._checkpoint is None:
            raise BundleError(
                f"the weights of {self.folder.path} are in the checkpoint that it was made from: name its folder "
                "(checkpoint=, or --checkpoint)"
            )
        return files.joined(checkpoint_files(self._checkpoint))

    @contextmanager
    def model_folder(self) -> Iterator[Path]:
        """What a tokenizer is loaded from: a folder of this process alone, with the bytes that were checked."""
        with tempfile.TemporaryDirectory(prefix="partitioner-") as own:
            for name in self.manifest.files:
                if name.startswith("model/"):
                    path = Path(own, name.removeprefix("model/"))
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(self.read(name))
            yield Path(own)

    @host_default
    def verify(self) -> None:
        """Reads every file of the bundle, and checks it."""
        self.folder.require_only({MANIFEST, DIGEST, *self.manifest.files})
        for name, file in self.manifest.files.items():
            if file.digest is not None:
                self.read(name)
        everyone = [self._rank(rank) for rank in range(self.mesh.world_size)]
        for entry in everyone[0]:
            check_meetings(programs[entry] for programs in everyone)
            check_meetings(head for programs in everyone if (head := programs[entry].of_head) is not None)
        for rank, programs in enumerate(everyone):
            for program in programs.values():
                program.graph  # noqa: B018 - builds it
                if program.of_head is not None:
                    program.of_head.graph  # noqa: B018
            stored = self.stored(rank)
            reader = Reader(self.files(stored))
            with attribute_errors(programs["text"]):
                for each in stored:
                    reader.load([each.shard], _CPU)
        self.held()

    def _file(self, name: str) -> File:
        if name not in self.manifest.files:
            raise BundleError(f"the bundle {self.folder.path} has no {name!r}")
        return self.manifest.files[name]

    def _rank(self, rank: int) -> dict[Entry, RankProgram]:
        with self._lock:
            if rank not in self._ranks:
                record, stored = self._read(rank)
                self._ranks[rank] = self._programs(rank, record, stored)
            return self._ranks[rank]

    def _read(self, rank: int) -> tuple[Record, tuple[Stored, ...]]:
        coordinates = {axis: index for axis, index in self.mesh.coordinates(rank).items() if axis in AXES}
        name = f"ranks/{rank}.json"
        record = Record.parse(self.read(name), str(self.folder.path / name))
        given = record.record("coordinates")
        if {axis: given.integer(axis) for axis in coordinates} != coordinates:
            record.fail("coordinates", f"those of rank {rank}: {coordinates}")
        given.done()
        return record, tuple(map(read_weight, record.records("weights")))

    def _programs(self, rank: int, record: Record, stored: Sequence[Stored]) -> dict[Entry, RankProgram]:
        source = Reader(self.files(stored), mapped=self.mapped, checked=self._checked)

        def read(program: Record) -> RankProgram:
            return read_program(
                program,
                mesh=self.mesh,
                coordinates=self.mesh.coordinates(rank),
                weights=[each.shard for each in stored],
                read_graph=self._graph,
                source=source,
                where=f"the bundle {self.folder.path}",
            )

        found = read_entries(record, read, schema=self.manifest.schema)
        record.done()
        return found

    def _graph(
        self, digest: str, *, integers: Sequence[int], inputs: Sequence[str], weights: Sequence[str]
    ) -> fx.Graph:
        name = f"graphs/{digest}.jsonl"
        where = str(self.folder.path / name)
        return build(self.read(name), where, integers=integers, inputs=inputs, weights=weights)
