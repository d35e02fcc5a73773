"""Bundles that were forged or damaged, but for their graphs: manifest, ranks, weights, and the files themselves."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import partitioner
from partitioner import BundleError, PartitionerError, Plan, WeightError, partition
from partitioner.storage.bundle.format.manifest import SCHEMA
from tests.support.bundle_forger import IDS, Forger, tiny_model, use

pytestmark = pytest.mark.usefixtures("canary")
Data = dict[str, Any]
HUGE = 2**60

MANIFEST: dict[str, Callable[[Data], Any]] = {
    "another format": lambda d: d.update(format="zip"),
    "no format": lambda d: d.pop("format"),
    "schema 0": lambda d: d.update(schema=0),
    "schema 1.0": lambda d: d.update(schema=1.0),
    "schema true": lambda d: d.update(schema=True),
    "schema as text": lambda d: d.update(schema="1"),
    "no versions": lambda d: d.update(versions=[]),
    "a version with an escape": lambda d: d["versions"].update(torch="\x1b[31m2.0"),
    "a version of a long name": lambda d: d["versions"].update({"x" * 100_000: 1}),
    "a mesh that is not the plan's": lambda d: d["mesh"].update(tp=3),
    "a mesh of another axis": lambda d: d["mesh"].update(ep=2),
    "a mesh without an axis": lambda d: d["mesh"].pop("dp"),
    "a mesh of nothing": lambda d: d["mesh"].update(tp=0),
    "a mesh of many": lambda d: (d["mesh"].update(tp=16_384), d["plan"]["degrees"].update(tp=16_384)),
    "a mesh too large": lambda d: (d["mesh"].update(tp=2**40), d["plan"]["degrees"].update(tp=2**40)),
    "a mesh of fewer": lambda d: (d["mesh"].update(tp=1), d["plan"]["degrees"].update(tp=1)),
    "a mesh along dp too": lambda d: d["mesh"].update(dp=2),
    "a plan that is none": lambda d: d.update(plan=None),
    "a plan with passes to import": lambda d: d["plan"].update(passes=[{"module": "os"}]),
    "a length of nothing": lambda d: d.update(length=0),
    "a length too large": lambda d: d.update(max_length=2**63),
    "weights elsewhere": lambda d: d.update(weights="https://example.com"),
    "files that are none": lambda d: d.update(files=[]),
    "a field too many": lambda d: d.update(hook="os.system"),
    "no report": lambda d: d["files"].pop("report.txt"),
    "no ranks": lambda d: d["files"].pop("ranks/1.json"),
    "no configuration": lambda d: d["files"].pop("model/config.json"),
    "no weights": lambda d: d["files"].pop("weights/rank1-00000.safetensors"),
    "no graphs": lambda d: d.update(files={k: v for k, v in d["files"].items() if "graphs" not in k}),
    "text without a digest": lambda d: d["files"]["report.txt"].update(sha256=None),
    "weights with a digest": lambda d: d["files"]["weights/rank0-00000.safetensors"].update(sha256="0" * 64),
    "a digest too short": lambda d: d["files"]["report.txt"].update(sha256="00"),
    "a size below 0": lambda d: d["files"]["report.txt"].update(bytes=-1),
    "a size that is wrong": lambda d: d["files"]["weights/rank0-00000.safetensors"].update(bytes=1),
    "a size beyond all": lambda d: d["files"]["report.txt"].update(bytes=HUGE),
    "a size that is true": lambda d: d["files"]["report.txt"].update(bytes=True),
    **{
        f"the file {name[:20]!r}": lambda d, name=name: d["files"].update({name: {"bytes": 1, "sha256": "0" * 64}})
        for name in (
            "../x", "/etc/passwd", "", ".", "..", "a/../b", ".hidden", "graphs/.x", "a\\b", "a//b", "a/", "a/b/c/d/e",
            "weights/../../x", "x\n", "x\u0000", "C:x", "~/x", "a b", "weights/" + "x" * 300, "-x", "\u202etxt",
            "x" * 100_000, "\x1b[2J", "a\nb",
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("what", MANIFEST)
def test_a_forged_manifest(what: str, folder: Path) -> None:
    with Forger(folder).manifest() as data:
        MANIFEST[what](data)
    with pytest.raises(BundleError):
        use(folder)


TEXTS: dict[str, Callable[[bytes], bytes]] = {
    "nothing": lambda t: b"",
    "no JSON": lambda t: b"exec('x')",
    "a list": lambda t: b"[]",
    "a number": lambda t: b"5",
    "cut off": lambda t: t[: len(t) // 2],
    "two documents": lambda t: t + t,
    "a name twice": lambda t: t.replace(b"{", b'{"mesh": 1, "coordinates": 2, "mesh": 1, "coordinates": 2, ', 1),
    "NaN": lambda t: t.replace(b"null", b"NaN", 1),
    "Infinity": lambda t: t.replace(b"null", b"-Infinity", 1),
    "an integer of 5000 digits": lambda t: t.replace(b"null", b"1" + b"0" * 5000, 1),
    "a float beyond all": lambda t: t.replace(b"null", b"1e999", 1),
    "a float of 5000 digits": lambda t: t.replace(b"null", b"0." + b"1" * 5000, 1),
    "nested": lambda t: t.replace(b"null", b"[" * 100 + b"]" * 100, 1),
    "nested much": lambda t: t.replace(b"null", b"[" * 900 + b"]" * 900, 1),
    "nested without end": lambda t: b'{"a":' * 100_000,
    "not UTF-8": lambda t: t.replace(b"null", b'"\xff\xfe"', 1),
    "UTF-16": lambda t: t.decode().encode("utf-16"),
    "half a character": lambda t: t.replace(b"null", rb'"\ud800"', 1),
    "a mark before it": lambda t: b"\xef\xbb\xbf" + t,
    "a comment": lambda t: b"// x\n" + t,
    "single quotes": lambda t: t.replace(b'"', b"'"),
}


@pytest.mark.parametrize("what", TEXTS)
@pytest.mark.parametrize("name", ["manifest.json", "ranks/0.json"])
def test_text_that_is_not_strict_json(name: str, what: str, folder: Path) -> None:
    forger, text = Forger(folder), TEXTS[what]((folder / name).read_bytes())
    if name == "manifest.json":
        forger.write_manifest(text)
    else:
        forger.text(name, lambda _: text)
    with pytest.raises(BundleError):
        use(folder)


def weight(**changes: Any) -> Callable[[Data], None]:
    return lambda d: d["weights"][0].update(changes)


def text(**changes: Any) -> Callable[[Data], None]:
    return lambda d: d["programs"]["text"].update(changes)


def given(**changes: Any) -> Callable[[Data], None]:
    return lambda d: d["programs"]["text"]["inputs"][0].update(changes)


def state(**changes: Any) -> Callable[[Data], None]:
    return lambda d: d["programs"]["prefill"]["states"][0].update(changes)


def generation(**changes: Any) -> Callable[[Data], None]:
    return lambda d: d["programs"]["prefill"].update(changes)


RANKS: dict[str, Callable[[Data], Any]] = {
    "other coordinates": lambda d: d["coordinates"].update(tp=1),
    "coordinates outside": lambda d: d["coordinates"].update(tp=7),
    "coordinates below 0": lambda d: d["coordinates"].update(tp=-1),
    "coordinates that are true": lambda d: d["coordinates"].update(dp=False),
    "coordinates too many": lambda d: d["coordinates"].update(ep=0),
    "no coordinates": lambda d: d.pop("coordinates"),
    "a field too many": lambda d: d.update(setup="os.system"),
    "no weights": lambda d: d.update(weights=[]),
    "weights that are none": lambda d: d.update(weights={}),
    "no text": lambda d: d.update(text=None),
    "a shape beyond all": weight(global_shape=[HUGE, HUGE], indices=[None, None]),
    "a shape below 0": weight(global_shape=[-1, 16]),
    "a shape of 64 bits": weight(global_shape=[2**63, 16]),
    "a shape of fractions": weight(global_shape=[40.0, 16]),
    "a shape of truths": weight(global_shape=[True, 16]),
    "a shape of many dims": weight(global_shape=[1] * 500, indices=[None] * 500),
    "a shape of other dims": weight(global_shape=[40], indices=[None]),
    "a shape of nothing": weight(global_shape=[0, HUGE], indices=[None, None]),
    "another shape": weight(global_shape=[40, 8]),
    "indices too few": weight(indices=[None]),
    "indices that overlap": weight(indices=[[[0, 12], [10, 18]], None]),
    "indices out of order": weight(indices=[[[10, 20], [0, 10]], None]),
    "indices that touch": weight(indices=[[[0, 10], [10, 20]], None]),
    "indices outside": weight(indices=[[[30, 50]], None]),
    "indices below 0": weight(indices=[[[-20, 0]], None]),
    "indices backwards": weight(indices=[[[20, 0]], None]),
    "indices of one end": weight(indices=[[[0]], None]),
    "indices that are fractions": weight(indices=[[[0, 20.0]], None]),
    "indices that are texts": weight(indices=[["ab"], None]),
    "indices of another rank": lambda d: d["weights"][0].update(global_shape=[40, 16], indices=[[[0, 19]], None]),
    "a dtype that is none": weight(dtype="object"),
    "a dtype that is code": weight(dtype="__import__('os')"),
    "a dtype that is a list": weight(dtype=[]),
    "another dtype": weight(dtype="float64"),
    "a source that is none": weight(source="https://example.com"),
    "aliases that are none": weight(aliases="x"),
    "aliases that are code": weight(aliases=["x; y"]),
    "another key": weight(key="nothing"),
    "a key that is a path": weight(key="../../x"),
    "a file that is none": weight(file="weights/none.safetensors"),
    "a file outside": weight(file="../x.safetensors"),
    "a file that is absolute": weight(file="/etc/passwd"),
    "a file that is no weights": weight(file="report.txt"),
    "a file that is a text": weight(file="model/config.json"),
    "a pickle": weight(file="weights/x.bin"),
    "no file": weight(file=None),
    "no file but pieces": weight(file=None, pieces=[["x", [[0, 1]], [[0, 1], [0, 1]], 0, None]]),
    "pieces and a file": weight(pieces=[]),
    "another digest": weight(sha256="0" * 64),
    "a digest that is none": weight(sha256=None),
    "the weight twice": lambda d: d["programs"]["text"]["weights"].__setitem__(0, d["programs"]["text"]["weights"][1]),
    "a weight that is not there": lambda d: d["programs"]["text"]["weights"].append(10_000),
    "a weight below 0": lambda d: d["programs"]["text"]["weights"].__setitem__(0, -1),
    "a weight too few": lambda d: d["programs"]["text"]["weights"].pop(),
    "a graph that is not there": text(graph="0" * 64),
    "a graph that is a path": text(graph="../../x"),
    "integers that are fractions": text(integers=[0.5]),
    "integers beyond all": text(integers=[2**63]),
    "no integers": text(integers=[]),
    "no inputs": text(inputs=[]),
    "inputs twice": lambda d: d["programs"]["text"]["inputs"].append(d["programs"]["text"]["inputs"][0]),
    "an input of many dims": given(shape=["a"] * 500),
    "an input of a dim that is code": given(shape=["x; y", "sequence"]),
    "an input beyond all": given(shape=[HUGE, "sequence"]),
    "an input below 0": given(shape=[-1, "sequence"]),
    "an input of another dtype": given(dtype="float32"),
    "a default that is code": given(default="__import__('os')"),
    "a bound backwards": given(bound={"low": 5, "high": -5, "rows": 40, "table": "x"}),
    "a bound that is a list": given(bound=[0, 39]),
    "a bound of code": given(bound={"low": 0, "high": 39, "rows": 40, "table": "x; y"}),
    "ends that are texts": text(eos_token_id=["x"]),
    "a generation config that is a list": text(generation_config=[1]),
    "a generation config of other names": text(generation_config={"a b": 1}),
    "ends below 0": text(eos_token_id=[-1]),
    "ends beyond all": text(eos_token_id=[2**63]),
    "a vocabulary beyond all": text(vocab_size=2**40),
    "vocabularies beyond all": generation(vocabulary=[[[0, 2**50]], [[2**50, 2**51]]]),
    "a vocabulary outside": generation(vocabulary=[[[0, 20]], [[20, 41]]]),
    "a vocabulary that overlaps itself": generation(vocabulary=[[[0, 20], [10, 30]], [[20, 40]]]),
    "a vocabulary too few": generation(vocabulary=[[[0, 40]]]),
    "a vocabulary of no lists": generation(vocabulary=["ab", "cd"]),
    "a vocabulary of other parts": generation(vocabulary=[[[0, 30]], [[30, 40]]]),
    "a vocabulary with a gap": generation(vocabulary=[[[0, 19]], [[20, 40]]]),
    "a vocabulary of nothing": generation(vocabulary=[[], []]),
    "a vocabulary of size 0": generation(vocab_size=0, vocabulary=None),
    "a vocabulary that is smaller": generation(vocab_size=20, vocabulary=[[[0, 10]], [[10, 20]]]),
    "a whole vocabulary": generation(vocabulary=None),
    "limits backwards": text(limits={"sequence": [5, 2]}),
    "limits that are code": text(limits={"x; y": [1, 2]}),
    "limits of one end": text(limits={"sequence": [1]}),
    "limits beyond all": text(limits={"sequence": [2**60, None]}),
    "limits that nothing fits": text(limits={"sequence": [2**20, None]}),
    "a state beyond all": state(shape=[HUGE, 16]),
    "a state of terabytes": state(shape=[2**20, 2**20]),
    "a state of more than there is": state(shape=[2**17, 2**19]),
    "a state below 0": state(shape=[-1, 4]),
    "a state of no dims": state(shape=[]),
    "a state of other dims": state(shape=[1, 8]),
    "a state of another dtype": state(dtype="bool"),
    "a state once": state(per_token=False),
    "a state of another name": state(name="x.key"),
    "a state that is code": state(name="x'];"),
    "a state that sees nothing": state(sees=0),
    "a state that sees a little and wrongly": state(sees=-3),
    "no states": generation(states=[]),
    "per_token that is a number": state(per_token=1),
}


@pytest.mark.parametrize("what", RANKS)
def test_a_forged_rank(what: str, folder: Path) -> None:
    with Forger(folder).json("ranks/0.json") as data:
        RANKS[what](data)
    with pytest.raises(PartitionerError):
        use(folder)


def test_ranks_that_took_each_other_s_place(folder: Path) -> None:
    a, b = folder / "ranks/0.json", folder / "ranks/1.json"
    one, other = a.read_bytes(), b.read_bytes()
    a.write_bytes(other)
    b.write_bytes(one)
    Forger(folder).rehash()
    with pytest.raises(BundleError, match="'coordinates' must be those of rank 0"):
        use(folder)


def entry(**changes: Any) -> Callable[[Data], None]:
    """The first tensor of a safetensors header, changed."""
    return lambda h: next(v for k, v in h.items() if k != "__metadata__").update(changes)


def overlapping(header: Data) -> None:
    one, other, *_ = (v for k, v in header.items() if v.get("shape") == [4, 16])
    other["data_offsets"] = one["data_offsets"]


HEADERS: dict[str, Callable[[Data], Any]] = {
    "offsets beyond the file": entry(shape=[HUGE], data_offsets=[0, 4 * HUGE]),
    "offsets backwards": entry(data_offsets=[64, 0]),
    "offsets below 0": entry(data_offsets=[-64, 0]),
    "offsets of 64 bits": entry(shape=[1], data_offsets=[2**64, 2**64 + 4]),
    "offsets of 4000 digits": entry(shape=[1], data_offsets=[10**4000, 10**4000 + 4]),
    "offsets that are texts": entry(data_offsets="ab"),
    "offsets that are three": entry(data_offsets=[0, 1, 2]),
    "offsets that are fractions": entry(data_offsets=[0.0, 64.0]),
    "no offsets": lambda h: next(v for k, v in h.items() if k != "__metadata__").pop("data_offsets"),
    "tensors that overlap": overlapping,
    "a shape beyond all": entry(shape=[HUGE, HUGE]),
    "a shape below 0": entry(shape=[-4, -4]),
    "a shape of many dims": entry(shape=[1] * 10_000),
    "a shape that is text": entry(shape="12"),
    "a dtype that is none": entry(dtype="PICKLE"),
    "a dtype that is a list": entry(dtype=["F32"]),
    "a dtype that is an object": entry(dtype={}),
    "another dtype": entry(dtype="I32"),
    "an entry that is text": lambda h: dict.fromkeys(h, "x"),
    "an entry that is null": lambda h: dict.fromkeys(h),
    "no entries": lambda h: {},
    "a list": lambda h: [],
    "no JSON": lambda h: b"x" * 50,
    "nested without end": lambda h: b'{"a":' * 10_000,
    "nested and closed": lambda h: b'{"a":' + b"[" * 900 + b"]" * 900 + b"}",
    "an integer of 5000 digits": lambda h: b'{"a": 1' + b"0" * 5000 + b"}",
    "not UTF-8": lambda h: b"\xff\xff\xff",
    "nothing": lambda h: b"",
}


@pytest.mark.parametrize("what", HEADERS)
def test_a_forged_header(what: str, folder: Path) -> None:
    Forger(folder).header("weights/rank0-00000.safetensors", HEADERS[what])
    with pytest.raises(PartitionerError):
        use(folder)


@pytest.mark.parametrize("length", [0, 1, 2**31, 2**62, 2**64 - 1])
def test_a_header_of_another_length(length: int, folder: Path) -> None:
    Forger(folder).text("weights/rank0-00000.safetensors", lambda t: length.to_bytes(8, "little") + t[8:])
    with pytest.raises(WeightError):
        use(folder)


def test_weights_altered(folder: Path) -> None:
    Forger(folder).text("weights/rank0-00000.safetensors", lambda t: t[:-1] + bytes([t[-1] ^ 1]))
    with pytest.raises(WeightError, match="is damaged or was altered: the SHA-256 of its bytes is"):
        partitioner.load(folder).simulate(input_ids=IDS)


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


KINDS = (
    "manifest.json", "manifest.sha256", "report.txt", "model/config.json", "ranks/1.json", "graphs/*",
    "weights/every-00000.safetensors", "weights/rank1-00000.safetensors",
)  # fmt: skip


def spoil_link(path: Path) -> None:
    target = path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(target)


def spoil_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def spoil_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def spoil_device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


SPOILS: dict[str, Callable[[Path], Any]] = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\n"),
    "one bit": lambda path: path.write_bytes(path.read_bytes()[:-2] + bytes([path.read_bytes()[-2] ^ 4, 10])),
    "a link": spoil_link,
    "a broken link": lambda path: (path.unlink(), path.symlink_to("nowhere")),
    "a link to itself": lambda path: (path.unlink(), path.symlink_to(path.name)),
    "a pipe": spoil_pipe,
    "a folder": spoil_folder,
    "a device": spoil_device,
    "larger than all": lambda path: os.truncate(path, 2**40),
}


@pytest.mark.parametrize("what", SPOILS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_is_not_what_was_written(kind: str, what: str, folder: Path) -> None:
    SPOILS[what](next(folder.glob(kind)))
    with pytest.raises(PartitionerError):
        use(folder)


@pytest.mark.parametrize("name", ["graphs", "ranks", "weights", "model"])
def test_a_folder_that_is_a_link(name: str, folder: Path) -> None:
    moved = (folder / name).rename(folder.parent / "elsewhere")
    (folder / name).symlink_to(moved)
    with pytest.raises(BundleError, match="cannot open"):
        use(folder)


def test_what_is_no_bundle(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    os.mkfifo(tmp_path / "pipe")
    for name in ("empty", "file", "pipe", "nowhere"):
        with pytest.raises(BundleError, match=r"is no bundle: it has no manifest.json|is no folder"):
            partitioner.load(tmp_path / name)


def test_a_newer_schema_names_both_versions(folder: Path) -> None:
    with Forger(folder).manifest() as data:
        data["schema"] = SCHEMA + 1
        data["versions"]["partitioner"] = "9.9"
        data["something new"] = {}
    this = partitioner.__version__
    expected = f"has schema {SCHEMA + 1} and was written by partitioner 9.9; this is partitioner {this}"
    with pytest.raises(BundleError, match=re.escape(expected)):
        use(folder)


@pytest.mark.parametrize("rank", [-1, 2, True, "0", 0.0, None])
def test_a_rank_that_there_is_not(rank: Any, folder: Path) -> None:
    bundle = partitioner.load(folder)
    with pytest.raises(PartitionerError, match="the ranks of this mesh are 0 to 1"):
        bundle.rank(rank)


@pytest.mark.parametrize("name", ["model/tokenizer.py", "setup.py"])
def test_files_that_nobody_listed_are_refused(name: str, folder: Path) -> None:
    (folder / name).write_text("raise SystemExit")
    with pytest.raises(BundleError, match="which its manifest does not list"):
        use(folder)


CONFIGS: dict[str, Callable[[Data], Any]] = {
    "code of its own": lambda d: d.update(auto_map={"AutoModelForCausalLM": "x.Y", "AutoConfig": "x.Y"}),
    "code of its own, within": lambda d: d.update(text_config=[{"auto_map": {"AutoConfig": "x.Y"}}]),
    "another model": lambda d: d.update(model_type="gpt2", architectures=["GPT2LMHeadModel"]),
    "a model that is none": lambda d: d.update(model_type="../x"),
    "an architecture that is none": lambda d: d.update(architectures=["Trainer"]),
    "an architecture that is a function": lambda d: d.update(architectures=["set_seed"]),
    "sizes that do not fit": lambda d: d.update(hidden_size=17),
    "sizes that are texts": lambda d: d.update(hidden_size="x"),
    "more layers": lambda d: d.update(num_hidden_layers=2),
    "another vocabulary": lambda d: d.update(vocab_size=41),
    "an activation that is none": lambda d: d.update(hidden_act="__import__('os')"),
    "a kernel to fetch": lambda d: d.update(attn_implementation="example/kernel"),
    "a kernel to fetch, within": lambda d: d.update(_attn_implementation={"": "example/kernel"}),
    "a kernel that stands in for another": lambda d: d.update(_attn_implementation="flash_attention_2"),
    "an attribute of the class": lambda d: d.update(__class__="x"),
}


@pytest.mark.parametrize("what", CONFIGS)
def test_a_forged_configuration(what: str, folder: Path) -> None:
    """It is read when the bundle is split anew; what it names is not followed."""
    with Forger(folder).json("model/config.json") as data:
        CONFIGS[what](data)
    expected = "could bring code of its own" if "code" in what or "kernel" in what else None
    with pytest.raises(PartitionerError, match=expected):
        partition(folder, Plan(tp=1)).simulate(input_ids=IDS)


def test_altered_weights_are_found_before_they_are_split_anew(folder: Path, tmp_path: Path) -> None:
    Forger(folder).text("weights/rank1-00000.safetensors", lambda t: t[:-1] + bytes([t[-1] ^ 1]))
    with pytest.raises(WeightError, match="is damaged or was altered"):
        partition(folder, Plan(tp=1))
    shutil.rmtree(folder)


PIECES: dict[str, list[Any]] = {
    "nothing": [],
    "a part only": ["x", [[0, 10], [0, 16]], [[0, 10], [0, 16]], 0, None],
    "a part twice": ["x", [[0, 10], [0, 16]], [[0, 10], [0, 16]], 0, None, "twice"],
    "no tensor": [None, [[0, 20], [0, 16]], [[0, 20], [0, 16]], 0, None],
    "another tensor": ["../x", [[0, 20], [0, 16]], [[0, 20], [0, 16]], 0, None],
    "outside the part": ["x", [[0, 20], [0, 16]], [[10, 30], [0, 16]], 0, None],
    "outside the tensor": ["x", [[30, 50], [0, 16]], [[0, 20], [0, 16]], 0, None],
    "of another place": ["x", [[1, 21], [0, 16]], [[0, 20], [0, 16]], 0, None],
    "backwards": ["x", [[20, 0], [0, 16]], [[0, 20], [0, 16]], 0, None],
    "below 0": ["x", [[-20, 0], [0, 16]], [[0, 20], [0, 16]], 0, None],
    "other dims": ["x", [[0, 20]], [[0, 20], [0, 16]], 0, None],
    "many dims": ["x", [[0, 1]] * 1000, [[0, 20], [0, 16]], 0, None],
    "an offset below 0": ["x", [[0, 20], [0, 16]], [[0, 20], [0, 16]], -4, [16, 1]],
    "an offset beyond": ["x", [[0, 20], [0, 16]], [[0, 20], [0, 16]], HUGE, [16, 1]],
    "strides beyond": ["x", [[0, 20], [0, 16]], [[0, 20], [0, 16]], 0, [HUGE, HUGE]],
    "strides below 0": ["x", [[0, 20], [0, 16]], [[0, 20], [0, 16]], 0, [-1, 1]],
    "strides of 0": ["x", [[0, 20], [0, 16]], [[0, 20], [0, 16]], 0, [0, 0]],
    "strides too few": ["x", [[0, 20], [0, 16]], [[0, 20], [0, 16]], 0, [1]],
    "a fraction": ["x", [[0, 20.0], [0, 16]], [[0, 20], [0, 16]], 0, None],
    "text": ["x", "ab", "cd", 0, None],
}  # fmt: skip


@pytest.fixture(scope="module")
def referring(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint, and a bundle that refers to it."""
    here = tmp_path_factory.mktemp("referring")
    tiny_model().save_pretrained(here / "checkpoint")
    partition(here / "checkpoint", Plan(tp=2)).save(here / "bundle", reference=True)
    bundle = partitioner.load(here / "bundle", checkpoint=here / "checkpoint")
    assert bundle.simulate(input_ids=IDS).isfinite().all()
    return here


def forged_references(what: str, referring: Path, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(referring / "bundle", tmp_path / "bundle"))
    with Forger(folder).json("ranks/0.json") as data:
        found = data["weights"][0]
        assert found["global_shape"] == [40, 16]
        name, piece = found["pieces"][0][0], PIECES[what]
        pieces = [piece[:5]] * (2 if "twice" in piece else 1) if piece else []
        found["pieces"] = [[name if each[0] == "x" else each[0], *each[1:]] for each in pieces]
    return folder


@pytest.mark.parametrize("what", PIECES)
def test_forged_references_to_a_checkpoint(what: str, referring: Path, tmp_path: Path) -> None:
    folder = forged_references(what, referring, tmp_path)
    with pytest.raises(PartitionerError):
        partitioner.load(folder, checkpoint=referring / "checkpoint").verify()


@pytest.mark.parametrize("what", ["nothing", "a part only", "a part twice"])
def test_what_no_piece_fills_is_refused_although_nobody_checks(what: str, referring: Path, tmp_path: Path) -> None:
    """It would be what the memory held before."""
    folder = forged_references(what, referring, tmp_path)
    with pytest.raises(BundleError, match=r"blocks that fill the rank's part, \[20, 16\], each element once"):
        partitioner.load(folder, checkpoint=referring / "checkpoint", checked=False).rank(0)


def test_a_weight_larger_than_memory_is_blamed_on_the_bundle(referring: Path, tmp_path: Path) -> None:
    """Steps of 0 make any number of elements out of one."""
    folder = Path(shutil.copytree(referring / "bundle", tmp_path / "bundle"))
    with Forger(folder).json("ranks/0.json") as data:
        size = 2**50
        data["weights"][0].update(global_shape=[size], indices=[None])
        piece = data["weights"][0]["pieces"][0]
        piece[1:] = [[[0, 1], [0, 1]], [[0, size]], 0, [0]]
    with pytest.raises(BundleError, match="cannot be run like this"):
        partitioner.load(folder, checkpoint=referring / "checkpoint").verify()
