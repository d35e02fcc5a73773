import pytest
import torch

from partitioner.errors import CommunicationError
from runtime.ops.collectives import all_gather, all_reduce
from runtime.ops.communicating import COMMUNICATING


def test_unbound_collectives_say_what_to_do() -> None:
    with pytest.raises(CommunicationError, match=r"all_reduce over 'tp' is not bound.*Engine"):
        all_reduce(torch.ones(2), "tp")
    with pytest.raises(CommunicationError, match="all_gather over 'tp' is not bound"):
        all_gather(torch.ones(2), "tp", dim=0)


def test_every_collective_is_listed_under_its_name() -> None:
    assert {op.__name__: row.primitive for op, row in COMMUNICATING.items()} == {
        "all_reduce": "all_reduce",
        "all_gather": "all_gather",
        "collect_rows": None,
        "scatter_rows": None,
        "expert_send": None,
        "expert_return": None,
        "sequence_attention": None,
        "cached_sequence_attention": None,
        "latent_sequence_attention": None,
    }
