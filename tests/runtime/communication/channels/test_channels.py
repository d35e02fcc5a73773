"""Every primitive, over everything that carries it; what is refused, and what is told of ranks that do not fit."""

from typing import Any

import pytest
import torch

from partitioner.sharding.mesh import Mesh
from runtime.communication.channels import Channel
from runtime.communication.thread_communicator import ThreadGroup
from runtime.ops.communicating import Kind
from runtime.processes.launch import launch
from tests.runtime.communication.channels.channel_cases import every_primitive
from tests.runtime.communication.channels.threads import run

RANKS = "tests.runtime.communication.channels.channel_ranks"


@pytest.mark.parametrize(
    ("mesh", "axes"),
    [
        (Mesh.of(tp=2), "tp"),
        (Mesh.of(tp=3), "tp"),
        (Mesh.of(dp=2, tp=2), "dp"),
        (Mesh.of(dp=2, tp=2), ("dp", "tp")),
        (Mesh.of(dp=2, pp=1, tp=2), ("dp", "pp", "tp")),
    ],
    ids=str,
)
def test_every_primitive_between_threads(mesh: Mesh, axes: str | tuple[str, ...]) -> None:
    outcomes = run(ThreadGroup(mesh), *[lambda comm: every_primitive(comm.channel(axes, node="n"))] * mesh.world_size)
    assert outcomes == [None] * mesh.world_size, outcomes


def test_alone_every_primitive_is_the_identity() -> None:
    channel: Channel = ThreadGroup(Mesh.of()).communicator(0).channel("tp", node="n")
    x = torch.arange(6.0).reshape(3, 2)
    for found in (
        channel.all_reduce(x),
        channel.all_gather(x, 0),
        channel.reduce_scatter(x, 1),
        channel.all_to_all(x, [3], [3]),
        channel.permute_begin(x, 1).finish(),
    ):
        assert torch.equal(found, x)


def test_a_channel_keeps_few_prepared_primitives() -> None:
    """Rows of ever new lengths are collected by one node; those in use are not made anew."""
    channel = ThreadGroup(Mesh.of()).communicator(0).channel("tp", node="n")
    made: list[str] = []
    prepare = channel.prepare

    def counted(kind: Kind, **options: Any) -> Any:
        made.append(kind)
        return prepare(kind, **options)

    channel.prepare = counted  # type: ignore[method-assign]
    for length in range(100):
        channel.all_reduce(torch.zeros(1))
        channel.all_gather(torch.zeros(length), 0, [length])
    assert made.count("all_reduce") == 1
    assert made.count("all_gather") == 100
    assert len(channel._prepared) == 16
    channel.all_gather(torch.zeros(99), 0, [99])
    assert len(made) == 101


@pytest.mark.processes
@pytest.mark.parametrize(
    ("num_ranks", "case"),
    [
        (2, "on"),
        pytest.param(3, "off", marks=pytest.mark.slow),
        pytest.param(2, "off", marks=pytest.mark.slow),
        pytest.param(3, "on", marks=pytest.mark.slow),
        pytest.param(4, "axes", marks=pytest.mark.slow),
    ],
)
def test_every_primitive_between_processes(
    num_ranks: int, case: str, monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(pytestconfig.rootpath))
    launch([RANKS, "cpu", case], num_ranks=num_ranks, timeout_s=180)


@pytest.mark.gpu
@pytest.mark.processes
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("num_ranks", "case"), [(2, "auto"), (3, "auto"), (4, "axes")])
def test_every_primitive_over_nccl(
    num_ranks: int, case: str, monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(pytestconfig.rootpath))
    launch([RANKS, "cuda", case], num_ranks=num_ranks, timeout_s=400)
