"""Writing a bundle: the programs of all ranks, and their slices of the weights.

Slices that every rank holds alike are written once. Weights pass through memory a file at a time.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from partitioner.errors import BundleError, PlanError
from partitioner.program.model_record import ModelRecord
from partitioner.program.plan import Plan
from partitioner.program.ranks import Ranks
from partitioner.sharding.mesh import AXES, DEGREES
from partitioner.storage.bundle.format.bundle_files import digest_of, read_within, writing
from partitioner.storage.bundle.format.graph_format import Template, share
from partitioner.storage.bundle.format.manifest import File, Manifest
from partitioner.storage.bundle.format.rank_format import program_data
from partitioner.storage.bundle.format.weight_format import Stored, weight_data
from runtime.program.rank_program import Entry, RankProgram
from runtime.program.shards import WeightShard
from runtime.weights.load_weights import load_weights
from runtime.weights.read_shards import Reader
from runtime.weights.read_shards import digest_of as digest_of_tensor

__all__ = ["MODEL_FILES", "has_tokenizer", "save_ranks"]

FILE_BYTES = 2**30
"""A file of weights is closed when it holds as much."""

_UNREAD = "0" * 64
"""In the place of the digest of what was not read."""

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
"""What a tokenizer is made of; code and pickles are not."""
MODEL_FILES = ("generation_config.json", *TOKENIZER_FILES)


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def save_ranks(
    ranks: Ranks,
    folder: str | Path,
    *,
    plan: Plan,
    model: ModelRecord,
    report: str,
    tokenizer: str | Path | None,
    reference: bool,
    digests: bool,
) -> None:
    """Writes all ranks to `folder`, which must be new or empty. `tokenizer`: a folder with its files, copied too.

    `reference`: what is in a checkpoint stays there; it is read all the same, for the digests. Without `digests` it is
    not: such a bundle can only be loaded with checked=False.
    """
    everyone = ranks.everyone()
    entries: dict[Entry, list[RankProgram]] = {"text": [ranks.entry("text", rank) for rank in everyone]}
    refused = None
    try:
        entries["prefill"] = [ranks.entry("prefill", rank) for rank in everyone]
        decode = [ranks.entry("decode", rank) for rank in everyone]
        if any(ranks.entry("decode", rank) is not entries["prefill"][rank] for rank in everyone):
            entries["decode"] = decode
    except PlanError as error:
        refused = str(error)
    with writing(Path(folder)) as partial:
        writer = _Writer(partial, reference, digests)
        stored = writer.weights([_wanted(programs) for programs in zip(*entries.values(), strict=True)])
        shared = iter(writer.graphs([graph for programs in entries.values() for p in programs for graph in _graphs(p)]))
        graphs = {entry: [[next(shared) for _ in _graphs(p)] for p in programs] for entry, programs in entries.items()}
        for rank in everyone:
            writer.json(
                f"ranks/{rank}.json",
                {
                    "coordinates": {axis: entries["text"][rank].coordinates[axis] for axis in AXES},
                    "weights": list(map(weight_data, stored[rank].values())),
                    "programs": {
                        entry: _program(programs[rank], graphs[entry][rank], stored[rank])
                        for entry, programs in entries.items()
                    },
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
            fixed_length=model.fixed_length,
            refused=refused,
            checkpoint=reference,
            files=writer.files,
        )
        for name, content in manifest.write().items():
            (partial / name).write_bytes(content)


@dataclass(frozen=True)
class _Wanted:
    """A weight of a rank. program: one of those that want it, which knows where it comes from.

    data: the digest of what is no checkpoint's, as two traces may give one name to two constants.
    """

    shard: WeightShard
    data: str
    program: RankProgram = field(compare=False, repr=False)

    @classmethod
    def of(cls, shard: WeightShard, program: RankProgram) -> _Wanted:
        known = shard.source in ("computed", "constant") and shard.name in program.weight_data
        return cls(shard, digest_of_tensor(program.weight_data[shard.name]) if known else "", program)


def _graphs(program: RankProgram) -> list[torch.fx.Graph]:
    """Its own, and that of a head that all stages share out."""
    return [program.graph, *([] if program.of_head is None else [program.of_head.graph])]


def _program(
    program: RankProgram, graphs: Sequence[tuple[Template, tuple[int, ...]]], stored: Mapping[_Wanted, Stored]
) -> object:
    graph, *heads = graphs
    places = {wanted: place for place, wanted in enumerate(stored)}
    weights = [places[_Wanted.of(weight, program)] for weight in program.weights]
    return program_data(
        program,
        graph=graph[0].digest,
        integers=graph[1],
        weights=weights,
        head=(heads[0][0].digest, heads[0][1]) if heads else None,
    )


def _wanted(programs: Iterable[RankProgram]) -> list[_Wanted]:
    """The weights of one rank, each once; its programs read the same ones for the most part."""
    return list(dict.fromkeys(_Wanted.of(weight, program) for program in programs for weight in program.weights))


class _Writer:
    def __init__(self, folder: Path, reference: bool, digests: bool) -> None:
        self.folder, self.reference, self.digests = folder, reference, digests
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
        if not has_tokenizer(source):
            raise BundleError(
                f"{source} holds no tokenizer, none of {', '.join(TOKENIZER_FILES)}: leave tokenizer= out, or name the "
                "folder that has it"
            )
        for name in MODEL_FILES:
            if (source / name).is_file():
                self.add(f"model/{name}", read_within(source, name))

    def weights(self, wanted: Sequence[Sequence[_Wanted]]) -> list[dict[_Wanted, Stored]]:
        """Writes the weights that each rank wants, and says where they are, in the same order."""
        common = set(wanted[0]).intersection(*wanted[1:]) if len(wanted) > 1 else set()
        everyone = self._write_weights("every", [each for each in wanted[0] if each in common])
        found = []
        for rank, mine in enumerate(wanted):
            own = self._write_weights(f"rank{rank}", [each for each in mine if each not in common])
            found.append({each: everyone[each] if each in common else own[each] for each in mine})
        return found

    def _write_weights(self, owner: str, wanted: Sequence[_Wanted]) -> dict[_Wanted, Stored]:
        found: dict[_Wanted, Stored] = {}
        if self.reference:
            found = {each: self._reference(each) for each in wanted if each.shard.source == "checkpoint"}
        batches: list[list[_Wanted]] = [[]]
        for each in wanted:
            if each in found:
                continue
            if batches[-1] and sum(other.shard.bytes for other in batches[-1]) + each.shard.bytes > FILE_BYTES:
                batches.append([])
            batches[-1].append(each)
        names: dict[str, int] = {}
        for number, batch in enumerate(filter(None, batches)):
            file = f"weights/{owner}-{number:05}.safetensors"
            tensors: dict[str, Tensor] = {}
            for each, tensor in zip(batch, _loaded(batch), strict=True):
                shard = each.shard
                names[shard.name] = count = names.get(shard.name, 0) + 1
                # one name may stand for several slices, where a pass makes a weight anew for one of the programs
                key = f"{owner}.{shard.name}" + (f".{count}" if count > 1 else "")
                # a copy, where the model's own tensor is what was loaded: files hold no two names of one memory;
                # and of columns that are used where they lie, between others
                copied = shard.is_whole or not tensor.is_contiguous()
                tensors[key] = tensor.clone(memory_format=torch.contiguous_format) if copied else tensor
                found[each] = Stored(shard, file, key, digest_of_tensor(tensor))
            path = self.folder / file
            path.parent.mkdir(exist_ok=True)
            save_file(tensors, path)
            self.files[file] = File(path.stat().st_size, None)
        return found

    def _reference(self, wanted: _Wanted) -> Stored:
        source = wanted.program.source
        if not isinstance(source, Reader) or not source.files.is_checkpoint:
            raise BundleError(
                "there is no checkpoint to refer to: these weights are in memory, or in a bundle; partition a "
                "checkpoint folder, or leave reference=True (--reference) out"
            )
        digest = digest_of_tensor(_loaded([wanted])[0]) if self.digests else _UNREAD
        return Stored(wanted.shard, None, "", digest)


def _loaded(batch: Sequence[_Wanted]) -> list[Tensor]:
    loaded: list[Tensor] = []
    for _, some in itertools.groupby(batch, key=lambda each: id(each.program)):
        group = list(some)
        program = group[0].program
        shards = [each.shard for each in group]
        loaded += load_weights(shards, program.weight_data, program.source, torch.device("cpu"))
    return loaded


def plan_data(plan: Plan) -> dict[str, object]:
    degrees = {axis: plan.degree(axis) for axis in DEGREES}
    return {
        "degrees": degrees,
        "sp_attention": plan.sp_attention,
        "keep_whole": list(plan.keep_whole),
        "passes": [str(each) for each in plan.passes],
    }
