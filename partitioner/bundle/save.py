"""Writing a bundle: the programs of all ranks, and their slices of the weights.

Slices that every rank holds alike are written once. Weights pass through memory a file at a time.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from partitioner.bundle.folder import digest_of, writing
from partitioner.bundle.graphs import Template, share
from partitioner.bundle.manifest import File, Manifest
from partitioner.bundle.ranks import Stored, program_data, weight_data
from partitioner.errors import BundleError, PlanError
from partitioner.model_record import ModelRecord
from partitioner.plan import Plan
from runtime.engine import RankPrograms
from runtime.rank_program import RankProgram, WeightShard
from runtime.reading import Reader
from runtime.reading import digest_of as digest_of_tensor
from runtime.weights import load_weights

__all__ = ["MODEL_FILES", "save_ranks"]

FILE_BYTES = 2**30
"""A file of weights is closed when it holds as much."""

MODEL_FILES = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
"""What a tokenizer is made of; code and pickles are not."""


def save_ranks(
    ranks: RankPrograms,
    folder: str | Path,
    *,
    plan: Plan,
    model: ModelRecord,
    report: str,
    tokenizer: str | Path | None = None,
    reference: bool = False,
) -> None:
    """Writes all ranks to `folder`, which must be new or empty. `tokenizer`: a folder with its files, copied too.

    `reference`: what is in a checkpoint stays there; it is read all the same, for the digests.
    """
    everyone = range(ranks.mesh.world_size)
    text = [ranks.rank(rank) for rank in everyone]
    refused, generation = None, list[RankProgram]()
    try:
        generation = [ranks.generation_rank(rank) for rank in everyone]
    except PlanError as error:
        refused = str(error)
    with writing(Path(folder)) as partial:
        writer = _Writer(partial, reference)
        # the model's own use of a cache may read values that its code for whole texts does not
        known = [replace(a, values={**b.values, **a.values}) for a, b in zip(text, generation or text, strict=True)]
        stored = writer.weights([_distinct(programs) for programs in zip(text, generation or text, strict=True)], known)
        graphs = writer.graphs([program.graph for program in (*text, *generation)])
        for rank in everyone:
            writer.json(
                f"ranks/{rank}.json",
                {
                    "coordinates": dict(text[rank].coordinates),
                    "weights": list(map(weight_data, stored[rank])),
                    "text": _program(text[rank], graphs[rank], stored[rank]),
                    "generation": _program(generation[rank], graphs[len(text) + rank], stored[rank])
                    if generation
                    else None,
                },
            )
        writer.json("model/config.json", model.config)
        if tokenizer is not None:
            writer.copy_model_files(Path(tokenizer))
        writer.add("report.txt", report.encode() + b"\n")
        manifest = Manifest(
            model_class=model.class_name,
            plan=plan_data(plan),
            mesh=ranks.mesh,
            max_length=model.max_length,
            length=model.length,
            refused=refused,
            checkpoint=reference,
            files=writer.files,
        )
        for name, content in manifest.write().items():
            (partial / name).write_bytes(content)


def _program(program: RankProgram, graph: tuple[Template, tuple[int, ...]], stored: Sequence[Stored]) -> object:
    places = {each.shard: place for place, each in enumerate(stored)}
    weights = [places[weight] for weight in program.weights]
    return program_data(program, graph=graph[0].digest, integers=graph[1], weights=weights)


def _distinct(programs: Iterable[RankProgram]) -> tuple[WeightShard, ...]:
    """The weights of one rank; its programs read the same, but for what a pass of the user's own makes anew."""
    return tuple(dict.fromkeys(itertools.chain.from_iterable(program.weights for program in programs)))


class _Writer:
    def __init__(self, folder: Path, reference: bool) -> None:
        self.folder, self.reference = folder, reference
        self.files: dict[str, File] = {}

    def add(self, name: str, content: bytes) -> None:
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        self.files[name] = File(len(content), digest_of(content))

    def json(self, name: str, data: object) -> None:
        self.add(name, json.dumps(data, allow_nan=False, separators=(",", ":")).encode() + b"\n")

    def graphs(self, graphs: Sequence[torch.fx.Graph]) -> list[tuple[Template, tuple[int, ...]]]:
        found = share(graphs)
        for template in {template.digest: template for template, _ in found}.values():
            self.add(f"graphs/{template.digest}.jsonl", template.text.encode())
        return found

    def copy_model_files(self, source: Path) -> None:
        for name in MODEL_FILES:
            if (source / name).is_file():
                self.add(f"model/{name}", (source / name).read_bytes())

    def weights(self, wanted: Sequence[tuple[WeightShard, ...]], programs: Sequence[RankProgram]) -> list[list[Stored]]:
        """Writes the weights that each rank wants, and says where they are, in the same order."""
        common = set(wanted[0]).intersection(*wanted[1:]) if len(wanted) > 1 else set()
        everyone = {
            each.shard: each
            for each in self._write_weights("every", [w for w in wanted[0] if w in common], programs[0])
        }
        found = []
        for rank, (shards, program) in enumerate(zip(wanted, programs, strict=True)):
            own = [shard for shard in shards if shard not in everyone]
            mine = {each.shard: each for each in self._write_weights(f"rank{rank}", own, program)}
            found.append([everyone[shard] if shard in everyone else mine[shard] for shard in shards])
        return found

    def _write_weights(self, owner: str, shards: Sequence[WeightShard], program: RankProgram) -> Iterator[Stored]:
        if self.reference:
            yield from _references(shards, program)
            shards = [shard for shard in shards if shard.source != "checkpoint"]
        batches: list[list[WeightShard]] = [[]]
        for shard in shards:
            if batches[-1] and sum(each.bytes for each in batches[-1]) + shard.bytes > FILE_BYTES:
                batches.append([])
            batches[-1].append(shard)
        names: dict[str, int] = {}
        for number, batch in enumerate(filter(None, batches)):
            file = f"weights/{owner}-{number:05}.safetensors"
            loaded = load_weights(batch, program.values, program.source, torch.device("cpu"))
            tensors: dict[str, Tensor] = {}
            stored = []
            for shard, tensor in zip(batch, loaded, strict=True):
                names[shard.name] = count = names.get(shard.name, 0) + 1
                # one name may stand for several slices, where a pass makes a weight anew for one of the programs
                key = f"{owner}.{shard.name}" + (f".{count}" if count > 1 else "")
                # a copy, where the model's own tensor is what was loaded: files hold no two names of one memory
                tensors[key] = tensor.contiguous().clone() if shard.is_whole else tensor
                stored.append(Stored(shard, file, key, digest_of_tensor(tensor)))
            path = self.folder / file
            path.parent.mkdir(exist_ok=True)
            save_file(tensors, path)
            self.files[file] = File(path.stat().st_size, None)
            yield from stored


def _references(shards: Sequence[WeightShard], program: RankProgram) -> Iterator[Stored]:
    if not isinstance(program.source, Reader) or not program.source.files.is_checkpoint:
        raise BundleError(
            "there is no checkpoint to refer to: these weights are in memory, or in a bundle; partition a checkpoint "
            "folder, or leave reference=True (--reference) out"
        )
    for shard in shards:
        if shard.source == "checkpoint":
            (tensor,) = load_weights([shard], program.values, program.source, torch.device("cpu"))
            yield Stored(shard, None, "", digest_of_tensor(tensor))


def plan_data(plan: Plan) -> dict[str, object]:
    return {"tp": plan.tp, "keep_whole": list(plan.keep_whole), "passes": [str(each) for each in plan.passes]}
