import pytest
import torch

from partitioner.errors import RankMismatch
from runtime.communication.matching_calls import FINGERPRINT_BYTES, Call, check_agreement


def call(rank: int, *, node: str = "sum", kind: str = "all_reduce", axis: str = "tp", **options: object) -> Call:
    return Call(rank, node, kind, axis, options).on(torch.zeros(2, 3))


def over_the_wire(*calls: Call) -> list[Call]:
    return [Call.decode(sent.encode()) for sent in calls]


@pytest.mark.parametrize("transport", [lambda *calls: list(calls), over_the_wire])
@pytest.mark.parametrize(
    ("other", "named"),
    [
        (call(1, kind="all_gather", node="join"), "node 'join', all_gather"),
        (call(1, axis="dp"), "over 'dp'"),
        (call(1).on(torch.zeros(2, 4)), "2x4"),
        (call(1).on(torch.zeros(2, 3, dtype=torch.float64)), "float64"),
        (call(1, dim=1), "dim"),
    ],
)
def test_each_disagreement_names_both_nodes(transport, other: Call, named: str) -> None:
    with pytest.raises(RankMismatch) as caught:
        check_agreement(transport(call(0), other))
    assert "rank 0: node 'sum', all_reduce over 'tp', float32 [2x3]" in str(caught.value)
    assert "rank 1" in str(caught.value)
    assert named in str(caught.value)


def test_node_names_may_differ_and_uneven_pieces_too() -> None:
    check_agreement([call(0), call(1, node="sum_1")])
    a = call(0, kind="all_gather", dim=1, sizes=[3, 4])
    check_agreement(over_the_wire(a, Call(1, "b", "all_gather", "tp", a.options).on(torch.zeros(2, 4))))
    with pytest.raises(RankMismatch):
        check_agreement([a, Call(1, "b", "all_gather", "tp", a.options).on(torch.zeros(1, 4))])


def test_a_fingerprint_has_one_size_and_still_tells_long_ones_apart() -> None:
    long = [list(range(500)), [*range(499), 0]]
    calls = [Call(0, "n" * 500, "all_gather", "tp", {"dim": 0, "sizes": sizes}).on(torch.zeros(0)) for sizes in long]
    encoded = [sent.encode() for sent in calls]
    assert {len(sent) for sent in encoded} == {FINGERPRINT_BYTES}
    with pytest.raises(RankMismatch):
        check_agreement([Call.decode(sent) for sent in encoded])
