"""A bundle in words, and its graphs as text that says what the data says, a line per node."""

from __future__ import annotations

import json
from typing import Any

from partitioner.storage.bundle.bundle import Bundle
from partitioner.storage.bundle.format.graph_format import share

__all__ = ["describe", "show_graph"]


def describe(bundle: Bundle) -> str:
    manifest = bundle.manifest
    degrees = ", ".join(f"{axis}={n}" for axis, n in manifest.mesh.degrees.items())
    replicas = f", {manifest.replicas} replicas of them" if manifest.replicas > 1 else ""
    versions = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    lines = [
        f"{manifest.model_class}, {manifest.mesh.world_size} ranks ({degrees or 'not split'}){replicas}; "
        f"written with {versions}",
        f"continues texts: {manifest.refused or 'yes'}",
        f"weights: {'in the checkpoint that it was made from' if manifest.checkpoint else 'here'}",
        "",
        *(
            f"{file.bytes:>14,} bytes  {(file.digest or 'a digest per tensor')[:19]:19}  {name}"
            for name, file in manifest.files.items()
        ),
        "",
        bundle.report,
    ]
    return "\n".join(lines)


def show_graph(bundle: Bundle, rank: int, *, generation: bool) -> str:
    """What a rank runs, as `name = op(arguments)`, with its own integers in place."""
    program = bundle.entry("decode" if generation else "text", rank)
    ((template, _),) = share([program.graph])
    return "\n".join(_line(json.loads(line)) for line in template.text.splitlines())


def _line(node: dict[str, Any]) -> str:
    if "of" in node:
        return f"{node['name']} = {node['op']} {node['of']}"
    given = [_text(value) for value in node["args"]]
    given += [f"{name}={_text(value)}" for name, value in node.get("kwargs", {}).items()]
    why = "".join(f"   # {node[note]}" for note in ("path", "why") if note in node)
    return f"{node['name']} = {node['op']}({', '.join(given)}){why}"


def _text(value: Any) -> str:
    if isinstance(value, dict):
        ((kind, content),) = value.items()
        if kind == "node":
            return str(content)
        if kind == "tuple":
            return f"({', '.join(map(_text, content))})"
        return f"{kind}:{content}"
    if isinstance(value, list):
        return f"[{', '.join(map(_text, value))}]"
    return repr(value)
