"""Which rank of which replica a process is, under each launcher; and what messages call it."""

from __future__ import annotations

import os

import pytest

from partitioner.errors import CommunicationError, PlanError
from partitioner.sharding.mesh import Mesh
from runtime.processes.place import LOCAL_STORE, REPLICA, Place, is_rank
from runtime.processes.slurm import adopt_slurm, first_host, tasks_here

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
MESH = Mesh.of(pp=2, tp=2)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in [*VARIABLES, LOCAL_STORE, REPLICA, *(name for name in os.environ if name.startswith("SLURM_"))]:
        monkeypatch.delenv(name, raising=False)
    # what a test's own code sets goes with the test
    for name in VARIABLES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return monkeypatch


def set_all(environment: pytest.MonkeyPatch, **values: object) -> None:
    for name, value in values.items():
        environment.setenv(name, str(value))


def torchrun(environment: pytest.MonkeyPatch, rank: int, world: int, here: int) -> None:
    set_all(environment, RANK=rank, WORLD_SIZE=world, LOCAL_RANK=rank % here, LOCAL_WORLD_SIZE=here)
    set_all(environment, MASTER_ADDR="127.0.0.1", MASTER_PORT=29_500)


def test_ranks_of_torchrun_are_those_of_one_replica_after_the_other(environment: pytest.MonkeyPatch) -> None:
    torchrun(environment, 6, 8, 4)
    assert Place.here(MESH, replicas=2) == Place(MESH, 2, 1, 2)
    assert Place.here(Mesh.of(tp=8)) == Place(Mesh.of(tp=8), 6)
    with pytest.raises(PlanError, match=r"the plan \(3 replicas of pp 2 x tp 2\) needs 12 processes, got 8"):
        Place.here(MESH, replicas=3)
    with pytest.raises(PlanError, match="needs 4 processes, got 8"):
        Place.here(MESH)


def test_our_launcher_says_which_replica_it_started(environment: pytest.MonkeyPatch) -> None:
    set_all(environment, RANK=2, WORLD_SIZE=4, **{LOCAL_STORE: "/proc/self/fd/3", REPLICA: "1/3"})
    place = Place.here(MESH, replicas=3)
    assert (place.rank, place.replica, place.replicas, place.is_together) == (2, 1, 3, False)
    with pytest.raises(PlanError, match="needs 8 processes, got 4"):
        Place.here(Mesh.of(tp=8), replicas=3)


def test_a_replica_on_one_host_needs_no_port(environment: pytest.MonkeyPatch) -> None:
    torchrun(environment, 4, 8, 4)  # the second host's first
    second = Place.here(MESH, replicas=2)
    assert (second.host, second.main_host, second.replicas_here) == ("", "127.0.0.1", 1)
    torchrun(environment, 2, 8, 2)
    across = Place.here(MESH, replicas=2)
    assert (across.replica, across.host, across.main_host) == (0, "127.0.0.1", "127.0.0.1")
    torchrun(environment, 4, 8, 2)  # of two hosts: the address from which it reaches the first
    assert Place.here(MESH, replicas=2).host == "127.0.0.1"
    torchrun(environment, 5, 8, 8)
    all_here = Place.here(MESH, replicas=2)
    assert (all_here.host, all_here.main_host, all_here.replicas_here) == ("", "", 2)


def test_names_say_stage_and_replica_where_there_are_several() -> None:
    assert Place(Mesh.of(tp=4), 0).name(3) == "rank 3"
    assert Place(MESH, 0).name(3) == "rank 3 (stage 1)"
    assert Place(MESH, 0, 1, 2).names([0, 3]) == "ranks 0 of replica 1 (stage 0), 3 of replica 1 (stage 1)"
    assert Place(Mesh.of(), 0, 1, 2).names([0]) == "rank 0 of replica 1"
    assert Place(MESH, 0, 0, 2).name_of_all(7) == "rank 3 of replica 1 (stage 1)"


SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "node[07-08]",
    "SLURM_JOB_ID": "1234567",
}


def test_slurm_says_what_torchrun_would(environment: pytest.MonkeyPatch) -> None:
    set_all(environment, **SLURM)
    assert is_rank()
    assert Place.here(MESH, replicas=2) == Place(MESH, 1, 1, 2)
    said = {name: os.environ[name] for name in VARIABLES}
    assert list(said.values()) == ["5", "8", "1", "4", "1", "node07", "24567"]


def test_what_is_set_already_stays() -> None:
    given = {**SLURM, "RANK": "0", "WORLD_SIZE": "1"}
    adopt_slurm(given)
    assert given == {**SLURM, "RANK": "0", "WORLD_SIZE": "1"}
    given = {**SLURM, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1"}
    adopt_slurm(given)
    assert (given["MASTER_ADDR"], given["MASTER_PORT"], given["RANK"]) == ("10.0.0.1", "1", "5")


@pytest.mark.parametrize("missing", [{"SLURM_STEP_NUM_TASKS": "1"}, {"SLURM_PROCID": None}])
def test_a_shell_of_one_task_is_no_rank(missing: dict[str, str | None]) -> None:
    given = {name: value for name, value in {**SLURM, **missing}.items() if value is not None}
    adopt_slurm(given)
    assert "RANK" not in given


def test_neighbours_on_different_nodes_are_refused() -> None:
    with pytest.raises(CommunicationError, match="--distribution=block"):
        adopt_slurm({**SLURM, "SLURM_DISTRIBUTION": "cyclic"})


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("node07", "node07"),
        ("node[07-08,11]", "node07"),
        ("node[9]", "node9"),
        ("a-1.example,b", "a-1.example"),
        ("rack[2-3]n[01,04]x,other", "rack2n01x"),
    ],
)
def test_the_first_host_of_slurms_list(hosts: str, first: str) -> None:
    assert first_host(hosts) == first


def test_tasks_of_each_node() -> None:
    assert [tasks_here("2(x3),1", node) for node in range(4)] == [2, 2, 2, 1]
    for tasks, node in (("2(x3),1", 4), ("many", 0)):
        with pytest.raises(CommunicationError, match="LOCAL_WORLD_SIZE"):
            tasks_here(tasks, node)
