import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from partitioner.errors import LayoutError
from partitioner.sharding.index_set import IndexSet
from runtime.sampling.vocabulary_shards import Share, shares


@settings(max_examples=200)
@given(st.data())
def test_every_index_has_one_owner_among_its_holders(data: st.DataObject) -> None:
    ranks = data.draw(st.integers(1, 4))
    holders = data.draw(st.lists(st.sets(st.integers(0, ranks - 1), min_size=1), min_size=1, max_size=30))
    size = len(holders)
    owned = [IndexSet.of(i for i, held in enumerate(holders) if rank in held) for rank in range(ranks)]
    parts = shares(owned, size)
    assert sorted(i for part in parts for i in part.indices()) == list(range(size))
    assert all(part <= held and part == IndexSet.of(part.indices()) for part, held in zip(parts, owned, strict=True))
    for held, part in zip(owned, parts, strict=True):
        share = Share(held, part, vocab_size=size, device=torch.device("cpu"))
        logits = torch.tensor([held.indices()], dtype=torch.float64)
        if part.size:
            assert share.of(logits).tolist() == [part.indices()]
            assert share.tokens.tolist() == part.indices()
        else:
            assert share.of(logits).tolist() == [[-torch.inf]]
        where = share.locate(torch.tensor([*range(size), size, size + 7, -1]))
        expected = [part.indices().index(i) if i in part else len(share.tokens) for i in range(size)]
        assert where.tolist() == expected + [len(share.tokens)] * 3


def test_what_all_hold_is_cut_evenly() -> None:
    assert [str(part) for part in shares([IndexSet.range(0, 10)] * 4, 10)] == ["0:2", "2:5", "5:7", "7:10"]


@pytest.mark.parametrize(
    ("owned", "message"),
    [
        ([IndexSet.range(0, 4), IndexSet.range(5, 9)], "nobody holds 4:5"),
        ([IndexSet.range(0, 4), IndexSet.range(4, 10)], "9:10 lies outside"),
    ],
)
def test_gaps_and_strangers_are_named(owned: list[IndexSet], message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        shares(owned, 9)
