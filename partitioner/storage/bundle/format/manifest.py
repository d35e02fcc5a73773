"""The manifest: what a bundle is, and the size and digest of every other file in it.

    manifest.json            this
    manifest.sha256          its digest
    graphs/DIGEST.jsonl      each distinct graph once, named by its content
    ranks/0.json             one per rank: programs, integers, weights
    weights/*.safetensors    a rank's slices; "every-*" what all ranks hold alike
    model/                   config.json, and what a tokenizer needs
    report.txt

`SCHEMA` counts up with every change that an older reader would get wrong. A bundle of a newer schema is refused; those
of all older ones are read. Schema 1 knew one axis, and one program for prompts and single tokens.
"""

from __future__ import annotations

import importlib.metadata
import json
from dataclasses import dataclass, field
from typing import Any

import torch

from partitioner.errors import BundleError, PlanError
from partitioner.program.plan import SP_ATTENTION
from partitioner.sharding.mesh import AXES, DEGREES, MOST_RANKS, Mesh
from partitioner.storage.bundle.format.bundle_files import NAME, Folder, digest_of
from partitioner.storage.bundle.format.untrusted_json import HEXADECIMAL, Record, short
from partitioner.storage.recognise import MANIFEST

__all__ = ["DIGEST", "SCHEMA", "File", "Manifest"]

VERSION = importlib.metadata.version("partitioner")
SCHEMA = 2
_SP_ATTENTION = {way: way for way in SP_ATTENTION}
FORMAT = "partitioner bundle"
DIGEST = "manifest.sha256"


@dataclass(frozen=True)
class File:
    bytes: int
    digest: str | None
    """None: files of weights, whose tensors have digests of their own."""


@dataclass(frozen=True)
class Manifest:
    """`model_class`: as transformers calls it. `checkpoint`: whether the weights are in a checkpoint folder, which
    whoever loads the bundle names.
    """

    model_class: str
    plan: dict[str, Any]
    mesh: Mesh
    max_length: int | None
    fixed_length: int | None
    refused: str | None
    """Why the model cannot generate; None: it can."""
    checkpoint: bool
    files: dict[str, File]
    versions: dict[str, str] = field(default_factory=dict)
    schema: int = SCHEMA

    @property
    def replicas(self) -> int:
        """How many worlds like the one that is stored the plan asked for."""
        planned, held = self.plan["degrees"].get("dp", 1), self.mesh.size("dp")
        return 1 if planned % held else planned // held

    def write(self) -> dict[str, bytes]:
        """The two files of a manifest, by name."""
        data = {
            "format": FORMAT,
            "schema": SCHEMA,
            "versions": {
                "partitioner": VERSION,
                "torch": torch.__version__,
                "transformers": importlib.metadata.version("transformers"),  # whoever reads a bundle runs without it
            },
            "model_class": self.model_class,
            "plan": self.plan,
            "mesh": {**dict(zip(AXES, self.mesh.sizes, strict=True)), "ep": self.mesh.ep, "etp": self.mesh.etp},
            "max_length": self.max_length,
            "length": self.fixed_length,
            "generation_refused": self.refused,
            "weights": "checkpoint" if self.checkpoint else "here",
            "files": {name: {"bytes": file.bytes, "sha256": file.digest} for name, file in sorted(self.files.items())},
        }
        text = json.dumps(data, indent=1, allow_nan=False).encode() + b"\n"
        return {MANIFEST: text, DIGEST: digest_of(text).encode() + b"\n"}

    @classmethod
    def read(cls, folder: Folder) -> Manifest:
        if not (folder.path / MANIFEST).exists():
            raise BundleError(f"{folder.path} is no bundle: it has no {MANIFEST}")
        digest = folder.read(DIGEST, bytes=65).decode("ascii", "replace").strip()
        if not HEXADECIMAL.fullmatch(digest):
            raise BundleError(
                f"{folder.path / DIGEST} is damaged or was altered: it must hold 64 hexadecimal digits, got "
                f"{short(digest)}"
            )
        record = Record.parse(folder.read(MANIFEST, digest=digest), f"{folder.path / MANIFEST}")
        if record.any("format") != FORMAT:
            record.fail("format", repr(FORMAT))
        schema = record.integer("schema", low=1)
        versions = record.record("versions")
        if schema > SCHEMA:
            raise BundleError(
                f"{folder.path} has schema {schema} and was written by partitioner {versions.text('partitioner')}; "
                f"this is partitioner {VERSION}, which reads up to schema {SCHEMA}: update it"
            )
        mesh = record.record("mesh")
        files = record.record("files")
        manifest = cls(
            model_class=record.text("model_class", longest=200),
            plan=_read_plan(record, schema),
            mesh=_read_mesh(record, mesh, AXES if schema == 1 else DEGREES),
            max_length=record.maybe("max_length", lambda name: record.integer(name, low=1)),
            fixed_length=record.maybe("length", lambda name: record.integer(name, low=1)),
            refused=record.maybe("generation_refused", record.text),
            checkpoint=record.one_of("weights", {"here": False, "checkpoint": True}),
            files={name: _read_file(files.record(name), name) for name in files.fields()},
            versions={name: versions.text(name, longest=100) for name in versions.fields()},
            schema=schema,
        )
        planned = {axis: manifest.plan["degrees"].get(axis, 1) for axis in DEGREES}
        # of replicas, one is stored
        planned["dp"] = planned["dp"] // manifest.replicas
        if any(manifest.mesh.size(axis) != planned[axis] for axis in DEGREES):
            record.fail("mesh", f"that of the plan, {', '.join(f'{axis}={n}' for axis, n in planned.items())}")
        for name in ("report.txt", "model/config.json", *(f"ranks/{n}.json" for n in range(manifest.mesh.world_size))):
            if name not in manifest.files:
                raise BundleError(f"{folder.path} has no {name!r}")
        mesh.done()
        record.done()
        folder.require_only({MANIFEST, DIGEST, *manifest.files})
        return manifest


def _read_file(record: Record, name: str) -> File:
    if not NAME.fullmatch(name) or ".." in name:
        raise BundleError(f"{record.where} is no name that a file of a bundle can have")
    file = File(record.integer("bytes"), record.maybe("sha256", record.digest))
    if (file.digest is None) != name.startswith("weights/"):
        record.fail("sha256", "a digest, but for files of weights null: their tensors have digests of their own")
    record.done()
    return file


def _read_mesh(record: Record, mesh: Record, axes: tuple[str, ...]) -> Mesh:
    sizes = {axis: mesh.integer(axis, low=1, high=MOST_RANKS) for axis in axes}
    try:
        return Mesh.of(**sizes)
    except PlanError as error:
        record.fail("mesh", f"sizes that fit each other ({error})")


def _read_plan(record: Record, schema: int) -> dict[str, Any]:
    plan = record.record("plan")
    degrees = plan if schema == 1 else plan.record("degrees")
    found = {
        "degrees": {
            axis: degrees.integer(axis, low=1, high=MOST_RANKS) for axis in (("tp",) if schema == 1 else DEGREES)
        },
        # bundles that are older do not say it
        "sp_attention": plan.one_of("sp_attention", _SP_ATTENTION) if plan.has("sp_attention") else "auto",
        "keep_whole": plan.texts("keep_whole"),
        "passes": plan.texts("passes"),
    }
    if schema > 1:
        degrees.done()
    plan.done()
    return found
