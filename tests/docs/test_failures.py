"""docs/failures.md quotes messages: each stands in the file that the table names for it."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PLACEHOLDER = re.compile(r"\brank N\b|\bT s\b|HOST:PORT|ValueError: \.\.\.|\.\.\.")


def rows() -> list[list[str]]:
    text = (ROOT / "docs" / "failures.md").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith("| **")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def said_in(path: str) -> str:
    """The source, with strings that go on in the next line put together."""
    return re.sub(r'"\s*\n\s*f?"', "", (ROOT / path).read_text(encoding="utf-8"))


def missing(message: str, sources: str) -> list[str]:
    """Parts of a message, between what differs from case to case, that no source has."""
    parts = [part.strip(" ;:") for part in PLACEHOLDER.split(message)]
    return [part for part in parts if part and part not in sources]


def test_each_message_is_in_a_file_that_the_row_names() -> None:
    verdicts = said_in("runtime/communication/process_groups.py")  # says who could not meet, around the reason
    found = 0
    for what, when, message, _, _, file in rows():
        quoted = re.fullmatch(r"`(.*)`", message)
        path = file.strip("`")
        assert (ROOT / path).exists(), path
        if quoted:
            found += 1
            assert not missing(quoted[1], said_in(path) + verdicts), (what, when)
    assert found >= 10


def test_every_kind_of_loss_is_there() -> None:
    kinds = {(re.findall(r"\*\*(.+?)\*\*", what)[0], "CUDA" in when) for what, when, *_ in rows()}
    assert {("ended", False), ("hung", False), ("never came", False), ("ended", True), ("hung", True)} <= kinds


def test_a_message_that_nobody_says_is_found() -> None:
    source = said_in("runtime/processes/heartbeat.py")
    assert missing("rank N was struck by lightning", source) == ["was struck by lightning"]
