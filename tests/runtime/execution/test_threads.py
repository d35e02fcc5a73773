"""How many threads a rank on a CPU computes with."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from runtime.execution.threads import SMALL_PRODUCT, product_of, use_threads_for


def program_of(*shapes: tuple[int, ...]) -> Any:
    return SimpleNamespace(weights=[SimpleNamespace(local_shape=shape) for shape in shapes])


SMALL = program_of((192, 192), (192,), (350, 192))
LARGE = program_of((4096, 4096), (4096,), (8, 1024, 4096))


@pytest.fixture(autouse=True)
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_what_a_product_takes() -> None:
    assert product_of(SMALL, 3) == 2 * 3 * (192 * 192 + 350 * 192) / 2
    # of experts in one weight, each has a product of its own
    assert product_of(LARGE, 1) == 4096 * 4096 + 1024 * 4096
    assert product_of(program_of((7,)), 5) == 0


def test_small_products_have_one_thread() -> None:
    assert product_of(SMALL, 32) < SMALL_PRODUCT < product_of(LARGE, 32)
    assert use_threads_for(LARGE, 32, torch.device("cpu")) == 2
    assert use_threads_for(SMALL, 32, torch.device("cuda")) == 2
    assert use_threads_for(SMALL, 32, torch.device("cpu")) == 1


def test_many_rows_make_large_products() -> None:
    assert use_threads_for(SMALL, 4096, torch.device("cpu")) == 2


def test_what_the_user_says_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert use_threads_for(SMALL, 32, torch.device("cpu")) == 2
