import pytest
import torch

from partitioner.errors import InputError
from runtime.processes.choose_device import choose_device


def gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize(
    ("wanted", "count", "num_ranks", "device"),
    [
        ("auto", 0, 1, "cpu"),
        ("auto", 1, 1, "cuda"),
        ("auto", 1, 2, "cpu"),
        ("auto", 2, 2, "cuda"),
        ("cpu", 2, 1, "cpu"),
        ("cuda", 4, 2, "cuda"),
        ("cuda:1", 2, 2, "cuda:1"),
        (torch.device("meta"), 0, 1, "meta"),
    ],
)
def test_device(monkeypatch: pytest.MonkeyPatch, wanted: str, count: int, num_ranks: int, device: str) -> None:
    gpus(monkeypatch, count)
    assert choose_device(wanted, num_ranks=num_ranks) == torch.device(device)


@pytest.mark.parametrize(("count", "has"), [(0, "no GPU that torch can use"), (1, "1 of them")])
def test_fewer_gpus_than_ranks_are_told(monkeypatch: pytest.MonkeyPatch, count: int, has: str) -> None:
    gpus(monkeypatch, count)
    with pytest.raises(InputError, match=f"a GPU for each of 2 ranks; this machine has {has}"):
        choose_device("cuda", num_ranks=2)


def test_what_is_no_device_is_told() -> None:
    with pytest.raises(InputError, match="must be auto, cpu or cuda"):
        choose_device("gpu", num_ranks=1)


@pytest.mark.parametrize(
    ("wanted", "count", "said"),
    [
        ("cuda:9", 0, "this machine has no GPU that torch can use"),
        ("cuda:2", 2, "this machine has GPUs 0 to 1"),
        ("meta", 0, "which this torch cannot use: it holds no numbers"),
        ("xla", 0, "which this torch cannot use: "),
    ],
)
def test_a_device_that_is_not_here_is_told(monkeypatch: pytest.MonkeyPatch, wanted: str, count: int, said: str) -> None:
    """It was told after the model had been compiled, as a fault of the program that was to run there."""
    gpus(monkeypatch, count)
    with pytest.raises(InputError, match=f'the device is "{wanted}", .*{said}.*: use "auto" or "cpu"|{said}'):
        choose_device(wanted, num_ranks=1)
