import math

import pytest
import torch

from runtime.sampling import counter_random
from runtime.sampling.counter_random import gumbel, mix, random_bits

MASK = 2**64 - 1
SMALLEST_P = 1e-4


def chi_square_p(observed: torch.Tensor, expected: torch.Tensor) -> float:
    """How likely counts at least this far from `expected` are."""
    statistic = ((observed - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2, dtype=torch.float64), statistic / 2))


def uniform_p(values: torch.Tensor, bins: int) -> float:
    counts = torch.bincount(values.flatten(), minlength=bins).double()
    return chi_square_p(counts, torch.full((bins,), values.numel() / bins, dtype=torch.float64))


def along(counter: str, num: int = 2**16) -> torch.Tensor:
    """`num` consecutive values of one counter, the others held; the seed is hashed one by one."""
    zero, run = torch.tensor(3), torch.arange(num)
    if counter == "seed":
        return torch.stack([random_bits(seed, zero, zero, zero) for seed in range(2**12)])
    return random_bits(7, *(run if counter == name else zero for name in ("request", "step", "token")))


COUNTERS = ["seed", "request", "step", "token"]


def test_one_counter_is_splitmix64() -> None:
    """The published sequence of the generator for this seed."""
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [word & MASK for word in random_bits(1234567, torch.arange(4)).tolist()] == expected


def test_bits_are_integer_arithmetic_modulo_2_to_the_64() -> None:
    def reference(seed: int, *counters: int) -> int:
        state = seed
        for counter in counters:
            state = (state + (counter + 1) * 0x9E3779B97F4A7C15) & MASK
            for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
                state = ((state ^ (state >> shift)) * factor) & MASK
        return state

    corners = [0, 1, 2**31, 2**63 - 1, -1, -(2**63)]
    for seed in (0, 1, MASK, 2**63):
        for a in corners:
            got = random_bits(seed, torch.tensor(a), torch.tensor(corners))
            assert [word & MASK for word in got.tolist()] == [reference(seed, a, b) for b in corners]


@pytest.mark.parametrize("counter", COUNTERS)
def test_uniform_along_each_counter(counter: str) -> None:
    bits = along(counter)
    for shift in (56, 32, 11, 0):
        assert uniform_p((bits >> shift) & 255, 256) > SMALLEST_P, shift


@pytest.mark.parametrize("counter", COUNTERS)
@pytest.mark.parametrize("distance", [1, 2, 256])
def test_neighbours_are_independent(counter: str, distance: int) -> None:
    high = (along(counter) >> 60) & 15
    assert uniform_p(high[:-distance:2] * 16 + high[distance::2], 256) > SMALLEST_P


def test_a_grid_of_requests_and_steps_is_independent() -> None:
    """Sums of counters must not matter: (request 1, step 2) is not (request 2, step 1)."""
    run = torch.arange(512)
    bits = random_bits(0, run[:, None], run[None, :], torch.tensor(0))
    assert len(bits.unique()) == bits.numel()
    high = (bits >> 60) & 15
    upper = torch.triu_indices(512, 512, 1)
    assert uniform_p(high[upper[0], upper[1]] * 16 + high[upper[1], upper[0]], 256) > SMALLEST_P


@pytest.mark.parametrize("which", range(3))
def test_every_input_bit_moves_half_of_the_output(which: int) -> None:
    bases = torch.randint(0, 2**62, (3, 500), generator=torch.Generator().manual_seed(0))
    for bit in range(63):
        moved = bases.clone()
        moved[which] ^= 1 << bit
        changed = random_bits(5, *bases) ^ random_bits(5, *moved)
        flips = torch.stack([(changed >> i) & 1 for i in range(64)]).double().mean(dim=1)
        # 5.5 standard deviations of a mean of 500 coins, for 64 x 63 of them
        assert (flips - 0.5).abs().max() < 5.5 * 0.5 / math.sqrt(500), bit


def test_the_tests_notice_a_bad_mixer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counter_random, "mix", lambda x: x)
    high = (along("token") >> 60) & 15
    assert uniform_p(high[:-1:2] * 16 + high[1::2], 256) < 1e-9


def test_mix_is_a_bijection_on_a_sample() -> None:
    x = torch.arange(-(2**15), 2**15)
    assert len(mix(x).unique()) == len(x)


@pytest.mark.parametrize("word", [0, -1, 2**63 - 1, -(2**63)])
def test_noise_is_finite_for_every_word(monkeypatch: pytest.MonkeyPatch, word: int) -> None:
    monkeypatch.setattr(counter_random, "mix", lambda _: torch.tensor([word]))
    zero = torch.zeros(1, dtype=torch.int64)
    assert gumbel(zero, zero).isfinite().all()


def test_noise_comes_from_the_bits_of_all_counters() -> None:
    rows, run = torch.arange(3)[:, None], torch.arange(50)
    middles = (((random_bits(1, rows, run) >> 11) & (2**53 - 1)) | 1).double() / 2**53
    assert torch.equal(gumbel(random_bits(1, rows), run), -torch.log(-torch.log(middles)))


def test_noise_has_gumbels_distribution() -> None:
    run = torch.arange(2**17)
    noise = gumbel(random_bits(11, torch.tensor(0)), run)
    assert noise.dtype == torch.float64
    assert abs(float(noise.mean()) - 0.5772156649) < 0.015
    assert abs(float(noise.var()) - math.pi**2 / 6) < 0.05
    uniform = torch.exp(-torch.exp(-noise))  # its distribution function
    assert uniform_p((uniform * 1000).long(), 1000) > SMALLEST_P


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_same_bits() -> None:
    counters = torch.randint(-(2**62), 2**62, (3, 10_000))
    assert torch.equal(random_bits(9, *counters), random_bits(9, *counters.cuda()).cpu())
    on_cpu, on_cuda = gumbel(counters[0], counters[1]), gumbel(*counters[:2].cuda()).cpu()
    torch.testing.assert_close(on_cpu, on_cuda, rtol=1e-14, atol=1e-14)


def test_a_seed_for_each_row_is_that_row_alone() -> None:
    ids, steps, seeds = torch.tensor([4, 4, 9]), torch.tensor([0, 1, 2**40]), [3, 2**64 - 1, 3]
    together = random_bits(seeds, ids, steps)
    for row, seed in enumerate(seeds):
        assert together[row] == random_bits(seed, ids[row], steps[row])
