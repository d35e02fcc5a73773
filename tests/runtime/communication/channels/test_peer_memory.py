"""Which way is taken between GPUs that write into each other's memory, and when none is; the kernels: tests/gpu."""

import json
import logging
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from partitioner.errors import CommunicationError
from runtime.communication import process_groups
from runtime.communication.peer_memory import mapped_memory
from runtime.communication.peer_memory.choice import SIZES, Choice
from runtime.communication.peer_memory.mapped_memory import BLOCKS, ROW_BYTES, SLOTS, Geometry, Unavailable, obstacle
from runtime.communication.process_groups import ProcessGroups

ROWS = [
    (1024, {"nccl": 9.0, "small": 3.0, "large": 5.0}),
    (4096, {"nccl": 9.0, "small": 4.0, "large": 5.0}),
    (16384, {"nccl": 9.0, "large": 6.0}),
    (65536, {"nccl": 12.0, "large": 20.0}),
]


def chosen() -> Choice:
    return Choice.of_times(dict.fromkeys(SIZES, ROWS))


@pytest.mark.parametrize(
    ("num_bytes", "way"),
    [
        (1, "small"),
        (4096, "small"),
        (8192, "small"),
        (8193, "large"),
        (16384, "large"),
        (32769, "nccl"),
        (2**30, "nccl"),
    ],
)
def test_the_nearest_measured_size_decides(num_bytes: int, way: str) -> None:
    assert chosen().of("all_reduce", num_bytes) == way


def test_neighbours_that_agree_are_one_row() -> None:
    assert [way for _, way in chosen().table["permute"]] == ["small", "large", "nccl"]
    assert chosen().table["permute"][-1][0] == math.inf


def test_what_is_kept_is_read_again() -> None:
    assert Choice.from_data(json.loads(chosen().to_json())) == chosen()


@pytest.mark.parametrize(
    "rows",
    [
        None,
        [[1024, "small"]],  # nothing for what is larger
        [[None, "by pigeon"]],
        [["many", "small"], [None, "nccl"]],
        [],
    ],
)
def test_what_is_no_table_is_measured_anew(rows: Any) -> None:
    assert Choice.from_data({kind: rows for kind in SIZES}) is None  # noqa: C420 - each is a list of its own
    assert Choice.from_data(rows) is None
    assert Choice.from_data({"all_reduce": [[None, "small"]]}) is None


def test_without_a_table_large_tensors_are_left_to_nccl() -> None:
    assert Choice.unmeasured().of("all_gather", 8192) == "small"
    assert Choice.unmeasured().of("all_gather", 2**20) == "nccl"


def rank(**other: Any) -> dict[str, Any]:
    return {"host": "h", "gpu": "a", "name": "GPU", "capability": [9, 0], "missing": "", **other}


@pytest.mark.parametrize(
    ("second", "why"),
    [
        ({"gpu": "b"}, ""),
        ({"gpu": "b", "host": "other"}, "the ranks 0, 2 are on several hosts"),
        ({}, "several ranks share a GPU"),
        ({"gpu": "b", "missing": "no triton"}, "rank 2 has no triton"),
        ({"gpu": "b", "capability": [6, 1]}, "the GPU of rank 2 (GPU) is older than compute capability 7.0"),
    ],
)
def test_why_gpus_cannot(second: dict[str, Any], why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped_memory.torch.cuda, "device_count", lambda: 0)
    assert obstacle([0, 2], [rank(), rank(**second)], torch.device("cuda", 0)) == why


def test_groups_have_names_of_their_own_whatever_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch refuses a second group of a name: a program connects twice, with one seed."""
    properties = SimpleNamespace(uuid="a", name="GPU", major=9, minor=0)
    monkeypatch.setattr(mapped_memory.torch.cuda, "get_device_properties", lambda device: properties)
    tokens = []
    for _ in range(2):
        torch.manual_seed(0)
        before = torch.get_rng_state()
        tokens.append(mapped_memory.standing(torch.device("cuda", 0))["token"])
        assert torch.equal(torch.get_rng_state(), before)
    assert tokens[0] != tokens[1]


def test_a_gpu_out_of_reach_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = mapped_memory.torch.cuda
    monkeypatch.setattr(cuda, "device_count", lambda: 2)
    monkeypatch.setattr(cuda, "get_device_properties", lambda i: SimpleNamespace(uuid="ab"[i]))
    monkeypatch.setattr(cuda, "can_device_access_peer", lambda own, other: False)
    why = obstacle([0, 1], [rank(), rank(gpu="b")], torch.device("cuda", 0))
    assert why == "GPU 0 cannot reach the memory of rank 1's (GPU)"


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 8, 16])
def test_parts_of_the_memory_do_not_overlap(num_ranks: int) -> None:
    geometry = Geometry(num_ranks)
    small = num_ranks * 2 * (geometry.small_bytes * 2)
    assert geometry.start_of_data == small
    assert geometry.start_of_flags == small + num_ranks * SLOTS * BLOCKS * geometry.chunk_bytes
    assert geometry.start_of_row_flags == geometry.start_of_flags + 4 * num_ranks * BLOCKS
    assert geometry.start_of_rows >= geometry.start_of_row_flags + 4 * num_ranks
    assert geometry.start_of_rows % 256 == 0
    assert geometry.num_bytes == geometry.start_of_rows + ROW_BYTES
    assert geometry.chunk_bytes & (geometry.chunk_bytes - 1) == 0
    assert geometry.num_bytes <= 200 * 2**20


@pytest.mark.parametrize("several_hosts", [True, False])
def test_where_it_cannot_be_had_it_says_why(
    several_hosts: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    groups = ProcessGroups.__new__(ProcessGroups)
    groups.rank, groups.device, groups.timeout_s, groups.peers = 0, torch.device("cuda", 0), 1.0, {}
    groups._groups, groups._on_host = {(0, 1): None}, {}  # type: ignore[dict-item]

    def cannot(*given: Any, **options: Any) -> None:
        raise Unavailable("rank 1: no way there", several_hosts=several_hosts)

    monkeypatch.setattr(process_groups, "connect", cannot)
    if several_hosts:
        assert groups._share((0, 1), "tp", "on") == "nccl: rank 1: no way there"
    else:
        with pytest.raises(CommunicationError, match=r"along 'tp' cannot write .* no way there\n.*\"auto\" takes NCCL"):
            groups._share((0, 1), "tp", "on")
    caplog.clear()
    with caplog.at_level(logging.INFO):
        assert groups._share((0, 1), "tp", "auto") == "nccl: rank 1: no way there"
    (told,) = caplog.records
    assert told.levelno == (logging.INFO if several_hosts else logging.WARNING)
    assert "talk over NCCL, not through their memory: rank 1: no way there" in told.message
    assert groups._share((0, 1), "tp", "off") == "nccl"
    assert not groups.peers
