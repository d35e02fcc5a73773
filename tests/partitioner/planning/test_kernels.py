"""Grids of shares, and the roofline that they divide."""

import pytest

from partitioner.planning.kernels import UNMEASURED, Grid, Kernels, kernels_of


def test_grids_are_linear_between_points_and_constant_beyond() -> None:
    grid = Grid(((0.0, 2.0), (0.0, 1.0)), [[0.2, 0.4], [0.6, 0.8]])
    assert grid.at(1, 1) == pytest.approx(0.2)
    assert grid.at(4, 2) == pytest.approx(0.8)
    assert grid.at(2, 1) == pytest.approx(0.4)
    assert grid.at(1e9, 1e9) == pytest.approx(0.8)
    assert grid.at(0, 0) == pytest.approx(0.2)


def test_what_was_not_measured_is_speed_of_light_and_says_so() -> None:
    bare = Kernels("bare", 1e12, {"bfloat16": 1e15}, {})
    assert not bare.measured("linear", "bfloat16")
    seconds = bare.linear(4096, 4096, 4096, 0, "bfloat16")
    assert seconds == pytest.approx(2 * 4096**3 / 1e15 / UNMEASURED["linear"])
    assert bare.other(1e12) == pytest.approx(1 / UNMEASURED["other"])
    assert bare.linear(0, 4096, 4096, 0, "bfloat16") == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_measured_kernels_reach_less_than_the_roofline_and_small_ones_least(dtype: str) -> None:
    found = kernels_of("H100", 3350e9, {"bfloat16": 989e12, "float8_e4m3fn": 1978e12}, fitted="h100_sxm")
    assert found.measured("linear", dtype)
    size = 4096 * 4096
    one, many = (found.linear(m, 4096, 4096, size, dtype) for m in (1, 8192))
    assert one > found.roofline(2 * size, size, dtype)
    assert many > found.roofline(2 * 8192 * size, size, dtype)
    tiny = found.linear(8, 256, 256, 2 * 256 * 256, dtype)
    assert tiny > 10 * found.roofline(2 * 8 * 256 * 256, 2 * 256 * 256, dtype)
