"""What is asked of a server is a function of the seed, and what came of it is counted right."""

import math
from pathlib import Path

import pytest

from partitioner.errors import InputError
from partitioner.serving.load.ask import Answered
from partitioner.serving.load.measures import Measures, write_plot
from partitioner.serving.load.workload import ANSWER_MEAN, PROMPT_MEAN, Workload


def test_the_same_seed_asks_the_same() -> None:
    one, other = (Workload(requests=20, rate=3.0, seed=seed).questions() for seed in (1, 2))
    assert one == Workload(requests=20, rate=3.0, seed=1).questions()
    assert one != other


def test_arrivals_and_lengths_have_their_means() -> None:
    questions = Workload(requests=4000, rate=5.0, longest=10**6).questions()
    assert math.isclose(questions[-1].arrival_s, 4000 / 5, rel_tol=0.1)
    words = [len(question.prompt.split()) for question in questions]
    assert math.isclose(sum(words) / 4000, PROMPT_MEAN, rel_tol=0.1)
    assert math.isclose(sum(question.new for question in questions) / 4000, ANSWER_MEAN, rel_tol=0.1)
    short = Workload(requests=500, clients=2, longest=100).questions()
    assert max(len(question.prompt.split()) + question.new for question in short) <= 100
    assert {question.arrival_s for question in short} == {0.0}


@pytest.mark.parametrize("wrong", [{}, {"rate": 1.0, "clients": 2}, {"rate": 0.0}, {"rate": math.inf}])
def test_what_says_nothing_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError):
        Workload(**wrong)  # type: ignore[arg-type]


def test_percentiles_are_of_what_came(tmp_path: Path) -> None:
    came = [Answered(1.0, 1.0 + place / 100, 2.0 + place / 100, 3, 11) for place in range(1, 101)]
    measures = Measures((*came, Answered(0.0, 0.0, 0.0, 0, 0, error="503"), Answered(1.0, 1.5, 1.5, 3, 1)))
    times = measures.data()["seconds"]
    assert times["TTFT"]["p50"] == pytest.approx(0.5)
    assert times["TTFT"]["p99"] == pytest.approx(0.99)
    assert times["TPOT"]["p99"] == pytest.approx(0.1)
    assert measures.tokens_per_s == pytest.approx(1101 / 3.0)
    assert measures.data()["failed"] == ["503"]
    assert "1 failed" in measures.summary()
    write_plot(measures, str(tmp_path / "plot.svg"))
    assert (tmp_path / "plot.svg").read_text().count("TPOT") >= 1
    with pytest.raises(InputError, match="cannot write"):
        write_plot(measures, str(tmp_path / "none" / "plot.svg"))
