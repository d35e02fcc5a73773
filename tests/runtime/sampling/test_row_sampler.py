"""Rows of one choice are told what the sampler tells each of them alone, whatever the others ask for."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from partitioner.sharding.index_set import IndexSet
from partitioner.sharding.mesh import Mesh
from runtime.communication.thread_communicator import ThreadGroup
from runtime.sampling.row_sampler import Kind, RowOptions, RowSampler
from runtime.sampling.sampler import Sampler
from runtime.sampling.sampling_options import Sampling
from runtime.sampling.token_edits import TokenEdits

VOCABULARY = 300
ROWS: list[dict[str, Any]] = [
    {"do_sample": False},
    {"top_k": 0},
    {"top_k": 0, "temperature": 0.3},
    {},
    {"top_k": 7, "temperature": 1.9},
    {"top_k": 1},
    {"top_k": 5000},
    {"top_k": 40, "top_p": 0.7},
    {"top_k": 0, "top_p": 0.6, "temperature": 0.8},
    {"top_k": 0, "top_p": 0.0},
    {"top_k": 0, "min_p": 0.05},
    {"top_k": 30, "top_p": 0.9, "min_p": 0.1},
    {"top_k": 0, "min_p": 0.0},
    {"top_k": 0, "typical_p": 0.4},
    {"top_k": 9, "epsilon_cutoff": 0.05},
    {"top_k": 0, "top_p": 0.8, "eta_cutoff": 0.1, "temperature": 0.6},
]
SAMPLINGS = [Sampling(seed=row % 3, **{"do_sample": True, **options}) for row, options in enumerate(ROWS)]
OWNED = {
    1: [IndexSet.range(0, VOCABULARY)],
    2: [IndexSet.range(0, 100), IndexSet.range(100, VOCABULARY)],
    3: [IndexSet.of([*range(40), *range(90, 140)]), IndexSet.range(40, 90), IndexSet.range(140, VOCABULARY)],
}


def logits(rows: int = len(ROWS)) -> Tensor:
    found = torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(1)) * 3
    return found.bfloat16().float()  # so that some tie


def on_ranks(num_ranks: int, body: Any) -> list[Any]:
    """What `body(rank, communicator, columns)` returns on each."""
    meeting = ThreadGroup(Mesh.of(tp=num_ranks), timeout_s=20)
    results: list[Any] = [None] * num_ranks

    def run(rank: int) -> None:
        try:
            results[rank] = body(rank, meeting.communicator(rank), OWNED[num_ranks][rank].indices())
        except Exception as error:
            results[rank] = error
            meeting.abort(rank, error)
        finally:
            meeting.end(rank)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


def search_of(communicator: Any, num_ranks: int) -> Sampler:
    return Sampler(Sampling(), communicator, vocab_size=VOCABULARY, owned=OWNED[num_ranks])


def asked(samplings: Sequence[Sampling] = SAMPLINGS, step: int = 5, **options: Any) -> list[RowOptions]:
    return [
        RowOptions(sampling, request_id=100 + row, step=step, scored=True, **options)
        for row, sampling in enumerate(samplings)
    ]


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_each_row_is_told_what_the_sampler_tells_it_alone(num_ranks: int) -> None:
    given = logits()

    def body(rank: int, communicator: Any, columns: list[int]) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        sampler, mine = search_of(communicator, num_ranks), given[:, columns]
        rows = RowSampler(sampler.search, len(ROWS), torch.device("cpu"))
        said = rows.choose(mine, rows.begin(asked()))
        alone = [
            sampler.with_options(sampling)(
                mine[row : row + 1], request_ids=torch.tensor([100 + row]), step=5, scored=True
            )
            for row, sampling in enumerate(SAMPLINGS)
        ]
        return said, alone

    results = on_ranks(num_ranks, body)
    for said, alone in results:
        assert torch.equal(said, results[0][0])
        assert said[2].bool().all()
        assert said[0].long().tolist() == [int(tokens) for tokens, _ in alone]
        assert torch.allclose(said[3], torch.cat([scores for _, scores in alone]), atol=1e-12, rtol=0)
        assert torch.equal(said[1], given.amax(dim=1).double())


def test_other_numbers_of_a_row_give_other_tokens() -> None:
    """The comparison above would notice them: seeds, ids, steps and temperatures all count."""
    sampler = search_of(ThreadGroup(Mesh.of()).communicator(0), 1)
    rows = RowSampler(sampler.search, 16, torch.device("cpu"))
    same = torch.zeros(16, VOCABULARY)

    def said(*options: RowOptions) -> set[int]:
        return set(rows.choose(same, rows.begin(options))[0].tolist())

    plain = Sampling(do_sample=True, top_k=0)
    assert len(said(*[RowOptions(plain)] * 16)) == 1
    assert len(said(*[RowOptions(plain, request_id=i) for i in range(16)])) > 10
    assert len(said(*[RowOptions(plain, step=i) for i in range(16)])) > 10
    assert len(said(*[RowOptions(Sampling(do_sample=True, top_k=0, seed=2**64 - 1 - i)) for i in range(16)])) > 10


def test_steps_follow_each_other() -> None:
    sampler = search_of(ThreadGroup(Mesh.of()).communicator(0), 1)
    rows, given = RowSampler(sampler.search, len(ROWS), torch.device("cpu")), logits()
    kind = rows.begin(asked())
    first = rows.choose(given, kind)
    ids, positions = (torch.zeros(len(ROWS), 1, dtype=torch.int64) for _ in range(2))
    rows.advance(first, kind, ids, positions)
    assert torch.equal(ids[:, 0], first[0].long())
    assert positions.eq(1).all()
    again = RowSampler(sampler.search, len(ROWS), torch.device("cpu"))
    assert torch.equal(rows.choose(given, kind), again.choose(given, again.begin(asked(step=6))))


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_penalties_and_biases_count_what_the_steps_have_chosen(num_ranks: int) -> None:
    given = logits(3)
    text, sampling = [3, 200, 3, 41], Sampling(do_sample=True, top_k=20, repetition_penalty=1.7)
    greedy = Sampling(repetition_penalty=0.6)
    bias = ((7, 4.5), (250, -2.0))
    banned = (11, int(given[1].argmax()), 299)

    def body(rank: int, communicator: Any, columns: list[int]) -> None:
        sampler, mine = search_of(communicator, num_ranks), given[:, columns]
        rows = RowSampler(sampler.search, 3, torch.device("cpu"))
        options: dict[str, Any] = {"text": text, "written": [41], "bias": bias, "banned": banned}
        options |= {"presence_penalty": 0.7, "frequency_penalty": 1.9}
        samplings = [sampling, greedy, Sampling()]
        kind = rows.begin([RowOptions(each, row, 4, **options) for row, each in enumerate(samplings)])
        texts = [[*text] for _ in samplings]
        for step in range(4, 9):
            said = rows.choose(mine, kind)
            for row, each in enumerate(samplings):
                new = texts[row][3:]
                raised = dict(bias)
                for token in set(new):
                    raised[token] = raised.get(token, 0.0) - (0.7 + 1.9 * new.count(token))
                edits = TokenEdits((), banned, (), tuple((0, token, amount) for token, amount in raised.items()))
                token, _ = sampler.with_options(each)(
                    mine[row : row + 1],
                    request_ids=torch.tensor([row]),
                    step=step,
                    history=torch.tensor([texts[row]]),
                    lengths=torch.tensor([len(texts[row])]),
                    edits=edits,
                )
                assert int(said[0, row]) == int(token), (step, row)
                texts[row].append(int(token))
            rows.advance(said, kind, *(torch.zeros(3, 1, dtype=torch.int64) for _ in range(2)))
        assert len({*texts[2][4:]}) > 1  # the penalties have changed something

    on_ranks(num_ranks, body)


def test_a_row_with_too_few_candidates_says_so() -> None:
    sampler = search_of(ThreadGroup(Mesh.of()).communicator(0), 1)
    rows = RowSampler(sampler.search, 3, torch.device("cpu"))
    flat = torch.zeros(3, VOCABULARY)
    few = [Sampling(do_sample=True, top_k=10), Sampling(do_sample=True, top_k=0), Sampling()]
    kind = rows.begin([RowOptions(each) for each in few])
    assert 0 < kind.candidates < VOCABULARY
    assert not rows.is_certain(kind)
    assert rows.choose(flat, kind)[2].tolist() == [0, 1, 1]  # all tie with the tenth
    rows = RowSampler(sampler.search, 3, torch.device("cpu"), whole=True)
    kind = rows.begin([RowOptions(each) for each in few])
    assert rows.is_certain(kind)
    assert rows.choose(flat, kind)[2].tolist() == [1, 1, 1]


def test_a_kind_serves_those_it_is_joined_of() -> None:
    sampler = search_of(ThreadGroup(Mesh.of()).communicator(0), 1)
    rows, given = RowSampler(sampler.search, len(ROWS), torch.device("cpu")), logits()
    own = rows.begin(asked())
    larger = own.join(Kind(edits=True, candidates=VOCABULARY))
    assert larger.covers(own)
    assert not own.covers(larger)
    said = rows.choose(given, own)
    rows.begin([*asked()[:-1], RowOptions(SAMPLINGS[-1], 115, 5, scored=True, banned=(299,))])
    assert torch.equal(rows.choose(given, larger)[0, :-1], said[0, :-1])


def test_the_choice_compiles_and_says_the_same() -> None:
    sampler = search_of(ThreadGroup(Mesh.of()).communicator(0), 1)
    rows, given = RowSampler(sampler.search, len(ROWS), torch.device("cpu")), logits()
    kind = rows.begin(asked())
    traced = torch.fx.experimental.proxy_tensor.make_fx(lambda given: rows.choose(given, kind))(given)
    # one graph of ops, without a question to the host in it: what a capture needs
    assert not [node for node in traced.graph.nodes if "_local_scalar_dense" in str(node.target)]
    assert torch.equal(traced(given), rows.choose(given, kind))
    rows.begin(asked(step=9))
    assert torch.equal(traced(given), rows.choose(given, kind))
