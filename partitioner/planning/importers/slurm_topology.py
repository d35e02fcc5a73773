"""Which hosts are near each other, as Slurm's topology.yaml says (https://slurm.schedmd.com/topology.yaml.html).

    - topology: default
      tree: {switches: [{switch: top, children: "leaf[1-2]"}, {switch: leaf1, nodes: "n[01-16]"}, ..]}
    - topology: racks
      block: {block_sizes: [18], blocks: [{block: b1, nodes: "n[01-18]"}, ..]}
    - topology: plain
      flat: true

    tree     one dimension for each level of switches: hosts of a leaf, leaves below a switch, ..
    block    hosts of a block, and blocks

Slurm says who is near, and neither what is inside a host nor how fast links are: both are those of the device's preset.
Dimensions are even: a tree that is not is refused, with the switches that differ.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from partitioner.errors import InputError
from partitioner.planning.cluster import Cluster

__all__ = ["expand_hosts", "is_topology", "slurm_cluster"]

MOST_HOSTS = 16_384
KINDS = ("tree", "block", "flat")


def is_topology(told: Any) -> bool:
    return isinstance(told, list) and bool(told) and all(isinstance(e, dict) and "topology" in e for e in told)


def slurm_cluster(told: list[dict[str, Any]], path: Path, *, device: str | None, topology: str) -> Cluster:
    if device is None:
        raise InputError(f"{path} does not say what its hosts have: say so with --device, such as --device 8xH100")
    chosen = _chosen(told, path, topology)
    name = str(chosen["topology"])
    kinds = [kind for kind in KINDS if chosen.get(kind)]
    if len(kinds) != 1:
        raise InputError(f"{path}: topology {name!r} has {', '.join(chosen)}; one of {', '.join(KINDS)} can be read")
    if kinds == ["flat"]:
        raise InputError(f"{path}: topology {name!r} is flat, which names no hosts: write --gpus 4x8xH100 for four")
    try:
        levels = _tree(chosen["tree"]) if kinds == ["tree"] else _blocks(chosen["block"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(f"{path}: topology {name!r} lacks or misspells {error}") from error
    host = Cluster.parse(device if device[:1].isdigit() else f"8x{device}")
    inside, between = host.dimensions[:1], Cluster.parse(f"2x{host.dimensions[0].size}x{host.devices[0].name}")
    outer = [replace(between.dimensions[-1], name=label, size=size) for label, size in levels if size > 1]
    return Cluster(f"{path.stem}-{name}", (*inside, *outer), host.devices)


def _chosen(told: list[dict[str, Any]], path: Path, wanted: str) -> dict[str, Any]:
    names = [str(each["topology"]) for each in told]
    if wanted:
        if wanted not in names:
            raise InputError(f"{path} has no topology {wanted!r}; it has {', '.join(names)}")
        return told[names.index(wanted)]
    default = [each for each in told if each.get("cluster_default")]
    if len(default) != 1 and len(told) > 1:
        raise InputError(f"{path} has the topologies {', '.join(names)}, and no default: say which with --topology")
    return default[0] if default else told[0]


def _tree(tree: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Names and sizes of levels, innermost first."""
    below: dict[str, list[str]] = {}
    hosts: dict[str, int] = {}
    for switch in tree["switches"]:
        name = str(switch["switch"])
        if name in below:
            raise ValueError(f"switch {name!r}, which is there twice")
        below[name] = list(expand_hosts(str(switch.get("children") or "")))
        hosts[name] = sum(1 for _ in expand_hosts(str(switch.get("nodes") or "")))
        if bool(below[name]) == bool(hosts[name]):
            raise ValueError(f"switch {name!r}: it has either nodes or children")
    missing = sorted({child for children in below.values() for child in children if child not in below})
    if missing:
        raise ValueError(f"the switch {missing[0]!r}, which is a child and nowhere described")
    tops = sorted(set(below) - {child for children in below.values() for child in children})
    found: list[tuple[str, int]] = []
    level, depth, reached = tops, 0, len(tops)
    while level:
        sizes = {name: len(below[name]) or hosts[name] for name in level}
        leaves = {name for name in level if hosts[name]}
        if leaves and len(leaves) < len(level):
            raise ValueError(f"evenness: {sorted(leaves)[0]} has nodes and {sorted(set(level) - leaves)[0]} children")
        found.append((f"switch level {depth}", _even("switch", sizes)))
        level, depth = [child for name in level for child in below[name]], depth + 1
        reached += len(level)
    if reached != len(below):
        raise ValueError("a tree: some of its switches are a circle, or below two others")
    outermost = [("between trees", len(tops))]
    return [*reversed(found), *outermost]


def _blocks(block: Mapping[str, Any]) -> list[tuple[str, int]]:
    sizes = {str(each["block"]): sum(1 for _ in expand_hosts(str(each["nodes"]))) for each in block["blocks"]}
    return [("block", _even("block", sizes)), ("between blocks", len(sizes))]


def _even(what: str, sizes: Mapping[str, int]) -> int:
    fewest, most = (pick(sizes, key=lambda name: sizes[name]) for pick in (min, max))
    if sizes[fewest] != sizes[most] or not sizes[most]:
        raise ValueError(f"evenness: {what} {fewest} has {sizes[fewest]} below it, {most} has {sizes[most]}")
    return sizes[most]


def expand_hosts(text: str) -> Iterable[str]:
    """The hosts of a list of Slurm's: n[01-03,7],gpu-a, rack[1-2]n[1-4]."""
    count = 0
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text):
        pieces = [_ranges(each) if each.startswith("[") else [each] for each in re.split(r"(\[[^\]]*\])", part.strip())]
        for names in itertools.product(*pieces):
            count += 1
            if count > MOST_HOSTS:
                raise ValueError(f"fewer hosts: more than {MOST_HOSTS} in {text[:60]!r}")
            yield "".join(names)


def _ranges(text: str) -> list[str]:
    found: list[str] = []
    for each in text.strip("[]").split(","):
        ends = re.fullmatch(r"(\d+)(?:-(\d+))?", each.strip())
        if ends is None or (ends.group(2) and int(ends.group(2)) < int(ends.group(1))):
            raise ValueError(f"a range such as [01-16] in {text[:60]!r}")
        first, last = int(ends.group(1)), int(ends.group(2) or ends.group(1))
        if last - first >= MOST_HOSTS:
            raise ValueError(f"fewer hosts: more than {MOST_HOSTS} in {text[:60]!r}")
        found += [str(number).zfill(len(ends.group(1))) for number in range(first, last + 1)]
    return found
