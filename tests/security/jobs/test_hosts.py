"""A job whose ranks are on two hosts, and a stranger on a third: network namespaces, joined by a bridge.

Without our launcher, as `torchrun` would start it. What is on loopback is out of the stranger's reach; what is bound
to the interface between the hosts is not. Who does not have the job's secret is dropped, and the job ends as it would
have.
"""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from partitioner.compile.parts import Parts
from runtime.processes.authenticated_links import connect, key_of
from tests.security.jobs.doors import Listening, Network, go_to, in_child, knock, listening, why_no_namespaces
from tests.security.jobs.local_job import GARBAGE
from tests.support import handmade

WHY_NOT = why_no_namespaces()
pytestmark = [pytest.mark.processes, pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)]
SECRET = "what only the ranks know"
PORT = 29_517


def test_what_is_on_loopback_is_not_reached_from_another_host() -> None:
    with Network(2) as network, socket.socket(socket.AF_UNIX) as named:
        sockets: list[socket.socket] = []

        def open_doors() -> None:
            go_to(network.pids[0])  # this thread alone
            sockets.append(socket.create_server(("127.0.0.1", 0)))
            sockets.append(socket.create_server((network.addresses[0], 0)))
            sockets.append(socket.socket(socket.AF_UNIX))
            sockets[-1].bind("")
            sockets[-1].listen()

        thread = threading.Thread(target=open_doors)
        thread.start()
        thread.join()
        loopback, bridge = (Listening("tcp", *map(str, each.getsockname())) for each in sockets[:2])
        named = Listening("unix", "@" + sockets[2].getsockname()[1:].decode(), "")
        for where, reached in ((network.pids[0], (True, True, True)), (network.pids[1], (False, True, False))):
            found = [knock(door, b"", is_stranger=True, where=where) for door in (loopback, bridge, named)]
            assert tuple(said is not None for said in found) == reached
        for each in sockets:
            each.close()


class Job:
    """Two ranks, each on a host of its own; rank 1 has not come until it is let."""

    def __init__(self, network: Network, folder: Path, root: Path) -> None:
        self.network, self.folder = network, folder
        self.ranks = [self._start(rank, root) for rank in (0, 1)]

    def _start(self, rank: int, root: Path) -> subprocess.Popen[str]:
        job = {"RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 1, "OMP_NUM_THREADS": 1}
        meeting = {"MASTER_ADDR": self.network.addresses[0], "MASTER_PORT": PORT, "GLOO_SOCKET_IFNAME": "eth"}
        more = {name: str(value) for name, value in {**job, **meeting}.items()}
        host = self.network.pids[rank]
        return subprocess.Popen(
            [
                "nsenter",
                "-t",
                str(host),
                "-n",
                sys.executable,
                "-P",
                "-m",
                "tests.security.jobs.job_rank",
                "off",
                self.folder,
            ],
            env={**os.environ, **more, "PYTHONPATH": str(root), "PARTITIONER_SECRET": SECRET},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def wait_for(self, done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 90
        while not done():
            for rank in self.ranks:
                assert rank.poll() is None, rank.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def let(self, name: str) -> None:
        (self.folder / name).touch()

    def doors(self, rank: int) -> list[Listening]:
        return listening(self.ranks[rank].pid)  # nsenter becomes what it runs

    def end(self) -> list[list[float]]:
        said = [rank.communicate(timeout=90)[0] for rank in self.ranks]
        assert [rank.returncode for rank in self.ranks] == [0, 0], said
        return [json.loads((self.folder / f"answer-{rank}").read_bytes())["result"] for rank in (0, 1)]


@pytest.fixture
def network() -> Iterator[Network]:
    with Network(3) as network:
        yield network


@pytest.fixture
def job(network: Network, tmp_path: Path, pytestconfig: pytest.Config) -> Iterator[Job]:
    job = Job(network, tmp_path, pytestconfig.rootpath)
    yield job
    for rank in job.ranks:
        if rank.poll() is None:
            rank.kill()
            rank.communicate()


@pytest.mark.slow
def test_a_stranger_on_the_network_is_dropped(job: Job, network: Network) -> None:
    first, second, third = network.addresses
    stranger = network.pids[2]
    assert third
    store = Listening("tcp", first, str(PORT))
    job.wait_for(lambda: len(job.doors(0)) == 2)  # the store, and where rank 0 waits for the others
    (meeting,) = set(job.doors(0)) - {store}
    assert meeting.address == first  # the interface between the hosts, and no other
    for content in GARBAGE:
        assert knock(meeting, content, is_stranger=True, where=stranger) == b""
    assert knock(Listening("tcp", "127.0.0.1", meeting.port), b"", is_stranger=True, where=stranger) is None

    def take_part(key: Callable[[str], bytes]) -> bytes:
        """As rank 1, with all that the store knows: it believes whoever reaches it."""
        client = TCPStore(first, PORT, is_master=False, timeout=timedelta(seconds=5))
        token, _, address = client.get("peers/0/rank 0").decode().partition(" ")
        assert address == f"{first} {meeting.port}"
        try:
            connect(address, key(token), 1, timeout_s=1).close()
        except OSError as error:
            return str(error).encode()
        return b"in"

    said = in_child(lambda: take_part(key_of), is_stranger=True, where=stranger)
    assert said is not None
    assert b"rank 0 gave no answer" in said
    job.let("come")
    job.wait_for(lambda: all((job.folder / f"ready-{rank}").exists() for rank in (0, 1)))
    assert meeting not in job.doors(0)
    for rank, address in enumerate((first, second)):
        for door in set(job.doors(rank)) - {store}:
            assert (door.kind, door.address) == ("tcp", address)
            for content in (b"", GARBAGE[4]):
                assert knock(door, content, is_stranger=True, where=stranger) is None, f"{door} answers"
    job.let("go")
    expected = Parts(handmade.partitioned(2), None).simulate(input_ids=handmade.input_ids()).tolist()
    assert job.end() == [expected, expected]


@pytest.mark.slow
def test_the_secret_lets_in(job: Job, network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: the same client with the secret is taken for rank 1."""
    monkeypatch.setenv("PARTITIONER_SECRET", SECRET)
    job.wait_for(lambda: len(job.doors(0)) == 2)

    def take_part() -> bytes:
        client = TCPStore(network.addresses[0], PORT, is_master=False, timeout=timedelta(seconds=5))
        token, _, address = client.get("peers/0/rank 0").decode().partition(" ")
        connect(address, key_of(token), 1, timeout_s=1).close()
        return b"in"

    assert in_child(take_part, is_stranger=True, where=network.pids[2]) == b"in"
