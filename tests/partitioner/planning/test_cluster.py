"""Clusters by text and by file, and where ranks lie."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from partitioner.errors import InputError
from partitioner.planning.cluster import Cluster, bad_order, device, hops
from partitioner.planning.machine.detect import detect
from partitioner.sharding.mesh import Mesh
from tests.support.processes import typed

GIB = 1 << 30
MIXED = """
name: two-kinds
dimensions:
- {name: PCIe, size: 2, gb_s: 25, latency_ns: 6000}
- {name: Ethernet, size: 2, gb_s: 3, latency_ns: 50000}
devices:
- {name: A100, count: 2}
- {name: L40S, count: 2}
"""


def test_presets_have_sources_and_78_of_80_gib() -> None:
    for name in ("H100", "H200", "A100", "B200", "L40S", "RTX4090", "CPU"):
        assert device(name).source
    assert device("h100").usable_bytes == 78 * GIB


@pytest.mark.parametrize(
    ("text", "sizes"),
    [("8xH100", (8,)), ("32x8xH100", (8, 32)), ("H200", (1,)), ("16xA100", (8, 2)), ("2x4x8xB200", (8, 4, 2))],
)
def test_text(text: str, sizes: tuple[int, ...]) -> None:
    assert tuple(dimension.size for dimension in Cluster.parse(text).dimensions) == sizes


@pytest.mark.parametrize("text", ["8xH999", "8x", "xH100", "0xH100", "12xH100", "99999xH100", "missing.yaml"])
def test_wrong_text_is_refused(text: str) -> None:
    with pytest.raises(InputError):
        Cluster.parse(text)


def test_yaml_round_trip_and_mixed_devices(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(MIXED)
    cluster = Cluster.parse(str(path))
    assert cluster.is_mixed
    assert cluster.weakest.bytes_per_s == 864e9
    path.write_text(cluster.to_yaml())
    again = Cluster.parse(str(path))
    assert again.dimensions == cluster.dimensions
    assert [each.name for each in again.devices] == [each.name for each in cluster.devices]
    path.write_text("name: broken\ndimensions: 3\ndevices: []")
    with pytest.raises(InputError, match="cannot read the cluster"):
        Cluster.parse(str(path))


def test_the_page_has_a_file_that_is_read_and_all_fields(tmp_path: Path) -> None:
    page = typed.text_of("parallelism/choosing.md")
    file = tmp_path / "page.yaml"
    file.write_text(re.findall(r"^```yaml\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)[0], encoding="utf-8")
    cluster = Cluster.from_yaml(file)
    assert cluster.size == 16
    kind = dataclasses.replace(cluster.weakest, source="all fields are written", fuses=False)
    told = yaml.safe_load(dataclasses.replace(cluster, devices=(kind,)).to_yaml())
    explained = set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE))
    assert explained >= {*told["dimensions"][0], *told["devices"][0]}
    assert "fuses" in told["devices"][0]


def test_tp_lies_inside_hosts_and_pp_across() -> None:
    cluster, mesh = Cluster.parse("2x8xH100"), Mesh.of(pp=2, tp=8)
    assert [hop.n for hop in hops(cluster, mesh.group(("tp",), 0))] == [8, 1]
    assert [hop.n for hop in hops(cluster, mesh.group(("pp",), 0))] == [1, 2]
    assert not bad_order(cluster, mesh)


def test_a_bad_order_is_named() -> None:
    """tp=4 fits into a host of 6, but the second group of ranks begins inside one and ends in the next."""
    experts = Mesh.of(dp=2, tp=8, ep=2, etp=8)
    said = bad_order(Cluster.parse("2x8xH100"), Mesh.of(dp=2, tp=8, ep=2))
    assert said == ""
    assert "ep x etp" not in bad_order(Cluster.parse("2x8xH100"), experts)
    split = Cluster.parse("4x3xH100")
    assert "tp = 2 would fit into a host of 3" in bad_order(split, Mesh.of(pp=6, tp=2))


def test_this_machine_is_measured() -> None:
    cluster = detect()
    assert cluster.weakest.bytes_per_s > 1e8
    assert cluster.dimensions[0].bytes_per_s > 1e7
    assert "name:" in cluster.to_yaml()
