"""The machines: devices, and the dimensions of links between them, innermost first.

    8xH100           8 devices of one host
    32x8xH100        32 hosts of 8
    cluster.yaml     see `Cluster.from_yaml`

    rank = ((host * 8) + device)      the last dimension of the text varies fastest, and is the innermost

Ranks are laid on devices in order, so that the mesh's order decides who is near whom: tp innermost, then sp, pp, and dp
outermost (Megatron-LM, arXiv:2104.04473, section 3.2: TP inside a server, PP across). `bad_order` names an axis that
crosses hosts although it talks the most and would fit into one.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from partitioner.errors import InputError
from partitioner.planning.collectives import Hop
from partitioner.sharding.mesh import Mesh

__all__ = ["Cluster", "Device", "Dimension", "bad_order", "device", "hops"]

PRESETS = Path(__file__).with_name("tables") / "presets.yaml"
GIB = 1 << 30


@dataclass(frozen=True)
class Device:
    """flops_per_s: of products, by dtype. reserved_bytes: what a model cannot have. fitted: the name of its kernel
    tables. fuses: whether ops that go over memory one after the other are one kernel there, as this product's are on
    GPUs.
    """

    name: str
    memory_bytes: int
    reserved_bytes: int
    bytes_per_s: float
    flops_per_s: Mapping[str, float]
    fitted: str = ""
    source: str = ""
    fuses: bool = True

    def __post_init__(self) -> None:
        numbers = [self.bytes_per_s, *self.flops_per_s.values(), float(self.memory_bytes - self.reserved_bytes)]
        if not self.flops_per_s or not all(math.isfinite(each) and each > 0 for each in numbers):
            raise InputError(f"device {self.name!r}: memory, bandwidth and FLOP/s must be finite and above 0")

    @property
    def usable_bytes(self) -> int:
        return self.memory_bytes - self.reserved_bytes


@dataclass(frozen=True)
class Dimension:
    """So many devices, or groups of the dimension inside, over one kind of link. bytes_per_s: of one device."""

    name: str
    size: int
    bytes_per_s: float
    latency_s: float
    fitted: str = ""

    def __post_init__(self) -> None:
        if self.size < 1 or not self.bytes_per_s > 0 or not self.latency_s >= 0:
            raise InputError(f"dimension {self.name!r} takes a size of at least 1, GB/s above 0 and ns of at least 0")


@dataclass(frozen=True)
class Cluster:
    """dimensions: innermost first. devices: one for each rank's place in turn, or one that stands for all."""

    name: str
    dimensions: tuple[Dimension, ...]
    devices: tuple[Device, ...]

    def __post_init__(self) -> None:
        if not self.dimensions or len(self.devices) not in (1, self.size):
            raise InputError(
                f"cluster {self.name!r} needs a dimension, and one device for all places or one for each of its "
                f"{self.size}; got {len(self.devices)}"
            )

    @property
    def size(self) -> int:
        return math.prod(dimension.size for dimension in self.dimensions)

    @property
    def weakest(self) -> Device:
        """What every rank can count on: of each number, the smallest of all devices."""
        if len(set(map(id, self.devices))) == 1:
            return self.devices[0]
        first = min(self.devices, key=lambda each: each.usable_bytes)
        dtypes = set.intersection(*(set(each.flops_per_s) for each in self.devices))
        rates = {name: min(each.flops_per_s[name] for each in self.devices) for name in sorted(dtypes)}
        slow = min(self.devices, key=lambda each: each.bytes_per_s)
        names = " and ".join(dict.fromkeys(each.name for each in self.devices))
        return Device(names, first.memory_bytes, first.reserved_bytes, slow.bytes_per_s, rates, slow.fitted, "",
                      all(each.fuses for each in self.devices))  # fmt: skip

    @property
    def is_mixed(self) -> bool:
        return len({each.name for each in self.devices}) > 1

    @classmethod
    def parse(cls, text: str) -> Cluster:
        """A text such as 8xH100 or 32x8xH100, or the path of a YAML file."""
        if Path(text).suffix in (".yaml", ".yml"):
            return cls.from_yaml(Path(text))
        found = re.fullmatch(r"((?:\d+x){0,3})([A-Za-z]\w*)", text.strip())
        if not found:
            raise InputError(
                f"{text!r} is no cluster: write 8xH100, 32x8xH100 or the path of a .yaml file; of other devices, edit "
                f"what `partitioner cluster show 8xH100` prints. Known: {', '.join(sorted(_presets()['devices']))}"
            )
        name = found.group(2)
        sizes = [int(each) for each in found.group(1).split("x") if each] or [1]
        if min(sizes) < 1 or math.prod(sizes) > 16_384:
            raise InputError(f"{text!r}: a cluster has 1 to 16384 devices")
        kind, host = device(name), _presets()["hosts"][_known(name)]
        if len(sizes) == 1:
            inside = min(sizes[0], host["size"])
            if sizes[0] % inside:
                raise InputError(f"{text!r}: hosts have {inside} each; write {-(-sizes[0] // inside)}x{inside}x{name}")
            sizes = [sizes[0] // inside, inside]
        inner, outer = sizes[-1], sizes[:-1]
        dimensions = [_dimension(host["inside"], inner, host.get("fitted", kind.fitted))]
        dimensions += [_dimension(host["between"], size) for size in reversed(outer) if size > 1]
        return cls(text, tuple(dimensions), (kind,))

    @classmethod
    def from_yaml(cls, path: Path) -> Cluster:
        """A file with name, dimensions (innermost first: name, size, gb_s, latency_ns, fitted) and devices (name of a
        preset, or all fields of `Device`; count). docs/parallelism/choosing.md has every field.
        """
        try:
            told = yaml.safe_load(path.read_text(encoding="utf-8"))
            dimensions = tuple(
                Dimension(
                    str(each["name"]), int(each["size"]), float(each["gb_s"]) * 1e9, float(each["latency_ns"]) * 1e-9,
                    str(each.get("fitted", "")),
                )
                for each in told["dimensions"]
            )  # fmt: skip
            devices: list[Device] = []
            for each in told["devices"]:
                devices += [_device(each)] * int(each.get("count", 1) if len(told["devices"]) > 1 else 1)
        except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"cannot read the cluster {path}: {type(error).__name__}: {error}") from error
        return cls(str(told.get("name", path.stem)), dimensions, tuple(devices))

    def to_yaml(self) -> str:
        """What `from_yaml` reads."""
        devices: list[dict[str, Any]] = []
        for each in self.devices:
            told = _told(each)
            if devices and {k: v for k, v in devices[-1].items() if k != "count"} == told:
                devices[-1]["count"] += 1
            else:
                devices.append({**told, "count": 1})
        dimensions = [
            {"name": d.name, "size": d.size, "gb_s": d.bytes_per_s / 1e9, "latency_ns": round(d.latency_s * 1e9, 1),
             **({"fitted": d.fitted} if d.fitted else {})}
            for d in self.dimensions
        ]  # fmt: skip
        told = {"name": self.name, "dimensions": dimensions, "devices": devices}
        return str(yaml.safe_dump(told, sort_keys=False, default_flow_style=False))

    def as_data(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "devices": [_told(each) for each in self.devices]}


def hops(cluster: Cluster, ranks: Sequence[int]) -> tuple[Hop, ...]:
    """The dimensions that a group of ranks spans, innermost first."""
    found = []
    groups = sorted(ranks)
    for dimension in cluster.dimensions:
        outside = sorted({rank // dimension.size for rank in groups})
        inside = max(sum(rank // dimension.size == group for rank in groups) for group in outside)
        found.append(Hop(inside, dimension.bytes_per_s, dimension.latency_s, dimension.fitted))
        groups = outside
    return tuple(found)


def bad_order(cluster: Cluster, mesh: Mesh) -> str:
    """Which axis crosses hosts although it would fit into one; "" where none does."""
    host = cluster.dimensions[0].size
    for axes in (("tp",), ("ep", "etp")):
        n = mesh.size(*axes)
        if not 1 < n <= host:
            continue
        first = range(mesh.world_size) if host % n else (0,)  # aligned groups lie alike
        if any(len({rank // host for rank in mesh.group(axes, each)}) > 1 for each in first):
            link = cluster.dimensions[1].name if len(cluster.dimensions) > 1 else "an outer link"
            return (
                f"{' x '.join(axes)} = {n} would fit into a host of {host}, and lies across {link}: put it inside, "
                "with pp and dp outside it"
            )
    return ""


def device(name: str) -> Device:
    """A preset by name, in any case."""
    return _device({"name": _known(name)})


def _device(told: Mapping[str, Any]) -> Device:
    fields = dict(told) if "memory_gib" in told else {**_presets()["devices"][_known(str(told["name"]))], **told}
    return Device(
        str(fields["name"]),
        round(float(fields["memory_gib"]) * GIB),
        round(float(fields.get("reserved_gib", 2)) * GIB),
        float(fields["bandwidth_gb_s"]) * 1e9,
        {str(dtype): float(rate) * 1e12 for dtype, rate in fields["tflops"].items()},
        str(fields.get("fitted", "")),
        str(fields.get("source", "")),
        bool(fields.get("fuses", True)),
    )


def _told(kind: Device) -> dict[str, Any]:
    return {
        "name": kind.name,
        "memory_gib": round(kind.memory_bytes / GIB, 3),
        "reserved_gib": round(kind.reserved_bytes / GIB, 3),
        "bandwidth_gb_s": round(kind.bytes_per_s / 1e9, 3),
        "tflops": {dtype: round(rate / 1e12, 6) for dtype, rate in kind.flops_per_s.items()},
        **({"fitted": kind.fitted} if kind.fitted else {}),
        **({"source": kind.source} if kind.source else {}),
        **({} if kind.fuses else {"fuses": False}),
    }


def _dimension(link: str, size: int, fitted: str = "") -> Dimension:
    told = _presets()["links"][link]
    return Dimension(link, size, told["gb_s"] * 1e9, told["latency_ns"] * 1e-9, fitted)


def _known(name: str) -> str:
    by_name = {each.lower(): each for each in _presets()["devices"]}
    if name.lower() not in by_name:
        raise InputError(
            f"unknown device {name!r}; the presets are {', '.join(by_name.values())}, or give a .yaml file"
        )
    return str(by_name[name.lower()])


@functools.cache
def _presets() -> dict[str, Any]:
    return dict(yaml.safe_load(PRESETS.read_text(encoding="utf-8")))
