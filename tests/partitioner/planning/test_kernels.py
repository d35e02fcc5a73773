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


def test_attention_over_latents_has_tables_of_its_own_where_they_were_measured() -> None:
    given = {"rows": 4, "heads": 16, "kv_heads": 1, "keys": 1024, "flops": 1e6, "num_bytes": 5e6, "dtype": "bfloat16"}
    rates = {"bfloat16": 989e12}
    found, bare = (kernels_of("H100", 3350e9, rates, fitted=name) for name in ("h100_sxm", ""))
    assert found.measured("latent", "bfloat16")
    plain, latent = (found.attention(queries=1, latent=kind, **given) for kind in (False, True))
    assert 10e-6 < latent < plain  # 26 us by the tables of the kernel and of its two products
    prompts = [found.attention(queries=8, latent=kind, **given) for kind in (False, True)]
    unknown = [bare.attention(queries=1, latent=kind, **given) for kind in (False, True)]
    assert prompts[0] == prompts[1]
    assert unknown[0] == unknown[1]


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
