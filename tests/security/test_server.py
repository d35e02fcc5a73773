"""The port of `partitioner serve`: the one of the table in docs/security.md, on loopback, and no other that answers."""

import os
import re
from pathlib import Path

import pytest

from tests.partitioner.serving.served import served
from tests.security.jobs.doors import knock, listening

KEY = "a-key-of-nobody"


@pytest.mark.processes
@pytest.mark.slow
def test_a_server_has_one_port_and_keeps_its_key(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    table = (pytestconfig.rootpath / "docs" / "security.md").read_text(encoding="utf-8")
    (number,) = re.findall(r"\| server \| running \| TCP on 127\.0\.0\.1, .*? \| (\d+) \|", table)
    with served(tmp_path, ["--plan", "tp=2"], environment={"PARTITIONER_API_KEY": KEY}) as server:
        doors = listening(server.process.pid)
        assert [(door.kind, door.address) for door in doors] == [("tcp", "127.0.0.1")] * int(number)
        assert (knock(doors[0], b"GET /v1/models HTTP/1.1\r\nhost: a\r\n\r\n", is_stranger=False) or b"").startswith(
            b"HTTP/1.1 401 "
        )
        ranks = server.ranks()
        inner = [door for rank in ranks for door in listening(rank)]
        assert len(ranks) == 2
        assert [knock(door, b"", is_stranger=False) for door in inner] == [None] * len(inner)
        for rank in ranks:
            assert KEY.encode() not in Path(f"/proc/{rank}/environ").read_bytes()
            assert os.fsencode(KEY) not in Path(f"/proc/{rank}/cmdline").read_bytes()
        assert server.end() == 0
