"""mkdocs.yml: every page of docs is in the site's contents, once, and nothing else."""

import yaml

from tests.support import typed


def test_every_page_is_in_the_contents() -> None:
    told = yaml.safe_load((typed.ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    named: list[str] = []
    for entry in told["nav"]:
        ((_, inside),) = entry.items()
        named += [inside] if isinstance(inside, str) else [path for each in inside for path in each.values()]
    pages = {path.relative_to(typed.ROOT / "docs").as_posix() for path in (typed.ROOT / "docs").rglob("*.md")}
    assert len(named) == len(set(named))
    assert set(named) == pages
