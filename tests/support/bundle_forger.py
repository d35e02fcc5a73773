"""Bundles for tests: small valid ones, and a forger that rewrites one with all its hashes in order.

save_tiny(folder)               a small decoder, split over 2 ranks
forge = Forger(folder)
forge.json("ranks/0.json")      edit what it yields; on leaving the `with` everything is hashed anew
forge.node("torch.mul")         the first node with this op, to be edited
python -m tests.support.bundle_forger DIR     what is kept of a schema, in tests/partitioner/storage/bundle/schemas
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import partitioner
from partitioner import PartitionerError, Plan, partition
from partitioner.storage.bundle.format.untrusted_json import CONTROL

IDS = torch.tensor([[5, 17, 9, 33, 2], [1, 1, 30, 7, 20]])


def tiny_model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def save_tiny(folder: Path) -> None:
    partition(tiny_model(), Plan(tp=2)).save(folder)


@contextlib.contextmanager
def showable_errors() -> Iterator[None]:
    """An error may hold what a file's author chose: never much of it, and nothing that would steer a terminal."""
    try:
        yield
    except PartitionerError as error:
        said = str(error)
        assert len(said) < 5000, f"an error of {len(said)} characters: {said[:200]!r}"
        assert not CONTROL.search(said), f"an error with control characters: {said!r}"
        raise


@showable_errors()
def use(folder: Path) -> tuple[Tensor, Tensor]:
    """All that one does with a bundle: everything read and checked, logits and a continuation."""
    bundle = partitioner.load(folder)
    bundle.verify()
    assert isinstance(bundle.report, str)
    for rank in range(bundle.mesh.world_size):
        bundle.rank(rank).graph_module  # noqa: B018 - weights under their names
    logits = bundle.simulate(input_ids=IDS)
    tokens = bundle.generate(IDS, max_new_tokens=3)
    assert isinstance(tokens, Tensor)
    return logits, tokens


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class Forger:
    """Rewrites a bundle so that all its hashes are right."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def rehash(self) -> None:
        """Sizes and digests of all files as they now are; graphs get their names anew."""
        manifest = json.loads((self.folder / "manifest.json").read_bytes())
        renamed = {}
        for path in sorted((self.folder / "graphs").glob("*.jsonl")):
            content = path.read_bytes()
            renamed[path.stem] = sha(content)
            path.rename(path.with_name(f"{sha(content)}.jsonl"))
        for path in sorted((self.folder / "ranks").glob("*.json")):
            text = path.read_text(errors="surrogateescape")
            for old, new in renamed.items():
                text = text.replace(old, new)
            path.write_text(text, errors="surrogateescape")
        files = {}
        for path in [*sorted(self.folder.glob("*/*")), self.folder / "report.txt"]:
            name = path.relative_to(self.folder).as_posix()
            content = path.read_bytes()
            files[name] = {"bytes": len(content), "sha256": None if name.startswith("weights/") else sha(content)}
        manifest["files"] = files
        self.write_manifest(json.dumps(manifest).encode())

    def write_manifest(self, text: bytes) -> None:
        (self.folder / "manifest.json").write_bytes(text)
        (self.folder / "manifest.sha256").write_bytes(sha(text).encode() + b"\n")

    @contextlib.contextmanager
    def manifest(self) -> Iterator[dict[str, Any]]:
        data = json.loads((self.folder / "manifest.json").read_bytes())
        yield data
        self.write_manifest(json.dumps(data).encode())

    @contextlib.contextmanager
    def json(self, name: str) -> Iterator[dict[str, Any]]:
        path = self.folder / name
        data = json.loads(path.read_bytes())
        yield data
        path.write_text(json.dumps(data))
        self.rehash()

    def text(self, name: str, change: Callable[[bytes], bytes]) -> None:
        """`change` is given the bytes of a file, and its result becomes what is in it."""
        path = self.folder / name
        before = path.read_bytes()
        after = change(before)
        assert before != after, "nothing was forged"
        path.write_bytes(after)
        self.rehash()

    def graph(self, rank: int = 0, *, of: str = "text") -> str:
        """The name of a graph's file."""
        data = json.loads((self.folder / f"ranks/{rank}.json").read_bytes())
        digest = data.get("programs", data)[of]["graph"]  # schema 1 had them beside the rest
        return f"graphs/{digest}.jsonl"

    @contextlib.contextmanager
    def nodes(self, *, of: str = "text") -> Iterator[list[dict[str, Any]]]:
        """The nodes of the graph that the ranks share."""
        path = self.folder / self.graph(of=of)
        nodes = [json.loads(line) for line in path.read_bytes().splitlines()]
        yield nodes
        path.write_text("".join(json.dumps(node) + "\n" for node in nodes))
        self.rehash()

    @contextlib.contextmanager
    def node(self, op: str, *, of: str = "text") -> Iterator[dict[str, Any]]:
        """The first node with this op."""
        with self.nodes(of=of) as nodes:
            yield next(node for node in nodes if node["op"] == op)

    def header(self, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
        """Rewrites a safetensors header; its tensors' bytes stay."""
        path = self.folder / name
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        new = change(header)
        text = new if isinstance(new, bytes) else json.dumps(header if new is None else new).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
        self.rehash()


def write_example(folder: Path) -> None:
    """A bundle and what comes of it, for a folder `schema_N`: see the README beside it."""
    save_tiny(folder / "bundle")
    logits, tokens = use(folder / "bundle")
    expected = {"input_ids": IDS.tolist(), "logits": logits.tolist(), "tokens": tokens.tolist()}
    (folder / "expected.json").write_text(json.dumps(expected) + "\n")


# -- fixtures, for conftest files to import ---------------------------------------------------------------------------


@pytest.fixture(scope="session")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("valid") / "bundle"
    save_tiny(folder)
    return folder


@pytest.fixture
def folder(valid: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(valid, tmp_path / "bundle"))


if __name__ == "__main__":
    write_example(Path(sys.argv[1]))
