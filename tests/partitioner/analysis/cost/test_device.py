"""Devices: measured in a moment, written and read, and the seconds that follow from their numbers."""

import dataclasses
import threading
import time

import pytest
import torch

from partitioner.analysis.cost.device import (
    LARGE_BYTES,
    SMALL_BYTES,
    Device,
    Link,
    fit_link,
    measure_device,
    measure_link,
)
from partitioner.analysis.cost.node_cost import MeetingCost, NodeCost
from partitioner.analysis.cost.program_cost import ProgramCost, program_cost
from partitioner.errors import InputError
from partitioner.sharding.mesh import Mesh
from runtime.communication.channels import AloneChannel
from runtime.communication.thread_communicator import ThreadGroup
from tests.support import handmade

CPU = torch.device("cpu")
DEVICE = Device("made up", 1e9, {"float64": 1e12, "float32": 2e12}, Link(1e-5, 1e-9), Link(1e-4, 1e-8))


def meeting(kind: str, n: int, size: int = 1000) -> MeetingCost:
    return MeetingCost(kind, tuple(range(n)), size, size)  # type: ignore[arg-type]


def node(**costs: object) -> NodeCost:
    return NodeCost("n", "op", "", frozenset({0}), "float64", **costs)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "messages", "sent"),
    [
        ("all_reduce", 6, 1.5),
        ("reduce_scatter", 3, 0.75),
        ("all_gather", 3, 3),
        ("all_to_all", 3, 0.75),
        ("permute", 1, 1),
        ("send", 1, 1),
        ("receive", 1, 1),
    ],
)
def test_seconds_of_a_meeting_of_four_ranks(kind: str, messages: int, sent: float) -> None:
    assert Link(2.0, 0.0).seconds(meeting(kind, 4)) == pytest.approx(messages * 2.0)
    assert Link(0.0, 2.0).seconds(meeting(kind, 4)) == pytest.approx(sent * 2000)
    assert Link(1.0, 1.0).seconds(meeting(kind, 1)) == 0


def test_a_reduce_scatter_and_an_all_gather_of_the_pieces_are_an_all_reduce() -> None:
    parts = DEVICE.meeting_seconds(meeting("reduce_scatter", 4)) + DEVICE.meeting_seconds(meeting("all_gather", 4, 250))
    assert parts == pytest.approx(DEVICE.meeting_seconds(meeting("all_reduce", 4)))


def test_a_group_that_crosses_hosts_takes_the_slow_link() -> None:
    near, far = MeetingCost("send", (0, 1), 100, 100), MeetingCost("send", (1, 2), 100, 100)
    assert DEVICE.meeting_seconds(near, ranks_per_host=2) == pytest.approx(1e-5 + 1e-7)
    assert DEVICE.meeting_seconds(far, ranks_per_host=2) == pytest.approx(1e-4 + 1e-6)
    assert DEVICE.meeting_seconds(far) == pytest.approx(1e-5 + 1e-7)


def test_the_longer_of_bytes_and_products_binds_a_node() -> None:
    reading, multiplying = node(bytes_read=600, bytes_written=400, flops=10), node(bytes_read=1, flops=10**9)
    talking = node(meetings=(meeting("send", 2, 10**9),))
    seconds = ProgramCost((reading, multiplying, talking)).seconds(DEVICE)
    assert seconds.memory == pytest.approx(1e-6)
    assert seconds.products == pytest.approx(1e-3)
    assert seconds.links == pytest.approx(1 + 1e-5)
    assert seconds.total == pytest.approx(seconds.memory + seconds.products + seconds.links)
    assert seconds.binds == "links"
    assert ProgramCost((reading,)).seconds(DEVICE).binds == "memory"
    assert ProgramCost((multiplying,)).seconds(DEVICE).binds == "products"


def test_a_slower_device_takes_longer() -> None:
    cost = program_cost(handmade.partitioned(2), {"tp": 0}, {"batch": 2, "sequence": 3})
    slower = dataclasses.replace(DEVICE, bytes_per_s=5e8, flops_per_s={"float64": 5e11})
    assert cost.seconds(slower).total > cost.seconds(DEVICE).total > 0


def test_a_number_that_was_not_measured_is_asked_for() -> None:
    lonely = Device("lonely", 1e9, {"float32": 1e12})
    with pytest.raises(InputError, match=r"float64 were not measured on 'lonely', only of float32"):
        ProgramCost((node(flops=1),)).seconds(lonely)
    with pytest.raises(InputError, match="link inside hosts"):
        ProgramCost((node(meetings=(meeting("send", 2),)),)).seconds(lonely)
    with pytest.raises(InputError, match="link between hosts"):
        ProgramCost((node(meetings=(meeting("send", 2),)),)).seconds(lonely, ranks_per_host=1)
    assert ProgramCost((node(meetings=(meeting("all_reduce", 1),)),)).seconds(lonely).total == 0


def test_a_device_is_written_and_read() -> None:
    for device in (DEVICE, Device("no links", 1e9, {})):
        assert Device.from_json(device.to_json()) == device


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"name": "x"}', DEVICE.to_json().replace("1000000000.0", "-1")])
def test_what_is_no_device_is_refused(text: str) -> None:
    with pytest.raises(InputError):
        Device.from_json(text)


def test_a_link_is_found_again_from_two_sizes() -> None:
    link = Link(3e-5, 2e-10)
    for n in (2, 5):
        times = [link.seconds(meeting("all_reduce", n, size)) for size in (SMALL_BYTES, LARGE_BYTES)]
        found = fit_link(n, *times)
        assert (found.alpha_s, found.beta_s_per_byte) == pytest.approx((link.alpha_s, link.beta_s_per_byte))
    assert fit_link(2, 1e-3, 1e-4) == Link(5e-4, 0.0)  # noise: no link is faster for more


def test_this_machine_is_measured_in_a_moment() -> None:
    start = time.perf_counter()
    found = measure_device(CPU, dtypes=(torch.float32, torch.float64))
    assert time.perf_counter() - start < 2  # half of it here; the rest is for a busy machine
    assert 1e8 < found.bytes_per_s < 1e13
    assert 1e8 < found.flops_per_s["float64"] < found.flops_per_s["float32"] * 4 < 1e15
    assert found.name == "cpu"


def test_ranks_measure_their_link_together() -> None:
    group = ThreadGroup(Mesh.of(tp=2), timeout_s=30)
    found: dict[int, Link] = {}

    def work(rank: int) -> None:
        found[rank] = measure_link(group.communicator(rank).channel("tp", node="link"), CPU)
        group.end(rank)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert found[0] == found[1]
    assert found[0].alpha_s > 0 or found[0].beta_s_per_byte > 0


def test_a_link_needs_two_ranks() -> None:
    with pytest.raises(InputError, match="has one rank"):
        measure_link(AloneChannel(("tp",), (0,), 0, node="link"), CPU)
