"""The pictures of the docs are what their script draws, and each is shown somewhere."""

import runpy
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parents[2]
PICTURES = ROOT / "docs" / "reference" / "pictures"
UPDATE = "run python docs/reference/pictures/draw.py"


@pytest.fixture(scope="module")
def drawing() -> dict[str, Any]:
    return runpy.run_path(str(PICTURES / "draw.py"))


def kept(name: str) -> str:
    return (PICTURES / name).read_text(encoding="utf-8")


def test_the_pipeline_is_that_of_the_architecture(drawing: dict[str, Any]) -> None:
    assert kept("pipeline.svg") == drawing["pipeline"](), UPDATE


@pytest.mark.slow
def test_all_pictures_are_up_to_date(drawing: dict[str, Any]) -> None:
    drawn = drawing["pictures"]()
    assert {path.name: kept(path.name) for path in PICTURES.glob("*.svg")} == drawn, UPDATE


def test_pictures_are_shown() -> None:
    pages = "".join(path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")])
    pictures = list(PICTURES.glob("*.svg"))
    assert len(pictures) == 2
    for picture in pictures:
        ElementTree.fromstring(kept(picture.name))
        assert f"reference/pictures/{picture.name})" in pages


def test_every_query_head_is_on_one_rank_with_its_kv_head() -> None:
    words = [each.text or "" for each in ElementTree.fromstring(kept("uneven_heads.svg")).iter()]
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
        needed = {f"kv{int(head[1:]) // 3}" for head in row if head.startswith("q")}
        assert needed == {head for head in row if head.startswith("kv")}
