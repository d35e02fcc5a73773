"""A host as NCCL sees it: the file that NCCL writes to NCCL_TOPO_DUMP_FILE.

    <system version="1">
      <cpu numaid="0" arch="x86_64" vendor="AuthenticAMD">
        <pci busid="0000:07:00.0" link_speed="16.0 GT/s PCIe" link_width="16">
          <gpu dev="0" sm="80" rank="0"> <nvlink target="0000:c7:00.0" count="12" tclass="0x068000"/> </gpu>
        </pci>
        <pci ..> <nic> <net name="mlx5_0" speed="200000" guid=".."/> </nic> </pci>

    NVLink     GPUs that reach each other over switches (targets that are no GPU) or links of their own; a GPU's links
               together, in one direction, at the rate of its generation
    PCIe       GPUs of one CPU, where NVLink joins none or a part of them: the link's rate and width, 4/5 as payload
    CPUs       GPUs of several CPUs that NVLink does not join: what NCCL counts for that link (src/graph/topo.h)
    network    several such hosts: the cards' rate, shared by the GPUs

The file does not name the device, and dimensions are even: other shapes are refused, with what is uneven.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

from partitioner.errors import InputError
from partitioner.planning.cluster import Cluster, Dimension
from partitioner.planning.cluster import device as preset

__all__ = ["nccl_cluster"]

NVLINK_GB_S = (
    (100, "NVLink5", 50.0),
    (90, "NVLink4", 25.0),
    (80, "NVLink3", 25.0),
    (70, "NVLink2", 25.0),
    (60, "NVLink1", 20.0),
)
"""From which compute capability on, its name, and GB/s of one link in one direction (NVIDIA's data sheets)."""
CPU_GB_S = {"AuthenticAMD": 16.0, "GenuineIntel": 10.0}
OTHER_CPU_GB_S = 6.0
PAYLOAD = 0.8
NVLINK_S, PCIE_S, NETWORK_S, TCP_S = 3e-6, 6e-6, 1e-5, 5e-5
LARGEST_HOST = 64


@dataclass
class _Gpu:
    busid: str
    cpu: int
    sm: int
    pcie_bytes_per_s: float
    links: dict[str, int] = field(default_factory=dict)


def nccl_cluster(text: str, path: Path, *, device: str | None, hosts: int) -> Cluster:
    if hosts < 1:
        raise InputError(f"--hosts is at least 1; got {hosts}")
    root = _root(text, path)
    gpus = list(_gpus(root, path))
    if not gpus:
        raise InputError(f"{path} has no <gpu>: dump it with NCCL_TOPO_DUMP_FILE from a job on all GPUs of a host")
    if len(gpus) > LARGEST_HOST:
        raise InputError(f"{path} has {len(gpus)} GPUs: a host has {LARGEST_HOST} at most")
    if device is None:
        kinds = ", ".join(str(sm) for sm in sorted({gpu.sm for gpu in gpus}))
        raise InputError(
            f"{path} does not name its device (sm {kinds}): say which with --device, such as --device H100"
        )
    dimensions = _inside(gpus, root, path)
    if hosts > 1:
        dimensions.append(_network(root, path, len(gpus), hosts))
    return Cluster(path.stem, tuple(dimensions), (preset(device),))


def _root(text: str, path: Path) -> ElementTree.Element:
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise InputError(f"{path} declares entities, which NCCL does not write")
    try:
        root = ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is no whole XML: {error}") from error
    if root.tag != "system":
        raise InputError(f"{path} is no topology of NCCL: its first element is <{root.tag[:40]}>, not <system>")
    return root


def _gpus(root: ElementTree.Element, path: Path) -> Iterator[_Gpu]:
    for number, cpu in enumerate(root.iter("cpu")):
        for pci in cpu.iter("pci"):
            for gpu in pci.findall("gpu"):
                busid = _attribute(pci, "busid", path).lower()
                found = _Gpu(busid, number, int(_number(gpu, "sm", path)), _pcie(pci, path))
                for link in gpu.findall("nvlink"):
                    target = _attribute(link, "target", path).lower()
                    found.links[target] = found.links.get(target, 0) + int(_number(link, "count", path))
                yield found


def _pcie(pci: ElementTree.Element, path: Path) -> float:
    """Bytes per second of payload, in one direction."""
    speed = re.match(r"\s*([\d.]+)\s*GT/s", _attribute(pci, "link_speed", path))
    width = _number(pci, "link_width", path)
    if speed is None or not width:
        raise InputError(
            f"{path}: <pci busid={pci.get('busid')!r}> has link_speed={pci.get('link_speed')!r} and link_width="
            f"{pci.get('link_width')!r}; expected such as '16.0 GT/s PCIe' and 16"
        )
    return float(speed.group(1)) * width / 8 * PAYLOAD * 1e9


def _inside(gpus: list[_Gpu], root: ElementTree.Element, path: Path) -> list[Dimension]:
    joined = _joined(gpus)
    dimensions: list[Dimension] = []
    size = _even("GPUs joined by NVLink", [len(group) for group in joined], path)
    if size > 1:
        name, rate = _generation(min(gpu.sm for gpu in gpus), path)
        slowest = min(sum(gpu.links.values()) for gpu in gpus)
        dimensions.append(Dimension(name, size, slowest * rate * 1e9, NVLINK_S))
    if size == len(gpus) > 1:
        return dimensions
    rate = min(gpu.pcie_bytes_per_s for gpu in gpus)
    by_cpu: dict[int, int] = defaultdict(int)
    for gpu in gpus:
        by_cpu[gpu.cpu] += 1
    if any(
        len({gpu.cpu for gpu in group}) > 1 for group in joined
    ):  # NVLink goes over CPUs, PCIe between groups does too
        return [*dimensions, Dimension("PCIe", len(joined), rate, PCIE_S)]
    near = _even("GPUs of a CPU", list(by_cpu.values()), path)
    if near % size:
        raise InputError(f"{path}: {near} GPUs of a CPU are no whole number of the {size} that NVLink joins")
    if near // size > 1 or len(gpus) == 1:
        dimensions.append(Dimension("PCIe", near // size, rate, PCIE_S))
    if len(by_cpu) > 1:
        vendor = next((cpu.get("vendor", "") for cpu in root.iter("cpu")), "")
        between = min(rate, CPU_GB_S.get(vendor, OTHER_CPU_GB_S) * 1e9)
        dimensions.append(Dimension("CPUs", len(by_cpu), between, PCIE_S))
    return dimensions


def _joined(gpus: list[_Gpu]) -> list[list[_Gpu]]:
    """Groups of GPUs between which NVLinks lead, over switches too."""
    group = {gpu.busid: gpu.busid for gpu in gpus}
    switched = [gpu.busid for gpu in gpus if any(target not in group for target in gpu.links)]
    pairs = [(gpu.busid, target) for gpu in gpus for target in gpu.links if target in group]
    pairs += [(switched[0], other) for other in switched[1:]]
    for one, other in pairs:
        old, new = group[one], group[other]
        group = {busid: new if mine == old else mine for busid, mine in group.items()}
    found: dict[str, list[_Gpu]] = defaultdict(list)
    for gpu in gpus:
        found[group[gpu.busid]].append(gpu)
    return list(found.values())


def _even(what: str, sizes: list[int], path: Path) -> int:
    if len(set(sizes)) > 1:
        said = ", ".join(map(str, sorted(sizes)))
        raise InputError(f"{path}: {what} are {said}: a cluster's dimensions are even; write its YAML by hand")
    return sizes[0]


def _generation(sm: int, path: Path) -> tuple[str, float]:
    for least, name, rate in NVLINK_GB_S:
        if sm >= least:
            return name, rate
    raise InputError(f"{path}: NVLinks of sm {sm} are not known; known from sm {NVLINK_GB_S[-1][0]} on")


def _network(root: ElementTree.Element, path: Path, gpus: int, hosts: int) -> Dimension:
    cards = [net for net in root.iter("net") if _number(net, "speed", path) > 0]
    if not cards:
        raise InputError(f"{path} has no <net> with a speed: what is between {hosts} hosts is not known")
    rate = sum(_number(net, "speed", path) for net in cards) * 1e6 / 8 / gpus
    is_rdma = all(set(net.get("guid", "0")) - set("0x") for net in cards)  # a socket's is 0x0
    return Dimension("RDMA" if is_rdma else "TCP", hosts, rate, NETWORK_S if is_rdma else TCP_S)


def _attribute(element: ElementTree.Element, name: str, path: Path) -> str:
    found = element.get(name)
    if found is None:
        raise InputError(f"{path}: <{element.tag} {dict(list(element.attrib.items())[:3])}> lacks {name!r}")
    return found


def _number(element: ElementTree.Element, name: str, path: Path) -> float:
    found = _attribute(element, name, path)
    try:
        number = float(found)
    except ValueError:
        number = math.nan
    if not 0 <= number < 1e9:
        raise InputError(f"{path}: <{element.tag}> has {name}={found[:40]!r}; a number of at least 0 is expected")
    return number
