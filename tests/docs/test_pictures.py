"""The pictures of the docs are what their script draws, and each is shown somewhere."""

import runpy
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parents[2]
PICTURES = ROOT / "docs" / "reference" / "pictures"


@pytest.fixture(scope="module")
def drawn() -> dict[str, str]:
    pictures: dict[str, str] = runpy.run_path(str(PICTURES / "draw.py"))["pictures"]()
    return pictures


def test_pictures_are_up_to_date(drawn: dict[str, str]) -> None:
    kept = {path.name: path.read_text(encoding="utf-8") for path in PICTURES.glob("*.svg")}
    assert kept == drawn, "run python docs/reference/pictures/draw.py"


def test_pictures_are_shown(drawn: dict[str, str]) -> None:
    pages = "".join(path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")])
    for name, text in drawn.items():
        ElementTree.fromstring(text)
        assert f"reference/pictures/{name})" in pages


def test_every_query_head_is_on_one_rank_with_its_kv_head(drawn: dict[str, str]) -> None:
    words = [each.text or "" for each in ElementTree.fromstring(drawn["uneven_heads.svg"]).iter()]
    rows: list[list[str]] = []
    for word in words:
        if word.startswith("rank "):
            rows.append([])
        elif rows and len(word) < 4:
            rows[-1].append(word)
    assert len(rows) == 4
    queries = [int(head[1:]) for row in rows for head in row if head.startswith("q")]
    assert sorted(queries) == list(range(6))
    for row in rows:
        assert {f"kv{int(head[1:]) // 3}" for head in row if head.startswith("q")} == {
            head for head in row if head.startswith("kv")
        }
