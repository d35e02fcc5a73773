"""Clusters from files of other tools, written by hand as those tools write them; broken ones are named."""

from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from partitioner.cli.app import app
from partitioner.errors import InputError
from partitioner.planning.cluster import Cluster
from partitioner.planning.importers.read_file import import_cluster
from partitioner.planning.importers.slurm_topology import expand_hosts

NVSWITCH = '<nvlink target="0000:c7:00.0" count="12" tclass="0x068000"/>'


def gpu(number: int, links: str = "", *, sm: int = 80, speed: str = "16.0 GT/s PCIe") -> str:
    return (
        f'<pci busid="0000:0{number}:00.0" class="0x030200" link_speed="{speed}" link_width="16">'
        f'<gpu dev="{number}" sm="{sm}" rank="{number}" gdr="1">{links}</gpu></pci>'
    )


def link(number: int, count: int = 4) -> str:
    return f'<nvlink target="0000:0{number}:00.0" count="{count}" tclass="0x030200"/>'


def host(*cpus: list[str], net: str = "") -> str:
    parts = "".join(
        f'<cpu numaid="{number}" arch="x86_64" vendor="AuthenticAMD">{"".join(gpus)}{net if not number else ""}</cpu>'
        for number, gpus in enumerate(cpus)
    )
    return f'<system version="1">{parts}</system>'


CARDS = '<pci busid="0000:a0:00.0" link_speed="16.0 GT/s PCIe" link_width="16"><nic>' + "".join(
    f'<net name="mlx5_{i}" dev="{i}" speed="200000" port="1" guid="0x{i + 1:x}" maxconn="131072" gdr="1"/>'
    for i in range(4)
)
CARDS += "</nic></pci>"

NCCL = {
    "switches": (
        host([gpu(i, NVSWITCH) for i in range(4)], [gpu(i, NVSWITCH) for i in range(4, 8)]),
        [("NVLink3", 8, 300.0)],
    ),
    "bridges": (
        host([gpu(0, link(1)), gpu(1, link(0))], [gpu(2, link(3)), gpu(3, link(2))]),
        [("NVLink3", 2, 100.0), ("CPUs", 2, 16.0)],
    ),
    "pcie": (host([gpu(0), gpu(1)], [gpu(2), gpu(3)]), [("PCIe", 2, 25.6), ("CPUs", 2, 16.0)]),
    "bridge over CPUs": (
        host([gpu(0, link(2)), gpu(1, link(3))], [gpu(2, link(0)), gpu(3, link(1))]),
        [("NVLink3", 2, 100.0), ("PCIe", 2, 25.6)],
    ),
    "one": (host([gpu(0, sm=90, speed="32.0 GT/s PCIe")]), [("PCIe", 1, 51.2)]),
}  # fmt: skip


def write(folder: Path, text: str, name: str = "topology.xml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def said(cluster: Cluster) -> list[tuple[str, int, float]]:
    return [(each.name, each.size, round(each.bytes_per_s / 1e9, 3)) for each in cluster.dimensions]


@pytest.mark.parametrize("name", NCCL)
def test_hosts_as_nccl_sees_them(tmp_path: Path, name: str) -> None:
    text, dimensions = NCCL[name]
    assert said(import_cluster(write(tmp_path, text), device="A100")) == dimensions


def test_several_hosts_share_the_cards(tmp_path: Path) -> None:
    path = write(tmp_path, host([gpu(i, NVSWITCH) for i in range(8)], net=CARDS))
    found = import_cluster(path, device="A100", hosts=4)
    assert said(found) == [("NVLink3", 8, 300.0), ("RDMA", 4, 12.5)]  # 4 x 200 Gbit/s for 8 GPUs
    assert found.size == 32
    again = write(tmp_path, found.to_yaml(), "again.yaml")
    assert Cluster.parse(str(again)).dimensions == found.dimensions
    sockets = write(tmp_path, path.read_text().replace("guid=", 'guid="0x0" was='))
    assert import_cluster(sockets, device="A100", hosts=2).dimensions[-1].name == "TCP"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("<system version='1'><cpu>", "no whole XML"),
        ("<graphs/>", "first element is <graphs>"),
        ("<system version='1'/>", "no <gpu>"),
        ('<!DOCTYPE x [<!ENTITY a "b">]><system>&a;</system>', "declares entities"),
        (host([gpu(0, link(1)), gpu(1, link(0)), gpu(2)]), "joined by NVLink are 1, 2"),
        (host([gpu(0), gpu(1)], [gpu(2)]), "GPUs of a CPU are 1, 2"),
        (host([gpu(0, speed="fast")]), "link_speed='fast'"),
        (host([gpu(0, sm=80).replace('sm="80"', "")]), "lacks 'sm'"),
        (host([gpu(0).replace('sm="80"', 'sm="many"')]), "sm='many'"),
        (host([gpu(0, NVSWITCH, sm=50), gpu(1, NVSWITCH, sm=50)]), "NVLinks of sm 50"),
    ],
)
def test_broken_topologies_of_nccl_are_named(tmp_path: Path, text: str, why: str) -> None:
    with pytest.raises(InputError, match=why):
        import_cluster(write(tmp_path, text), device="A100")


def test_what_nccl_does_not_say_is_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path, host([gpu(0)]))
    with pytest.raises(InputError, match=r"sm 80.*--device"):
        import_cluster(path)
    with pytest.raises(InputError, match="no <net>"):
        import_cluster(path, device="A100", hosts=2)
    with pytest.raises(InputError, match="unknown device"):
        import_cluster(path, device="Abacus")


TREE = """
- topology: default
  cluster_default: true
  tree:
    switches:
    - {switch: top, children: "leaf[1-3]"}
    - {switch: leaf1, nodes: "n[01-04]"}
    - {switch: leaf2, nodes: "n[05-07],m1"}
    - {switch: leaf3, nodes: "m[2-5]"}
- topology: racks
  block:
    block_sizes: [2]
    blocks:
    - {block: b1, nodes: "n[01-02]"}
    - {block: b2, nodes: "n[03-04]"}
- topology: plain
  flat: true
"""


def test_slurm_says_who_is_near(tmp_path: Path) -> None:
    path = write(tmp_path, TREE, "topology.yaml")
    found = import_cluster(path, device="8xH100")
    assert [(each.name, each.size) for each in found.dimensions] == [
        ("NVLink4", 8), ("switch level 1", 4), ("switch level 0", 3)
    ]  # fmt: skip
    assert found.dimensions[1].bytes_per_s == Cluster.parse("2x8xH100").dimensions[1].bytes_per_s
    racks = import_cluster(path, device="H100", topology="racks")
    assert [(each.name, each.size) for each in racks.dimensions[1:]] == [("block", 2), ("between blocks", 2)]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (("n[05-07],m1", "n[05-07]"), "leaf2 has 3 below it, leaf1 has 4|leaf2 has 3 below it, leaf3 has 4"),
        (("leaf[1-3]", "leaf[1-4]"), "'leaf4', which is a child"),
        (('children: "leaf[1-3]"', 'children: "top"'), "circle"),
        (("switch: leaf2", "switch: leaf1"), "there twice"),
        (("n[01-04]", "n[04-01]"), "a range such as"),
        (("n[01-04]", "n[1-99999]"), "more than 16384"),
        (("nodes: \"m[2-5]\"", "members: m"), "either nodes or children"),
        (("switches:", "bridges:"), "'switches'"),
        (("  tree:", "  torus:"), "one of tree, block, flat"),
    ],
)  # fmt: skip
def test_broken_topologies_of_slurm_are_named(tmp_path: Path, change: tuple[str, str], why: str) -> None:
    assert change[0] in TREE
    with pytest.raises(InputError, match=why):
        import_cluster(write(tmp_path, TREE.replace(*change), "topology.yaml"), device="8xH100")


def test_what_slurm_does_not_say_is_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path, TREE, "topology.yaml")
    with pytest.raises(InputError, match="--device"):
        import_cluster(path)
    with pytest.raises(InputError, match="no topology 'other'; it has default, racks, plain"):
        import_cluster(path, device="H100", topology="other")
    with pytest.raises(InputError, match="flat"):
        import_cluster(path, device="H100", topology="plain")
    with pytest.raises(InputError, match="leave --hosts out"):
        import_cluster(path, device="H100", hosts=4)
    with pytest.raises(InputError, match="no default"):
        import_cluster(write(tmp_path, TREE.replace("cluster_default: true", "x: 1"), "a.yaml"), device="H100")


def test_lists_of_hosts() -> None:
    assert list(expand_hosts("n[01-03,7],gpu-a, r[1-2]c[1-2]")) == [
        "n01", "n02", "n03", "n7", "gpu-a", "r1c1", "r1c2", "r2c1", "r2c2"
    ]  # fmt: skip
    assert list(expand_hosts("")) == []


SYSTEM = """
data_dir: data/h100_sxm
gpu: {mem_bw: 3350000000000, mem_capacity: 85899345920, bfloat16_tc_flops: 989000000000000, fp8_tc_flops: 1.978e+15}
node: {num_gpus_per_node: 4, intra_node_bw: 450000000000, inter_node_bw: 50000000000, p2p_latency: 0.00001,
       num_gpus_per_rack: 16, inter_rack_bw: 25000000000, inter_rack_latency: 0.00002}
misc: {other_mem: 3758096384}
"""


def test_systems_of_aiconfigurator(tmp_path: Path) -> None:
    path = write(tmp_path, SYSTEM, "mine.yaml")
    found = import_cluster(path)
    assert said(found) == [("host", 4, 450.0)]
    assert found.dimensions[0].fitted == found.devices[0].fitted == "h100_sxm"
    assert found.weakest.usable_bytes == 85899345920 - 3758096384
    assert said(import_cluster(path, hosts=4)) == [("host", 4, 450.0), ("between hosts", 4, 50.0)]
    racks = [("host", 4, 450.0), ("rack", 4, 50.0), ("between racks", 2, 25.0)]
    assert said(import_cluster(path, hosts=8)) == racks
    unknown = write(tmp_path, SYSTEM.replace("h100_sxm", "abacus"), "other.yaml")
    assert import_cluster(unknown).devices[0].fitted == ""


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (("mem_bw: 3350000000000", "mem_bw: fast"), "gpu.mem_bw is a number above 0; got 'fast'"),
        (("mem_capacity: 85899345920,", ""), "gpu.mem_capacity"),
        (("intra_node_bw: 450000000000", "intra_node_bw: -1"), "node.intra_node_bw"),
        (("_tc_flops", "_ops"), "its FLOP/s are not known"),
        (("node:", "nodes:"), "is none of"),
        (("gpu: {", "gpu: {{"), "neither XML nor YAML"),
    ],
)
def test_broken_systems_are_named(tmp_path: Path, change: tuple[str, str], why: str) -> None:
    with pytest.raises(InputError, match=why):
        import_cluster(write(tmp_path, SYSTEM.replace(*change), "mine.yaml"))


def test_uneven_racks_and_wrong_options_are_named(tmp_path: Path) -> None:
    path = write(tmp_path, SYSTEM, "mine.yaml")
    with pytest.raises(InputError, match="no whole number of racks"):
        import_cluster(path, hosts=6)
    with pytest.raises(InputError, match="leave --device out"):
        import_cluster(path, device="H100")
    with pytest.raises(InputError, match="leave --topology out"):
        import_cluster(path, topology="x")
    with pytest.raises(InputError, match="cannot read"):
        import_cluster(tmp_path / "missing.xml")


def test_on_the_command_line(tmp_path: Path) -> None:
    out = tmp_path / "cluster.yaml"
    path = write(tmp_path, NCCL["switches"][0])
    found = CliRunner().invoke(app, ["cluster", "import", str(path), "--device", "A100", "--out", str(out)])
    assert found.exit_code == 0, found.output
    assert yaml.safe_load(out.read_text())["dimensions"][0]["gb_s"] == 300.0
    assert CliRunner().invoke(app, ["cluster", "import"]).exit_code == 2
    assert CliRunner().invoke(app, ["cluster", "show", "H100", "--hosts", "2"]).exit_code == 2
    assert CliRunner().invoke(app, ["cluster", "import", str(path)]).exit_code == 2
