"""The page about a plan: all its sections and tables, nothing from elsewhere, nothing of a model as markup."""

from __future__ import annotations

import ast
import copy
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import partitioner
from partitioner import Plan
from partitioner.analysis.report.page.contents import Work
from partitioner.analysis.report.page.layer_kinds import layer_kinds
from partitioner.analysis.report.page.render import SECTIONS, as_json, render
from partitioner.analysis.report.page.tables import tables
from partitioner.analysis.report.page.traffic import traffic
from partitioner.cli.actions.report import page_of
from partitioner.cli.app import app
from partitioner.errors import InputError
from partitioner.planning.cluster import Cluster
from tests.support import stepping
from tests.support.partitioned import compiled

WORK = Work(prompt=64, new=16, batch=4)
VOID = {"meta", "link", "br", "use", "rect", "line", "path", "img"}


class Page(HTMLParser):
    """What is in a page: elements with attributes, tables as texts, and the text outside of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.values: dict[str, list[list[str | None]]] = {}
        self.open: list[str] = []
        self.text = ""
        self._table = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.elements.append((tag, given))
        self.open += [] if tag in VOID else [tag]
        if tag == "table":
            self._table = str(given["id"])
            self.tables[self._table], self.values[self._table] = [], []
        elif tag == "tr":
            self.tables[self._table].append([])
            self.values[self._table].append([])
        elif tag in ("th", "td"):
            self.tables[self._table][-1].append("")
            self.values[self._table][-1].append(given.get("data-value"))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("th", "td"):
            self.tables[self._table][-1][-1] += data
        if not {"script", "style"} & set(self.open):
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [given for each, given in self.elements if each == tag]


@pytest.fixture(scope="module")
def contents() -> dict[str, Any]:
    """Of 16 ranks: two replicas of two stages of four ranks, by which tensors and experts are divided."""
    plan = Plan(dp=2, pp=2, tp=4, ep=4)
    parts = compiled("mixtral", 4, dp=2, pp=2, ep=4)
    return page_of(parts, plan, WORK, cluster=Cluster.parse("2x8xH100"))


@pytest.fixture(scope="module")
def html(contents: dict[str, Any]) -> str:
    pytest.importorskip("matplotlib", reason="of the extra `page`")
    return render(contents, version="0")


def without_times(page: dict[str, Any]) -> dict[str, Any]:
    return {**page, "predicted": None}


def test_all_sections_pictures_and_tables_are_there(contents: dict[str, Any]) -> None:
    page = Page(render(without_times(contents), version="0"))
    assert not page.open
    ids = {given.get("id") for _, given in page.elements}
    assert {name for name, _ in SECTIONS} <= ids
    assert {"ranks", "links", "memory-table", "states", "whole", "weights", "stages", "exchanges-decode"} <= set(
        page.tables
    )
    pictures = {given["aria-labelledby"].split("-title")[0] for given in page.all("svg") if given["aria-labelledby"]}
    assert {"picture-ranks", "picture-memory", "picture-stages", "picture-layer-0", "picture-schedule"} <= pictures
    assert len(page.tables["ranks"]) == 1 + 16


def test_tables_and_pictures_say_what_they_are(contents: dict[str, Any]) -> None:
    text = render(without_times(contents), version="0")
    page = Page(text)
    assert len(page.all("caption")) == len(page.tables) > 8
    assert text.count("<thead>") == len(page.tables)
    assert all(given.get("scope") in ("col", "row") for given in page.all("th"))
    ids = [given["id"] for _, given in page.elements if "id" in given]
    assert len(ids) == len(set(ids))
    named = [name for _, given in page.elements for name in (given.get("aria-labelledby") or "").split()]
    assert set(named) <= set(ids)
    assert all(given.get("role") == "img" and given.get("aria-labelledby") for given in page.all("svg"))
    assert {tag for tag, _ in page.elements} >= {"header", "main", "nav", "footer", "section", "figure"}
    assert len(page.all("h1")) == 1
    assert page.all("html")[0]["lang"] == "en"


def outside(text: str) -> list[str]:
    """What a page would fetch."""
    found = re.findall(r"https?:[^\s\"')<]*|url\((?!data:|#)[^)]*\)|@import[^;]*", text)
    found += re.findall(r"""\b(?:src|href|action|poster|data)=["'](?!#|data:)[^"']*""", text)
    return found


def test_nothing_comes_from_elsewhere(contents: dict[str, Any], html: str) -> None:
    assert not outside(html)
    assert not outside(render(without_times(contents), version="0"))
    assert len(html.encode()) < 1_000_000
    assert not re.search(r"\b(?:nan|NaN|inf|Infinity|None|undefined)\b", Page(html).text)


@pytest.mark.parametrize("text", ["<img src='x.png'>", '<a href="//a.b">', "url(a.woff)", "@import 'a.css';"])
def test_what_comes_from_elsewhere_is_found(text: str) -> None:
    assert outside(text)


def test_the_page_says_what_the_json_says(contents: dict[str, Any], html: str) -> None:
    told = json.loads(as_json(contents))
    page = Page(html)
    made = tables(told)
    assert set(page.tables) == set(made)
    for name, table in made.items():
        assert page.tables[name] == [list(table.headings), *([cell.text for cell in row] for row in table.rows)]
        assert page.values[name][1:] == [
            [None if cell.value is None else str(cell.value) for cell in row] for row in table.rows
        ]
    ranks = [int(row[0] or "") for row in page.values["memory-table"][1:]]
    assert ranks == [rank["rank"] for rank in told["memory"]["ranks"]] == list(range(16))
    whole = [row["name"] for row in told["weights"] if row["is_matrix"] and not row["split"]]
    assert [row[0] for row in page.tables["whole"][1:]] == whole
    assert told["model"] in page.text
    assert all(note in page.text for note in told["notes"])


def test_times_have_a_plot_and_the_frontier_has_one(contents: dict[str, Any], html: str) -> None:
    page = Page(html)
    pictures = {str(given["aria-labelledby"]) for given in page.all("svg")}
    assert {"plot-times-title plot-times-desc", "plot-frontier-title plot-frontier-desc"} <= pictures
    assert {"spent", "plans", "frontier"} <= set(page.tables)
    assert [row[:2] for row in page.tables["plans"][1:3]] == [
        ["this plan", contents["predicted"]["this_plan"]["plan"]],
        ["1", contents["predicted"]["plans"][0]["plan"]],
    ]
    assert contents["predicted"]["this_plan"]["devices"] == 16


def test_error_bars_are_drawn_and_said(contents: dict[str, Any]) -> None:
    pytest.importorskip("matplotlib", reason="of the extra `page`")
    barred = copy.deepcopy(contents["predicted"])
    for plan in (barred["this_plan"], *barred["plans"]):
        plan |= {f"{name}_80": [plan[f"{name}_s"] * 0.9, plan[f"{name}_s"] * 1.2] for name in ("ttft", "tpot")}
    bare = {**barred, "plans": [{**plan, "ttft_80": None, "tpot_80": None} for plan in barred["plans"]]}
    bare["this_plan"] = {**barred["this_plan"], "ttft_80": None, "tpot_80": None}
    with_bars, without = (Page(render({**contents, "predicted": each}, version="0")) for each in (barred, bare))
    assert "with bars that hold 80% of measured times" in with_bars.text
    assert "without error bars" in without.text
    assert len(with_bars.elements) > len(without.elements)
    column = with_bars.tables["plans"][0].index("80% of measured")
    assert " to " in with_bars.tables["plans"][1][column]
    assert without.tables["plans"][1][column] == "not known"


def test_bytes_are_those_of_the_report(contents: dict[str, Any]) -> None:
    report = compiled("mixtral", 4, dp=2, pp=2, ep=4).report
    rows = contents["memory"]["ranks"]
    assert [row["own_bytes"] + row["replicated_bytes"] for row in rows] == list(report.bytes_per_rank) * 2
    per_token = compiled("mixtral", 4, dp=2, pp=2, ep=4).generation_report.bytes_per_token * 2
    rows_of_a_rank = contents["work"]["rows_of_a_rank"]
    assert all(row["cache_bytes"] >= rows_of_a_rank * 80 * each for row, each in zip(rows, per_token, strict=True))


def test_layers_are_said_as_steps(contents: dict[str, Any]) -> None:
    decode = [kind for kind in contents["layers"] if "decode" in kind["entries"] and kind["layers"]]
    prefill = [kind for kind in contents["layers"] if "prefill" in kind["entries"] and kind["layers"]]
    assert len(decode) == len(prefill) == 1  # alike layers are one kind
    steps = prefill[0]["steps"]
    hows = {each["how"] for step in steps if step["kind"] == "product" for each in step["divided"]}
    assert {"columns", "rows", "experts"} <= hows
    assert any(step["kind"] == "attention" and step["how"] == "heads" for step in steps)
    place = {step.get("weight") or step["op"]: number for number, step in enumerate(steps)}
    ends = [number for number, step in enumerate(steps) for each in step.get("divided", []) if each["how"] == "rows"]
    assert steps[ends[0] + 1]["kind"] == "exchange"  # a sum in parts is added up at once
    assert len(place) > 5


def test_a_tied_table_is_a_step_wherever_it_is_used() -> None:
    (outside_layers, layers) = layer_kinds(compiled("gpt2", 2).program_of("decode"))
    tables = [step for step in outside_layers["steps"] if step["kind"] == "product"]
    first, *_, last = tables
    assert first["weight"] == last["weight"]
    assert (first["divided"][0]["how"], last["divided"][0]["how"]) == ("entries", "columns")
    # stored with inputs first: what is divided is said by what it does, not by the number of the dim
    hows = [(each["dim"], each["how"]) for step in layers["steps"] for each in step.get("divided", [])]
    assert hows == [(1, "columns"), (0, "rows"), (1, "columns"), (0, "rows")]


def test_models_with_a_cache_of_their_own_have_traffic_and_layers() -> None:
    """They run token by token: their programs know a size of the cache, and no length of the text."""
    program = stepping.compiled("lfm2_moe", 2).program_of("decode")
    assert "sequence" not in program.symbols
    found = traffic("decode", program, {"batch": 2, "sequence": 1, "past": 5}, None)
    assert (found["rows_of_batch"], found["tokens"], found["past"]) == (2, 1, 5)
    assert found["most_bytes"] > 0
    assert any(step["kind"] == "exchange" for kind in layer_kinds(program) for step in kind["steps"])


def test_an_exchange_is_counted_once_per_stage(contents: dict[str, Any]) -> None:
    for each in contents["communication"]:
        total = sum(row["total_bytes"] for row in each["exchanges"])
        assert 0 < each["most_bytes"] < total  # each stage sends only its own
        assert any(row["op"].startswith("hand on") and row["link"] for row in each["exchanges"])


HOSTILE = "</title><script>alert(1)</script>\"'&<b onmouseover=x>"


def poisoned(value: Any) -> Any:
    """Every text of the page's data, hostile: names of weights, layers, devices, links, reasons, notes."""
    if isinstance(value, dict):
        kept = {"kind", "how", "entry", "per", "balance"}
        return {key: each if key in kept else poisoned(each) for key, each in value.items()}
    if isinstance(value, list):
        return [poisoned(each) for each in value]
    return value + HOSTILE if isinstance(value, str) and value else value


def test_names_are_never_markup(contents: dict[str, Any]) -> None:
    clean, bad = copy.deepcopy(without_times(contents)), poisoned(without_times(contents))
    for one, other in zip(clean["layers"], bad["layers"], strict=True):
        other["entries"] = one["entries"]
    before, after = Page(render(clean, version="0")), Page(render(bad, version="0"))
    assert [tag for tag, _ in before.elements] == [tag for tag, _ in after.elements]
    assert not any("onmouseover" in given for _, given in after.elements)
    assert "<script>alert" in after.text  # as text
    assert HOSTILE not in render(bad, version="0")


def test_names_are_never_markup_in_plots(contents: dict[str, Any]) -> None:
    pytest.importorskip("matplotlib", reason="of the extra `page`")
    bad = {**contents, "predicted": poisoned(contents["predicted"])}
    page = Page(render(bad, version="0"))
    assert not any("onmouseover" in given for _, given in page.elements)
    assert len(page.all("script")) == 1


def test_without_a_cluster_there_is_a_mesh(contents: dict[str, Any]) -> None:
    parts = compiled("gemma2", 2)
    found = page_of(parts, Plan(tp=2), WORK)
    page = Page(render(found, version="0"))
    assert found["cluster"] is None
    assert found["predicted"] is None
    assert "links" not in page.tables
    assert "--gpus 8xH100" in page.text
    assert "There is one stage" in page.text
    assert found["memory"]["fits"] is None


def test_a_model_that_cannot_generate_has_a_page() -> None:
    found = page_of(compiled("roberta", 2), Plan(tp=2), WORK, cluster=Cluster.parse("2xH100"))
    assert [each["entry"] for each in found["communication"]] == ["text"]
    assert any("no page of generation" in note for note in found["notes"])
    assert "Times are not predicted" in Page(render(found, version="0")).text
    as_json(found)


def test_too_few_devices_are_refused() -> None:
    with pytest.raises(InputError, match="1 devices have no room for 2 ranks"):
        page_of(compiled("gemma2", 2), Plan(tp=2), WORK, cluster=Cluster.parse("1xH100"))


def test_a_page_of_thousands_of_ranks_stays_small(contents: dict[str, Any]) -> None:
    page = copy.deepcopy(without_times(contents))
    for rows in (page["ranks"], page["memory"]["ranks"]):
        rows[:] = [{**rows[rank % 16], "rank": rank} for rank in range(4096)]
    page["num_ranks"] = 4096
    text = render(page, version="0")
    assert len(text.encode()) < 1_000_000
    assert "(3840 more rows are in the JSON)" in text
    assert "and 3,968 more ranks" in text


def test_a_missing_library_is_named(contents: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"pip install 'partitioner\[page\]'"):
        render(contents, version="0")
    render(without_times(contents), version="0")  # no plot, no library
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(InputError, match=r"pip install 'partitioner\[page\]'"):
        render(without_times(contents), version="0")


def test_libraries_of_the_page_are_imported_where_they_are_used() -> None:
    """`import partitioner`, and every command but this, does without them."""
    heavy = {"matplotlib", "jinja2", "markupsafe"}
    inside: set[str] = set()
    for path in Path(partitioner.__file__).parent.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found = {name.split(".")[0] for name in names} & heavy
            assert not found or node not in tree.body, f"{path} imports {found} when it is imported"
            inside |= found
    assert inside == heavy


def test_the_command_writes_page_and_json(tmp_path: Path) -> None:
    from tests.support import zoo

    config, out = tmp_path / "tiny.json", tmp_path / "page.html"
    config.write_text(json.dumps(zoo.tiny("llama")[0].config.to_dict(), default=str))
    result = CliRunner().invoke(app, ["report", f"config:{config}", "--tp", "2", "--html", str(out), "--json"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["num_ranks"] == 2
    assert Page(out.read_text(encoding="utf-8")).tables.keys() == tables(told).keys()
    for wrong in (
        ["--gpus", "8xH100"],
        ["--json", "--generate"],
        ["--html", str(tmp_path / "none" / "page.html")],
        ["--json", "--batch", "0"],
    ):
        assert CliRunner().invoke(app, ["report", f"config:{config}", "--tp", "2", *wrong]).exit_code == 2


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 420])
def test_a_browser_shows_it(html: str, tmp_path: Path, width: int) -> None:
    """Screenshots stay in pytest's folder of the test."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium here")
    page, shot = tmp_path / "page.html", tmp_path / f"page-{width}.png"
    page.write_text(html, encoding="utf-8")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"]
    options = [f"--screenshot={shot}", f"--window-size={width},2000", page.as_uri()]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr
    assert shot.stat().st_size > 20_000
    dom = subprocess.run(
        [*command, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    assert dom.stdout.count("<button") > 20  # the script has run
    assert dom.stdout.count("<table") == len(Page(html).tables)
    twice = "<script>for (let i = 0; i < 2; i++) document.querySelector('#memory-table th button').click()</script>"
    page.write_text(html.replace("</body>", f"{twice}</body>"), encoding="utf-8")
    dom = subprocess.run(
        [*command, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    assert [row[0] for row in Page(dom.stdout).tables["memory-table"][1:]] == [str(rank) for rank in range(16)][::-1]
    assert 'aria-sort="descending"' in dom.stdout
