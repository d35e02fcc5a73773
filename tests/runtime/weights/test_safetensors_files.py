import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from partitioner.errors import WeightError
from runtime.weights.safetensors_files import TensorFiles

TENSORS = {
    "a": torch.arange(6.0).reshape(2, 3),
    "b": torch.tensor(7, dtype=torch.int64),
    "c": torch.ones(4, dtype=torch.bfloat16),
    "empty": torch.empty(0, 3),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


def spread(folder: Path, places: dict[str, Any]) -> None:
    """The tensors a and c in two files, and an index of these places."""
    for name in "ac":
        save_file({name: TENSORS[name]}, folder / f"{name}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (folder / "model.safetensors").unlink()


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = folder / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def test_what_the_header_says(folder: Path) -> None:
    entries = TensorFiles(folder).entries
    assert {name: (e.shape, e.dtype, e.bytes) for name, e in entries.items()} == {
        name: (tuple(t.shape), t.dtype, t.nbytes) for name, t in TENSORS.items()
    }
    entry = entries["a"]
    assert entry.file.read_bytes()[entry.start : entry.start + 24] == TENSORS["a"].numpy().tobytes()


def test_an_index_names_the_files(folder: Path) -> None:
    spread(folder, {"a": "a.safetensors", "c": "c.safetensors"})
    assert {name: entry.file.name for name, entry in TensorFiles(folder).entries.items()} == {
        "a": "a.safetensors",
        "c": "c.safetensors",
    }


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ({"a": "../a.safetensors"}, "names the file '../a.safetensors': required is a .safetensors file within"),
        ({"a": "/a.safetensors"}, "names the file '/a.safetensors'"),
        ({"a": "a.bin"}, "names the file 'a.bin'"),
        ({"a": "a.safetensors", "b": "b.safetensors"}, "lacks the file 'b.safetensors', which should hold 'b'"),
        ({"a": "c.safetensors", "c": "c.safetensors"}, "c.safetensors does not hold 'a', although"),
        ({"a": 3}, "must have a 'weight_map'"),
        ([], "must have a 'weight_map'"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(folder: Path, places: Any, message: str) -> None:
    spread(folder, places)
    with pytest.raises(WeightError, match=re.escape(message)):
        TensorFiles(folder)


def test_one_name_in_two_files_is_refused(folder: Path) -> None:
    spread(folder, {"a": "a.safetensors", "c": "c.safetensors"})
    save_file({"a": TENSORS["a"], "c": TENSORS["c"]}, folder / "c.safetensors")
    with pytest.raises(WeightError, match=r"'a' is in two files: .*a\.safetensors and .*c\.safetensors"):
        TensorFiles(folder)


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (cut, "is cut short: '.' ends at byte"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\x05"), "cut short or no safetensors file"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 100), "cut short or no safetensors file"),
        (lambda f: (f / "model.safetensors").write_bytes((4).to_bytes(8, "little") + b"{{{{"), "is no JSON"),
        (lambda f: (f / "model.safetensors").write_bytes((4).to_bytes(8, "little") + b"[  ]"), "must be a JSON object"),
        (lambda f: rewrite(f, lambda h: h["a"].update(shape=[2, 4])), "'a' of shape .* cannot have 24 bytes"),
        (lambda f: rewrite(f, lambda h: h["a"].update(shape=[-2, -3])), "must be whole numbers"),
        (lambda f: rewrite(f, lambda h: h["a"].pop("shape")), "entry for 'a' has no dtype, shape and data_offsets"),
        (lambda f: rewrite(f, lambda h: h["a"].update(dtype="F4")), "'a' has the dtype F4; those"),
        (lambda f: (f / "model.safetensors").unlink(), "holds no weights: required is model.safetensors or"),
    ],
    ids=range(10),
)
def test_a_damaged_file_is_refused(folder: Path, spoil: Callable[[Path], object], message: str) -> None:
    spoil(folder)
    with pytest.raises(WeightError, match=message):
        TensorFiles(folder)


def test_a_link_to_nowhere_is_no_absent_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to("gone")
    with pytest.raises(WeightError, match=r"model\.safetensors is a link to gone, which is not there"):
        TensorFiles(tmp_path)
