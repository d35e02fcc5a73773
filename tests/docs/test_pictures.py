"""The pictures of the docs are what their script draws, and each is shown somewhere."""

import runpy
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parents[2]
PICTURES = ROOT / "docs" / "reference" / "pictures"
MEASURED = "trace.svg"
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
    assert {path.name: kept(path.name) for path in PICTURES.glob("*.svg") if path.name != MEASURED} == drawn, UPDATE


def test_pictures_are_shown() -> None:
    pages = "".join(path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")])
    pictures = list(PICTURES.glob("*.svg"))
    assert len(pictures) == 4
    for picture in pictures:
        ElementTree.fromstring(kept(picture.name))
        assert f"reference/pictures/{picture.name})" in pages


def test_a_trace_is_drawn_to_scale(drawing: dict[str, Any]) -> None:
    def event(cat: str, rank: int, ts: float, dur: float, name: str = "n") -> dict[str, Any]:
        args = {"path": "model.layers.0.mlp"}
        return {"ph": "X", "cat": cat, "pid": rank, "ts": ts, "dur": dur, "name": name, "args": args}

    runs = [event("steps", 0, ts, 90, "run [1, 1]") for ts in (0, 100, 200)]
    layer = [event("compute", 0, 110, 40), event("communication", 1, 150, 40)]
    elsewhere = [event("compute", 0, 10, 5), event("compute", 0, 210, 5)]
    drawn = ElementTree.fromstring(drawing["trace"]([*runs, *layer, *elsewhere]))
    boxes = [each for each in drawn.iter() if len(each)]
    assert [(each.get("x"), each.get("width")) for each in boxes[1:]] == [("140.0", "320.0"), ("460.0", "320.0")]
    assert "0.1 ms" in "".join(drawn.itertext())


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
