import importlib.util
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.ops.kernels import triton_needs
from runtime.ops.kernels.triton_needs import launch, missing_for_triton


@pytest.mark.parametrize(
    ("package", "compiler", "header", "missing"),
    [
        (True, "gcc", True, ""),
        (True, "of-its-own", True, ""),
        (False, "gcc", True, "no triton"),
        (True, "", True, "no C compiler, which triton needs"),
        (True, "gcc", False, "no headers of Python, which triton needs"),
    ],
)
def test_what_is_missing_is_named(
    package: bool, compiler: str, header: bool, missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find_spec(name: str) -> Any:
        return object() if package else None

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    monkeypatch.setattr(triton_needs.shutil, "which", lambda name: name if name == compiler else None)
    monkeypatch.setenv("CC", "of-its-own")
    monkeypatch.setattr(sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
    if header:
        (tmp_path / "Python.h").touch()
    missing_for_triton.cache_clear()
    assert missing_for_triton() == missing
    missing_for_triton.cache_clear()


class Compiled:
    """As Triton's: launched with a grid, a stream, what it is, no hooks, and then all arguments and constants."""

    function, packed_metadata = 17, (4, 1, 0)

    def __init__(self, kernel: "Kernel") -> None:
        self.kernel = kernel

    def run(self, *given: Any) -> None:
        if self.kernel.is_strange:
            raise TypeError("function takes exactly 9 arguments")
        assert given[3:9] == (STREAM, 17, (4, 1, 0), None, None, None)
        self.kernel.calls.append(("compiled", given[:3], given[9:]))


class Kernel:
    arg_names = ("x", "size", "MODE", "BLOCK")

    def __init__(self, *, is_strange: bool = False, compiles: bool = True) -> None:
        self.calls: list[Any] = []
        self.is_strange, self.compiles = is_strange, compiles

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        def run(x: Any, size: int, **constants: Any) -> Any:
            self.calls.append(("looked up", grid, (x, size, *constants.items())))
            return Compiled(self) if self.compiles else None

        return run


GRID, STREAM = (3, 1, 1), 5


@pytest.fixture(autouse=True)
def stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: STREAM, raising=False)


def how(kernel: Kernel, x: torch.Tensor, size: int, **constants: Any) -> str:
    launch(kernel, GRID, (x, size), **{"BLOCK": 8, "MODE": "a", **constants})
    found: str = kernel.calls[-1][0]
    return found


def test_what_is_compiled_is_looked_up_once() -> None:
    kernel, x = Kernel(), torch.zeros(64)
    assert how(kernel, x, 5) == "looked up"
    other = torch.ones(64)
    assert how(kernel, other, 7) == "compiled"
    _, grid, given = kernel.calls[-1]
    assert grid == GRID
    assert given == (other.data_ptr(), 7, "a", 8)  # in the order of the parameters


@pytest.mark.parametrize(
    ("x", "size", "constants"),
    [
        (torch.zeros(64).bfloat16(), 5, {}),
        (torch.zeros(64)[1:], 5, {}),  # not at a multiple of 16 bytes
        (torch.zeros(64), 1, {}),
        (torch.zeros(64), 32, {}),
        (torch.zeros(64), (1 << 31) + 5, {}),
        (torch.zeros(64), 5, {"MODE": "b"}),
        (torch.zeros(64), 5, {"num_warps": 8}),
        (torch.zeros(64), 5, {"num_stages": 1}),
    ],
)
def test_what_another_kernel_is_compiled_for_is_looked_up_anew(
    x: torch.Tensor, size: int, constants: dict[str, Any]
) -> None:
    kernel = Kernel()
    how(kernel, torch.zeros(64), 5)
    assert how(kernel, x, size, **constants) == "looked up"
    assert how(kernel, x, size, **constants) == "compiled"
    assert how(kernel, torch.zeros(64), 5) == "compiled"


def test_where_triton_is_another_all_goes_its_long_way() -> None:
    for kernel in (Kernel(is_strange=True), Kernel(compiles=False)):
        assert [how(kernel, torch.zeros(64), 5) for _ in range(3)] == ["looked up"] * 3
