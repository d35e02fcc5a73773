"""The safetensors files of a checkpoint folder: which tensors they hold, and where.

    files = TensorFiles("checkpoint/")     reads the headers only
    files.entries["model.norm.weight"]     Entry: file, dtype, shape, where its bytes start

A file is 8 bytes with the header's length, the header (JSON) and the tensors' bytes, without gaps and row-major
(https://github.com/huggingface/safetensors#format). What a header says is checked before it is believed.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from partitioner.errors import WeightError
from runtime.weights.quantized.packed import Packed

__all__ = ["INDEX", "SINGLE", "Entry", "TensorFiles"]

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
_LONGEST_HEADER = 100_000_000
"""As in safetensors itself."""
_MOST_DIMS, _LONGEST_NAME, _LONGEST_FILE_NAME = 16, 1000, 255


@dataclass(frozen=True)
class Entry:
    """One tensor: its bytes are those of `file` from `start` on."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class TensorFiles:
    """See the module's docstring."""

    def __init__(self, folder: str | Path, files: Sequence[str] | None = None) -> None:
        """`files`: only these of the folder, which must be no links; None: those that make up a checkpoint."""
        self.folder = Path(folder)
        self.entries: dict[str, Entry] = {}
        self.packed: Mapping[str, Packed] = {}
        """The tensors that several entries hold together, by names that need not be those of entries."""
        self._seen: dict[Path, tuple[int, tuple[int, ...]]] = {}
        """How to open a file, and what tells it from another that has come in its place."""
        self.is_checkpoint = files is None
        # a checkpoint's may be links, as in the hub's cache; a named pipe must not make us wait
        self._flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if self.is_checkpoint else os.O_NOFOLLOW)
        if files is not None:
            for name in files:
                self._add(self.folder / name)
            return
        single, index = self.folder / SINGLE, self.folder / INDEX
        if single.is_file():  # before the index, as in transformers
            self._add(single)
        elif index.is_file():
            self._add_indexed(index)
        else:
            for file in (single, index):
                if file.is_symlink():
                    raise WeightError(f"{file} is a link to {os.readlink(file)}, which is not there")
            raise WeightError(f"{self.folder} holds no weights: required is {SINGLE} or {INDEX}")

    def joined(self, others: TensorFiles) -> TensorFiles:
        """These and others, together."""
        found = TensorFiles(others.folder, ())
        found.entries = {**others.entries, **self.entries}
        found.packed = {**others.packed, **self.packed}
        found._seen = {**others._seen, **self._seen}
        if len(found.entries) != len(self.entries) + len(others.entries):
            twice = next(name for name in self.entries if name in others.entries)
            raise WeightError(f"{self.entries[twice].file} and {others.entries[twice].file} both hold {twice!r}")
        return found

    def shape(self, name: str) -> tuple[int, ...]:
        """That of a tensor, an entry or one that several hold."""
        return self.packed[name].shape if name in self.packed else self.entries[name].shape

    def open(self, file: Path) -> int:
        """A descriptor to read `file` by. Raises WeightError where it is another than the one whose header was read."""
        try:
            descriptor = os.open(file, self._seen[file][0])
        except OSError as error:
            raise WeightError(f"{file} could be read before, and cannot any more: {error.strerror}") from error
        if _stamp(descriptor) != self._seen[file][1]:
            os.close(descriptor)
            raise WeightError(
                f"{file} was written anew after it was opened: what is known of its tensors may be wrong now; "
                "open the folder again"
            )
        return descriptor

    def _add_indexed(self, index: Path) -> None:
        listed = _json(index, index.read_bytes())
        places = listed.get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
            raise WeightError(f"{index} must have a 'weight_map' from the names of tensors to those of files")
        for name in (*places, *places.values()):
            if len(name) > _LONGEST_NAME or "\0" in name:
                raise WeightError(
                    f"{index} has the name {name[:100]!r}, which no file has: it is too long, or holds a zero byte"
                )
        for name in dict.fromkeys(places.values()):
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or "\\" in name or not name.endswith(".safetensors"):
                raise WeightError(f"{index} names the file {name!r}: required is a .safetensors file within the folder")
            if len(path.name) > _LONGEST_FILE_NAME or not (self.folder / name).is_file():
                some = next(tensor for tensor, file in places.items() if file == name)
                raise WeightError(
                    f"{self.folder} lacks the file {name!r}, which should hold {some!r}, says {index.name}"
                )
            self._add(self.folder / name)
        for tensor, name in places.items():
            if tensor not in self.entries or self.entries[tensor].file != self.folder / name:
                raise WeightError(f"{self.folder / name} does not hold {tensor!r}, although {index.name} says so")

    def _add(self, file: Path) -> None:
        try:
            descriptor = os.open(file, self._flags)
        except OSError as error:
            raise WeightError(f"cannot open {file}: {error.strerror}") from None
        entries, stamp = _entries(file, descriptor)
        self._seen[file] = self._flags, stamp
        for entry in entries:
            if entry.name in self.entries:
                raise WeightError(f"{entry.name!r} is in two files: {self.entries[entry.name].file} and {file}")
            self.entries[entry.name] = entry


def _stamp(descriptor: int) -> tuple[int, ...]:
    found = os.fstat(descriptor)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _entries(file: Path, descriptor: int) -> tuple[list[Entry], tuple[int, ...]]:
    with os.fdopen(descriptor, "rb") as opened:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise WeightError(f"{file} is no plain file")
        stamp = _stamp(opened.fileno())
        size = os.fstat(opened.fileno()).st_size
        length = int.from_bytes(opened.read(8), "little")
        if size < 8 or length > min(size - 8, _LONGEST_HEADER):
            raise WeightError(f"{file} is cut short or no safetensors file: {size} bytes cannot hold its header")
        header = _json(file, opened.read(length))
    header.pop("__metadata__", None)
    base = 8 + length
    entries = [_entry(file, base, size, name, fields) for name, fields in header.items()]
    _require_adjoining(file, entries, base, size)
    return entries, stamp


def _require_adjoining(file: Path, entries: Sequence[Entry], base: int, size: int) -> None:
    """Each byte after the header is one tensor's: none is shared, and nothing is hidden between them."""
    at = base
    for entry in sorted(entries, key=lambda entry: (entry.start, entry.bytes)):
        if entry.start != at:
            how = "shares bytes with the tensor before it" if entry.start < at else "follows a gap"
            raise WeightError(
                f"{file} is damaged: {entry.name!r} {how}, it starts at byte {entry.start}, required is {at}"
            )
        at += entry.bytes
    if at != size:
        raise WeightError(f"{file} is damaged: its tensors end at byte {at}, the file at {size}")


def _entry(file: Path, base: int, size: int, name: str, fields: Any) -> Entry:
    if len(name) > _LONGEST_NAME:
        raise WeightError(f"{file}: the name {name[:100]!r}... has {len(name)} characters, more than {_LONGEST_NAME}")
    if isinstance(fields, dict) and isinstance(fields.get("shape"), list) and len(fields["shape"]) > _MOST_DIMS:
        raise WeightError(f"{file}: {name!r} has {len(fields['shape'])} dims, more than {_MOST_DIMS}")
    try:
        kind, shape, (start, stop) = fields["dtype"], tuple(fields["shape"]), fields["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise WeightError(f"{file}: the header's entry for {name!r} has no dtype, shape and data_offsets") from error
    # larger ones would be printed in errors, which Python refuses beyond some thousand digits
    if not all(type(number) is int and 0 <= number < 2**63 for number in (*shape, start, stop)):
        raise WeightError(
            f"{file}: the shape and the offsets of {name!r} must be whole numbers, got {str(fields)[:200]}"
        )
    if not isinstance(kind, str) or kind not in _DTYPES:
        raise WeightError(
            f"{file}: {name!r} has the dtype {str(kind)[:100]}; those that can be loaded are {', '.join(_DTYPES)}"
        )
    entry = Entry(name, file, _DTYPES[kind], shape, base + start)
    if stop - start != entry.bytes:
        raise WeightError(f"{file}: {name!r} of shape {list(shape)} and dtype {kind} cannot have {stop - start} bytes")
    if base + stop > size:
        raise WeightError(f"{file} is cut short: {name!r} ends at byte {base + stop}, the file at {size}")
    return entry


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice in one object")
    return found


def _json(file: Path, text: bytes) -> dict[str, Any]:
    try:
        found = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise WeightError(f"{file} is damaged: its header is no JSON ({error})") from error
    if not isinstance(found, Mapping):
        raise WeightError(f"{file} is damaged: its header must be a JSON object")
    return dict(found)
