"""The pages in docs/reference that are made from the code are up to date, and what they name is there."""

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import yaml

import partitioner
import partitioner.plugin
import runtime.engine

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = ROOT / "docs" / "reference"
CODE_PATH = re.compile(r"`((?:partitioner|passes|runtime|tests|docs|examples)/[\w/.]+)`")


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    generator: dict[str, Any] = runpy.run_path(str(REFERENCE / "generate.py"))
    made: dict[str, str] = generator["pages"]()
    return made


@pytest.mark.parametrize("name", ["api.md", "command_line.md"])
def test_a_page_is_what_the_code_says(name: str, pages: dict[str, str]) -> None:
    text = (REFERENCE / name).read_text(encoding="utf-8")
    assert text == pages[name], "run python docs/reference/generate.py"


def test_every_public_name_is_there(pages: dict[str, str]) -> None:
    for module in (partitioner, partitioner.plugin, runtime.engine):
        for name in module.__all__:
            assert name == "__version__" or f"### `{module.__name__}.{name}`\n" in pages["api.md"]


def test_defaults_are_said(pages: dict[str, str]) -> None:
    assert "    timeout_s: float = 60.0,\n" in pages["api.md"]
    assert re.search(r"\| `--max-new-tokens` \| int \| `64` \|", pages["command_line.md"])
    assert " at 0x" not in pages["api.md"]
    assert str(ROOT) not in "".join(pages.values())


@pytest.mark.parametrize(
    "page", ["failures.md", "extending/adding_a_rule.md", "architecture.md", "reference/glossary.md"]
)
def test_files_that_a_page_names_exist(page: str) -> None:
    named = set(CODE_PATH.findall((ROOT / "docs" / page).read_text(encoding="utf-8")))
    assert len(named) >= 5
    assert not [path for path in named if not (ROOT / path).exists()]


def test_the_glossary_is_in_order_and_says_each_word_once() -> None:
    text = (REFERENCE / "glossary.md").read_text(encoding="utf-8")
    words = [word.lower() for word in re.findall(r"^\| \*\*([^*]+)\*\*", text, re.MULTILINE)]
    assert words == sorted(set(words))


def test_the_contents_of_the_site_are_all_pages() -> None:
    told = yaml.safe_load((REFERENCE / "site.yml").read_text(encoding="utf-8"))
    named: list[str] = []
    for entry in told["nav"]:
        ((_, inside),) = entry.items()
        named += [inside] if isinstance(inside, str) else [path for each in inside for path in each.values()]
    assert len(named) == len(set(named))
    assert set(named) == {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
