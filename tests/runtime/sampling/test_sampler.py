import dataclasses
import itertools
import math
import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from partitioner.errors import LayoutError, SamplingError
from partitioner.sharding.index_set import IndexSet
from partitioner.sharding.mesh import Mesh
from runtime.communication.thread_communicator import ThreadGroup
from runtime.processes.launch import launch
from runtime.sampling import sampler as sampler_module
from runtime.sampling import vocabulary_search
from runtime.sampling.sampler import Sampler
from runtime.sampling.sampling_options import Sampling
from runtime.sampling.vocabulary_search import _largest_of_pieces
from tests.runtime.sampling.transformers_sampling import processed

Owned = Sequence[IndexSet] | None
SMALLEST_P = 1e-4


def each_rank(
    logits: Tensor | Sequence[Tensor],
    sampling: Sampling,
    num_ranks: int,
    owned: Owned,
    messages: list[tuple[int, ...]] | None = None,
    **arguments: Any,
) -> list[Any]:
    """What each rank's sampler returns, or raises; `messages` takes the shapes that rank 0 gathers."""
    whole = logits if isinstance(logits, list) else [logits] * num_ranks
    vocab_size = whole[0].shape[1]
    meeting = ThreadGroup(Mesh.of(tp=num_ranks), timeout_s=20)
    results: list[Any] = [None] * num_ranks

    def body(rank: int) -> None:
        try:
            held = owned[rank].indices() if owned is not None else list(range(vocab_size))
            sampler = Sampler(sampling, meeting.communicator(rank), vocab_size=vocab_size, owned=owned)
            if rank == 0 and messages is not None:
                gather = sampler.search.gather
                sampler.search.gather = lambda x: (messages.append(tuple(x.shape)), gather(x))[1]
            results[rank] = sampler(whole[rank][:, held], **{"scored": True, **arguments})
        except Exception as error:
            results[rank] = error
            if not isinstance(error, SamplingError):
                meeting.abort(rank, error)
        finally:
            meeting.end(rank)

    threads = [threading.Thread(target=body, args=(rank,)) for rank in range(num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return results


def draw(
    logits: Tensor | list[Tensor], sampling: Sampling, num_ranks: int = 1, owned: Owned = None, **arguments: Any
) -> tuple[Tensor, Tensor]:
    """The tokens and log-probabilities, after a check that all ranks have the same."""
    batch = len(logits[0]) if isinstance(logits, list) else len(logits)
    arguments = {"request_ids": torch.arange(batch), "step": 0, **arguments}
    results = each_rank(logits, sampling, num_ranks, owned, **arguments)
    for result in results:
        if isinstance(result, Exception):
            raise result
        assert torch.equal(result[0], results[0][0])
        assert torch.equal(result[1], results[0][1])
    return results[0]


def even(vocab_size: int, num_ranks: int) -> list[IndexSet]:
    ends = [vocab_size * rank // num_ranks for rank in range(num_ranks + 1)]
    return [IndexSet.range(*pair) for pair in itertools.pairwise(ends)]


def plans(vocab_size: int) -> list[tuple[int, Owned]]:
    size = vocab_size
    halves = even(size, 2)
    return [
        (1, None),
        (2, even(size, 2)),
        (3, even(size, 3)),
        (4, even(size, 4)),
        (3, None),
        (2, [IndexSet.of(range(0, size, 2)), IndexSet.of(range(1, size, 2))]),
        (2, [IndexSet.range(0, size), IndexSet.range(0, 0)]),
        (3, [IndexSet.range(0, 1), IndexSet.range(0, size - 1), IndexSet.range(size // 3, size)]),
        (4, [halves[1], halves[1], halves[0], halves[0]]),
    ]


@st.composite
def splits(draw: st.DrawFn, vocab_size: int) -> list[IndexSet]:
    """Any way in which 1 to 4 ranks hold the vocabulary: interleaved, several copies, empty ranks."""
    ranks = draw(st.integers(1, 4))
    holders = st.lists(st.sets(st.integers(0, ranks - 1), min_size=1), min_size=vocab_size, max_size=vocab_size)
    found = draw(holders)
    return [IndexSet.of(i for i, held in enumerate(found) if rank in held) for rank in range(ranks)]


OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "unfiltered": {"top_k": 0},
    "temperature": {"top_k": 0, "temperature": 0.6},
    "hot": {"top_k": 0, "temperature": 3.0},
    "top_k": {"top_k": 4},
    "top_p": {"top_k": 0, "top_p": 0.8},
    "min_p": {"top_k": 0, "min_p": 0.15},
    "penalty": {"top_k": 0, "repetition_penalty": 1.8},
    "reward": {"top_k": 5, "repetition_penalty": 0.5},
    "top_k_top_p": {"top_k": 6, "top_p": 0.7},
    "all": {"temperature": 1.4, "top_k": 8, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.3},
}


def options(name: str, **changes: Any) -> Sampling:
    return Sampling(**{"do_sample": True, **OPTIONS[name], **changes})


@settings(max_examples=150)
@given(st.data())
def test_greedy_is_argmax_on_every_split(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 20))
    value = st.sampled_from([-math.inf, -2.0, -0.5, 0.0, 0.25, 0.5, 3.0])
    rows = data.draw(st.lists(st.lists(value, min_size=size, max_size=size), min_size=1, max_size=3))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    logits = torch.tensor(rows, dtype=dtype)
    assume(logits.isfinite().any(dim=1).all())
    owned = data.draw(splits(size))
    tokens, log_probabilities = draw(logits, Sampling(), len(owned), owned)
    assert torch.equal(tokens, logits.argmax(dim=1))
    expected = logits.double().log_softmax(dim=1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(log_probabilities, expected)


@pytest.mark.parametrize("width", [1, 255, 256, 257, 5000])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_largest_is_found_in_pieces(width: int, dtype: torch.dtype) -> None:
    """Ties, which bfloat16 has many of, go to the first; so do rows of -inf, and NaN wins as it does in one look."""
    logits = torch.randn(5, width, generator=torch.Generator().manual_seed(width)).to(dtype)
    logits[1] = -torch.inf
    logits[2, width // 2] = torch.nan
    logits[3, -1] = torch.inf
    for found, expected in zip(_largest_of_pieces(logits), logits.max(dim=1), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@settings(max_examples=100)
@given(st.data())
def test_the_split_never_changes_a_token(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 20))
    logits = torch.randn(3, size, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 1000))))
    sampling = options(data.draw(st.sampled_from(sorted(OPTIONS))), seed=data.draw(st.integers(0, 3)))
    owned = data.draw(splits(size))
    history = torch.arange(6).view(3, 2) * 3 % (size + 1)
    arguments = {"step": data.draw(st.integers(0, 5)), "history": history, "lengths": torch.tensor([0, 1, 2])}
    alone, expected = draw(logits, sampling, **arguments)
    tokens, log_probabilities = draw(logits, sampling, len(owned), owned, **arguments)
    assert torch.equal(tokens, alone)
    torch.testing.assert_close(log_probabilities, expected)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_tokens_on_every_plan_and_in_any_batch(name: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(16, 300, generator=generator).mul(2).to(dtype)
    history = torch.randint(0, 300, (16, 9), generator=generator)
    arguments = {
        "request_ids": torch.arange(16) * 1_000_003,
        "step": torch.arange(16) % 5,
        "history": history,
        "lengths": torch.arange(16) % 10,
    }
    expected, _ = draw(logits, options(name, seed=3), **arguments)
    for num_ranks, owned in plans(300):
        assert torch.equal(draw(logits, options(name, seed=3), num_ranks, owned, **arguments)[0], expected), owned
    order = torch.randperm(16, generator=generator)
    shuffled = {key: value[order] for key, value in arguments.items()}
    assert torch.equal(draw(logits[order], options(name, seed=3), 2, even(300, 2), **shuffled)[0], expected[order])
    one = {key: value[5:6] for key, value in arguments.items()}
    assert torch.equal(draw(logits[5:6], options(name, seed=3), 4, even(300, 4), **one)[0], expected[5:6])


@pytest.mark.parametrize("change", ["seed", "step", "request_ids"])
def test_other_keys_give_other_tokens(change: str) -> None:
    logits = torch.zeros(200, 50)
    base: dict[str, Any] = {"request_ids": torch.arange(200), "step": 0}
    first = draw(logits, options("unfiltered"), **base)[0]
    seed = 1 if change == "seed" else 0
    other = {**base, "step": 1} if change == "step" else base
    other = {**base, "request_ids": torch.arange(200) + 1000} if change == "request_ids" else other
    second = draw(logits, options("unfiltered", seed=seed), **other)[0]
    assert (first == second).sum() < 20  # 4 are expected of 200 with 50 tokens each


def chi_square_p(
    sampling: Sampling, num_ranks: int, owned: Owned, *, keys: str = "request", against: Sampling | None = None
) -> float:
    """How likely draws this far from the distribution of transformers' processors are; 0 for an impossible token."""
    logits = torch.tensor([[1.5, -0.3, 0.9, 2.2, -1.0, 0.1, 0.9, 1.1, -2.5, 0.6, 0.4, 1.9]])
    history = torch.tensor([[3, 0, 3, 8, 5]])
    probabilities = processed(logits, against or sampling, history)[0].double().softmax(dim=0)
    num = 20_000
    run = torch.arange(num)
    tokens, _ = draw(
        logits.expand(num, -1),
        sampling,
        num_ranks,
        owned,
        request_ids=run if keys == "request" else torch.full_like(run, 7),
        step=run if keys == "step" else 4,
        history=history.expand(num, -1),
        lengths=torch.full_like(run, 5),
    )
    counts = torch.bincount(tokens, minlength=12).double()
    possible = probabilities > 0
    if counts[~possible].any():
        return 0.0
    expected = probabilities[possible] * num
    statistic = ((counts[possible] - expected) ** 2 / expected).sum()
    freedom = torch.tensor((len(expected) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2)) if len(expected) > 1 else 1.0


SAMPLED = [name for name in OPTIONS if name != "greedy"]


@pytest.mark.parametrize("name", SAMPLED)
@pytest.mark.parametrize("keys", ["request", "step"])
def test_draws_follow_transformers_distribution(name: str, keys: str) -> None:
    owned = [IndexSet.of([0, 3, 4, 9]), IndexSet.of([1, 2, 5, 6, 7, 8, 10, 11])]
    assert chi_square_p(options(name), 2, owned, keys=keys) > SMALLEST_P


@pytest.mark.parametrize("name", SAMPLED)
@pytest.mark.parametrize("fault", ["uniform noise", "one noise for all tokens", "one noise for all rows"])
def test_the_chi_square_notices_wrong_noise(monkeypatch: pytest.MonkeyPatch, name: str, fault: str) -> None:
    right = vocabulary_search.gumbel

    def wrong(bits: Tensor, tokens: Tensor) -> Tensor:
        if fault == "uniform noise":
            return torch.exp(-torch.exp(-right(bits, tokens)))
        if fault == "one noise for all tokens":
            return right(bits, torch.zeros_like(tokens))
        return right(torch.zeros_like(bits), tokens)

    for module in (sampler_module, vocabulary_search):
        monkeypatch.setattr(module, "gumbel", wrong)
    assert chi_square_p(options(name), 1, None) < 1e-9


@pytest.mark.parametrize("name", [name for name in SAMPLED if name != "unfiltered"])
def test_the_chi_square_notices_an_option_that_is_not_carried_out(name: str) -> None:
    assert chi_square_p(options("unfiltered"), 1, None, against=options(name)) < 1e-9


@pytest.mark.parametrize("name", OPTIONS)
def test_log_probabilities_are_those_of_the_processed_distribution(name: str) -> None:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(40, 90, generator=generator) * 2
    history = torch.randint(0, 90, (40, 6), generator=generator)
    arguments = {"history": history, "lengths": torch.full((40,), 6)}
    tokens, log_probabilities = draw(logits, options(name), 3, even(90, 3), **arguments)
    scores = processed(logits, options(name), history)
    expected = scores.log_softmax(dim=1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(log_probabilities, expected.double(), rtol=1e-4, atol=1e-5)
    sampler = Sampler(options(name), ThreadGroup(Mesh.of()).communicator(0), vocab_size=90)
    assert torch.equal(sampler(logits, request_ids=torch.arange(40), step=0, **arguments)[0], tokens)


def test_penalty_counts_what_lengths_say_and_passes_over_other_ids() -> None:
    logits = torch.tensor([[2.0, 1.9, 1.8, -1.0]] * 4)
    history = torch.tensor([[0, 1, 3], [0, 1, 3], [0, 0, 1], [99, -1, 0]])
    arguments = {"history": history, "lengths": torch.tensor([0, 1, 3, 3])}
    for num_ranks, owned in plans(4):
        tokens, _ = draw(logits, Sampling(repetition_penalty=1.5), num_ranks, owned, **arguments)
        assert tokens.tolist() == [0, 1, 2, 1]


@pytest.mark.parametrize("owned", [None, even(200, 3)])
def test_all_ties_with_the_kth_survive_however_many(owned: Owned) -> None:
    logits = torch.full((4000, 200), -1.0)
    logits[:, 150:] = 2.0
    messages: list[tuple[int, ...]] = []
    arguments = {"request_ids": torch.arange(4000), "step": 0}
    results = each_rank(logits, options("top_k"), 3 if owned else 1, owned, messages, **arguments)
    tokens, log_probabilities = results[0]
    assert set(tokens.tolist()) == set(range(150, 200))
    torch.testing.assert_close(log_probabilities, torch.full((4000,), -math.log(50), dtype=torch.float64))
    assert len(messages) == 2


def test_a_nucleus_larger_than_the_first_look_is_found() -> None:
    logits = torch.randn(8, 3000, generator=torch.Generator().manual_seed(4)) / 4
    expected, log_probabilities = draw(logits, options("top_p"))
    torch.testing.assert_close(
        log_probabilities,
        processed(logits.double(), options("top_p")).log_softmax(dim=1).gather(1, expected[:, None])[:, 0],
    )
    for num_ranks, owned in plans(3000):
        assert torch.equal(draw(logits, options("top_p"), num_ranks, owned)[0], expected)


@pytest.mark.parametrize(
    ("name", "shapes", "scored"),
    [
        ("greedy", [(1, 2, 2)], [(1, 2, 3)]),
        ("top_k", [(1, 2, 20, 2)], None),
        ("all", [(1, 2, 24, 2)], None),
        ("top_p", [(1, 2, 129, 2)], None),
        ("min_p", [(1, 2, 128, 2)], None),
        ("unfiltered", [(1, 2), (1, 2, 2)], [(1, 2), (1, 2, 4)]),
    ],
)
def test_how_much_is_gathered(name: str, shapes: list[tuple[int, ...]], scored: list[tuple[int, ...]] | None) -> None:
    """The full logits would be 32,000 wide."""
    logits = torch.randn(2, 32_000, generator=torch.Generator().manual_seed(5)) * 4
    arguments = {
        "request_ids": torch.arange(2),
        "step": 0,
        "history": torch.zeros(2, 1, dtype=torch.int64),
        "lengths": torch.tensor([1, 1]),
    }
    for with_scores, expected in ((False, shapes), (True, scored or shapes)):
        messages: list[tuple[int, ...]] = []
        each_rank(logits, options(name), 2, even(32_000, 2), messages, scored=with_scores, **arguments)
        assert messages == expected


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (math.nan, "its largest logit is nan"),
        (math.inf, "its largest logit is inf"),
        (-math.inf, "every logit is -inf"),
    ],
)
def test_logits_without_a_finite_maximum_are_refused_on_every_rank(name: str, fault: float, message: str) -> None:
    logits = torch.randn(3, 12, generator=torch.Generator().manual_seed(6))
    logits[1, 7 if fault != -math.inf else slice(None)] = fault
    arguments = {"history": torch.zeros(3, 1, dtype=torch.int64), "lengths": torch.zeros(3, dtype=torch.int64)}
    for num_ranks, owned in plans(12):
        results = each_rank(logits, options(name), num_ranks, owned, request_ids=torch.arange(3), step=0, **arguments)
        for result in results:
            assert isinstance(result, SamplingError), (owned, result)
            assert f"for row 1: {message}" in str(result)


def test_copies_that_differ_still_give_one_token_everywhere() -> None:
    """Ranks that hold the same rows may have computed them in another order of sums."""
    generator = torch.Generator().manual_seed(7)
    copies = [torch.randn(50, 40, generator=generator) for _ in range(3)]
    for name in OPTIONS:
        draw(copies, options(name), 3, history=torch.zeros(50, 1, dtype=torch.int64), lengths=torch.ones(50))


def test_extreme_options() -> None:
    logits = torch.randn(30, 25, generator=torch.Generator().manual_seed(8))
    greedy = logits.argmax(dim=1)
    for changes in (
        {"top_p": 1e-12},
        {"top_p": 0.0},
        {"top_k": 1},
        {"min_p": 1.0},
        {"temperature": 1e-300},
        {"temperature": 1e-300, "top_k": 0},
        {"temperature": 1e-300, "top_k": 0, "top_p": 0.9},
    ):
        sampling = dataclasses.replace(Sampling(do_sample=True), **changes)
        for num_ranks, owned in plans(25):
            assert torch.equal(draw(logits, sampling, num_ranks, owned)[0], greedy), changes
    # k beyond the vocabulary is no filter, nor is a ratio of 0
    unfiltered = draw(logits, options("unfiltered"))[0]
    for changes in ({"top_k": 1000}, {"top_k": 0, "min_p": 0.0}):
        assert torch.equal(draw(logits, dataclasses.replace(Sampling(do_sample=True), **changes))[0], unfiltered)
    # equal logits stay equal at any temperature
    tied = torch.zeros(1000, 2)
    for top_k in (0, 50):
        tokens, _ = draw(tied, Sampling(do_sample=True, temperature=1e-300, top_k=top_k))
        assert 400 < tokens.sum() < 600


@pytest.mark.parametrize("name", OPTIONS)
def test_a_vocabulary_of_one_and_a_batch_of_none(name: str) -> None:
    arguments = {"history": torch.zeros(2, 1, dtype=torch.int64), "lengths": torch.ones(2)}
    for num_ranks, owned in [(1, None), (2, None), (2, [IndexSet.range(0, 0), IndexSet.range(0, 1)])]:
        assert draw(torch.ones(2, 1), options(name), num_ranks, owned, **arguments)[0].tolist() == [0, 0]
        empty = {"history": torch.zeros(0, 1, dtype=torch.int64), "lengths": torch.ones(0)}
        assert draw(torch.ones(0, 1), options(name), num_ranks, owned, **empty)[0].tolist() == []


def test_noise_in_chunks_of_rows_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(7, 30, generator=torch.Generator().manual_seed(9))
    whole = draw(logits, options("unfiltered"), 2, even(30, 2))
    monkeypatch.setattr(vocabulary_search, "_RACE_BYTES", 8 * 15 * 2)
    for one, other in zip(draw(logits, options("unfiltered"), 2, even(30, 2)), whole, strict=True):
        assert torch.equal(one, other)


def test_wrong_arguments_are_named() -> None:
    communicator = ThreadGroup(Mesh.of()).communicator(0)
    sampler = Sampler(Sampling(repetition_penalty=1.2), communicator, vocab_size=4)
    ids, logits = torch.arange(2), torch.zeros(2, 4)
    with pytest.raises(SamplingError, match=r"logits must be \[batch, 4\] on this rank, got \[2, 5\]"):
        sampler(torch.zeros(2, 5), request_ids=ids, step=0)
    with pytest.raises(SamplingError, match=r"request_ids must be int64 \[2\], got torch.int64 \[3\]"):
        sampler(logits, request_ids=torch.arange(3), step=0)
    with pytest.raises(SamplingError, match=r"step must be int64 \[2\], got torch.float32 \[2\]"):
        sampler(logits, request_ids=ids, step=torch.zeros(2))
    with pytest.raises(SamplingError, match=r"repetition_penalty=1.2 needs history and lengths"):
        sampler(logits, request_ids=ids, step=0)
    with pytest.raises(SamplingError, match=r"history must be \[2, length\] and lengths \[2\], got \[3, 1\]"):
        sampler(logits, request_ids=ids, step=0, history=torch.zeros(3, 1, dtype=torch.int64), lengths=ids)
    with pytest.raises(SamplingError, match="owned must say what each of 1 ranks along 'tp' holds, got 2"):
        Sampler(Sampling(), communicator, vocab_size=4, owned=even(4, 2))
    with pytest.raises(LayoutError, match="nobody holds 3:4"):
        Sampler(Sampling(), communicator, vocab_size=4, owned=[IndexSet.range(0, 3)])


@pytest.mark.slow
@pytest.mark.processes
def test_processes_over_gloo(monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config) -> None:
    monkeypatch.setenv("PYTHONPATH", str(pytestconfig.rootpath))
    launch(["tests.runtime.sampling.sampler_processes"], num_ranks=3, timeout_s=60)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", OPTIONS)
def test_cuda_draws_what_the_cpu_draws(name: str) -> None:
    generator = torch.Generator().manual_seed(10)
    logits = torch.randn(64, 5000, generator=generator) * 2
    history = torch.randint(0, 5000, (64, 9), generator=generator)
    arguments = {"request_ids": torch.arange(64), "history": history, "lengths": torch.full((64,), 9)}
    samplers = {
        device: Sampler(options(name), ThreadGroup(Mesh.of()).communicator(0), vocab_size=5000, device=device)
        for device in ("cpu", "cuda")
    }
    for step in range(5):
        on = {
            device: sampler(logits.to(device), step=step, **{k: v.to(device) for k, v in arguments.items()})[0]
            for device, sampler in samplers.items()
        }
        assert torch.equal(on["cuda"].cpu(), on["cpu"])
