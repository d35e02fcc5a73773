"""What ranks say to each other over gloo: JSON, bounded, and a proof over every connection."""

from typing import Any

import pytest
import torch
from torch import distributed as dist

from partitioner.errors import CommunicationError
from runtime.communication.meeting import exchange
from runtime.communication.meeting.exchange import _prove, exchange_json
from runtime.communication.shared_memory.segment import Address
from runtime.processes.heartbeat import Heartbeat


@pytest.mark.parametrize("impostor", [None, 1, 2])
def test_who_does_not_have_the_key_is_named(impostor: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, other = (Heartbeat(0, 1, key=key) for key in (b"ours", b"another"))

    def all_to_all(received: torch.Tensor, sent: torch.Tensor, group: Any) -> None:
        proofs = [(other if rank == impostor else ours).proof(rank, 0) for rank in range(3)]
        received.copy_(torch.frombuffer(bytearray(b"".join(proofs)), dtype=torch.uint8))

    monkeypatch.setattr(exchange.dist, "all_to_all_single", all_to_all)
    try:
        if impostor is None:
            _prove(ours, range(3), None)  # type: ignore[arg-type]
        else:
            with pytest.raises(CommunicationError, match=f"in the place of rank {impostor} is not that rank"):
                _prove(ours, range(3), None)  # type: ignore[arg-type]
    finally:
        ours.close()
        other.close()


def test_what_is_exchanged_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    def all_gather(everyone: list[torch.Tensor], mine: torch.Tensor, group: Any) -> None:
        for each in everyone:
            each.fill_(2**40)

    monkeypatch.setattr(dist, "all_gather", all_gather)
    with pytest.raises(CommunicationError, match="a rank sent 1099511627776 bytes"):
        exchange_json("mine", group=None, num_ranks=2)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "fields", [[1, 2, "../../etc/passwd", 4], [1, 2, 3, 4], ["1", 2, "name", 4], [1, 2, "name"], [True, 2, "name", 4]]
)
def test_what_is_no_address_is_refused(fields: list[Any]) -> None:
    with pytest.raises(OSError, match="no address of a segment"):
        Address.of(fields)
    assert Address.of([1, 2, "partitioner-0a", 4]).name == "partitioner-0a"
