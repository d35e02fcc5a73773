"""Whoever knocks at the port of a job that is starting: the job starts all the same, and knows of every rank."""

import contextlib
import errno
import os
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed import HashStore, Store

from partitioner.errors import CommunicationError, RankLost
from runtime.processes import authenticated_links as links
from runtime.processes import heartbeat as module
from runtime.processes.heartbeat import Heartbeat
from tests.security.jobs.garbage import LINES

HOSTS = ["", "127.0.0.1"]


class Job:
    """Three ranks, of which rank 2 has not come yet."""

    def __init__(self, host: str) -> None:
        self.host, self.store, self.came = host, HashStore(), dict[int, Heartbeat | BaseException]()
        self.threads = [threading.Thread(target=self.join, args=(rank,), daemon=True) for rank in (0, 1, 2)]
        for thread in self.threads[:2]:
            thread.start()
        self.strangers: list[socket.socket] = []
        self.address = self.store.get("rank 0").decode().partition(" ")[2]

    def join(self, rank: int) -> None:
        try:
            self.came[rank] = Heartbeat.connect(self.store, self.host, rank, 3, timeout_s=60)
        except BaseException as error:
            self.came[rank] = error

    def knock(self, content: bytes = b"") -> socket.socket:
        deadline = time.monotonic() + 10
        while True:
            try:
                stranger = links._open(self.address, 5)
                break
            except BlockingIOError:  # others stand before it
                assert time.monotonic() < deadline
                time.sleep(0.001)
        self.strangers.append(stranger)
        with contextlib.suppress(OSError):  # it was turned away in the midst of it
            stranger.sendall(content)
        return stranger

    def complete(self) -> list[Heartbeat]:
        self.threads[2].start()
        for thread in self.threads:
            thread.join(60)
        ranks = [self.came[rank] for rank in range(3)]
        assert all(isinstance(rank, Heartbeat) for rank in ranks), ranks
        return ranks  # type: ignore[return-value]


def wait_for(done: Any) -> None:
    deadline = time.monotonic() + 10
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def is_over(connection: socket.socket) -> bool:
    try:
        return connection.recv(10) == b""
    except OSError:
        return True


def require_hearing(ranks: list[Heartbeat]) -> None:
    """What one says all hear, and that one leaves too."""
    ranks[1].tell("waiting", "here")
    wait_for(lambda: all(rank.known("waiting").get(1) == "here" for rank in ranks))
    ranks[2]._links[0].socket.shutdown(socket.SHUT_RDWR)  # as if its process ended
    wait_for(lambda: all(rank.lost() == {2: "lost: its process ended"} for rank in ranks[:2]))


@pytest.fixture
def job(request: pytest.FixtureRequest) -> Iterator[Job]:
    job = Job(request.param)
    yield job
    for one in [*job.came.values(), *job.strangers]:
        if isinstance(one, Heartbeat | socket.socket):
            one.close()


@pytest.mark.parametrize(
    ("host", "count"),
    [*((host, 100) for host in HOSTS), *(pytest.param(host, 1000, marks=pytest.mark.slow) for host in HOSTS)],
)
def test_lines_of_garbage_change_nothing(host: str, count: int) -> None:
    job = Job(host)

    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(LINES, min_size=1, max_size=3), st.booleans())
    def send(lines: list[bytes], ends: bool) -> None:
        with job.knock() as stranger, contextlib.suppress(OSError):
            for line in lines:
                stranger.sendall(line + (b"\n" if ends else b""))

    send()
    ranks = job.complete()
    require_hearing(ranks)
    for rank in ranks:
        rank.close()


@pytest.mark.parametrize("job", HOSTS, indirect=True)
def test_the_line_that_ended_the_watch(job: Job) -> None:
    stranger = job.knock(b"[" * 60_000 + b"\n")
    wait_for(lambda: is_over(stranger))  # this connection alone
    require_hearing(job.complete())


@pytest.mark.parametrize("job", HOSTS, indirect=True)
def test_who_says_nothing_is_let_go_and_a_crowd_keeps_nobody_out(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_HELLO_S", 0.3)
    for _ in range(200):
        job.knock(b"HEL")
    ranks = job.complete()
    wait_for(lambda: not ranks[0]._strangers)
    assert ranks[0]._listener is None
    require_hearing(ranks)


@pytest.mark.parametrize("job", HOSTS, indirect=True)
def test_without_descriptors_for_a_while(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = 0

    def accept(connection: socket.socket) -> None:
        nonlocal refused
        refused += 1
        connection.close()
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch:
        patch.setattr(links.Link, "accept", accept)
        job.threads[2].start()
        wait_for(lambda: refused > 1)
        assert refused < 50  # it is tried again, but not all the time
    job.threads[2].join(30)
    for thread in job.threads:
        thread.join(30)
    require_hearing([job.came[rank] for rank in range(3)])  # type: ignore[misc]


def test_the_watch_says_when_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job("127.0.0.1")
    ranks = job.complete()
    monkeypatch.setattr(threading, "excepthook", lambda given: None)

    def fail() -> None:
        raise RecursionError("deep")

    ranks[1]._beat = fail  # type: ignore[method-assign]
    wait_for(lambda: all(1 in rank.lost() for rank in ranks))
    assert "the watch over the other ranks ended: RecursionError: deep" in ranks[0].lost()[1]
    for rank in ranks:
        rank.close()


class Recorder:
    """Between rank 1 and rank 0: passes on what they say, and can say it again."""

    def __init__(self, store: Store) -> None:
        token, host, port = store.get("rank 0").decode().split()
        self.target, self.seen = (host, int(port)), b""
        self.door = socket.create_server(("127.0.0.1", 0))
        self.store = HashStore()
        self.store.set("rank 0", f"{token} 127.0.0.1 {self.door.getsockname()[1]}")
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self) -> None:
        with self.door, self.door.accept()[0] as left, socket.create_connection(self.target) as self.right:
            answers = threading.Thread(target=self.copy, args=(self.right, left))
            answers.start()
            with contextlib.suppress(OSError):
                while received := left.recv(1 << 16):
                    self.seen += received
                    self.right.sendall(received)
            with contextlib.suppress(OSError):
                self.right.shutdown(socket.SHUT_RDWR)
            answers.join()

    def copy(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while received := source.recv(1 << 16):
                sink.sendall(received)


def test_what_was_said_cannot_be_said_again() -> None:
    job = Job.__new__(Job)
    job.host, job.store, job.came = "127.0.0.1", HashStore(), {}
    first = threading.Thread(target=job.join, args=(0,))
    first.start()
    recorder = Recorder(job.store)
    through = Job.__new__(Job)
    through.host, through.store, through.came = "127.0.0.1", recorder.store, job.came
    threads = [threading.Thread(target=through.join, args=(1,)), threading.Thread(target=job.join, args=(2,))]
    for thread in threads:
        thread.start()
    for thread in [first, *threads]:
        thread.join(30)
    ranks = [job.came[rank] for rank in range(3)]
    assert all(isinstance(rank, Heartbeat) and rank.is_well for rank in ranks)
    recorder.right.sendall(recorder.seen.split(b"\n")[1] + b"\n")  # its first beat
    wait_for(lambda: 1 in ranks[0].lost())  # type: ignore[union-attr]
    for rank in ranks:
        rank.close()  # type: ignore[union-attr]
    recorder.thread.join(10)


def test_without_the_secret_nobody_comes_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """As over hosts: who reads the store, but does not have the secret."""
    monkeypatch.setenv("PARTITIONER_SECRET", "one")
    job = Job("127.0.0.1")
    wait_for(lambda: sum(thread.name == "watch the other ranks" for thread in threading.enumerate()) == 2)
    monkeypatch.setenv("PARTITIONER_SECRET", "another")
    with pytest.raises(RankLost, match=r"rank 0 has not come, or cannot be reached on 127\.0\.0\.1: rank 0 gave no"):
        Heartbeat.connect(job.store, job.host, 2, 3, timeout_s=0.5)
    monkeypatch.setenv("PARTITIONER_SECRET", "one")
    require_hearing(job.complete())


def test_a_secret_that_others_may_read_is_refused(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = tmp_path / "secret"
    monkeypatch.setenv("PARTITIONER_SECRET_FILE", str(secret))
    with pytest.raises(CommunicationError, match="cannot be read"):
        links.key_of("token")
    secret.write_text("")
    secret.chmod(0o600)
    with pytest.raises(CommunicationError, match="is empty"):
        links.key_of("token")
    secret.write_text("abc\n")
    from_file = links.key_of("token")
    secret.chmod(0o640)
    with pytest.raises(CommunicationError, match="may be read by others: chmod 600"):
        links.key_of("token")
    monkeypatch.delenv("PARTITIONER_SECRET_FILE")
    assert links.key_of("token") != from_file
    monkeypatch.setenv("PARTITIONER_SECRET", "abc")
    assert links.key_of("token") == from_file


@pytest.mark.parametrize(
    ("host", "bound"),
    [("127.0.0.1", "127.0.0.1"), ("localhost", "127.0.0.1"), ("192.0.2.1", "::"), ("name.invalid", "::")],
)
def test_it_listens_where_it_is_asked_to(host: str, bound: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    with links.listen(host) as door:
        assert door.getsockname()[0] in (bound, "0.0.0.0" if bound == "::" else "::1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    with links.listen(host) as door:
        assert door.getsockname()[0] == "127.0.0.1"
        assert links.address_of(door, host).startswith("127.0.0.1 ")
