"""Files at random, from a seed: a bundle or a checkpoint is read within a deadline, or refused by an error of ours.

Only reading is looked at here, with all that is checked then; what a forged bundle computes is the business of
`tests/partitioner/storage/bundle/test_fuzz.py`.
"""

import json
import random
import re
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import partitioner
from partitioner import PartitionerError
from runtime.weights.read_shards import Reader
from runtime.weights.safetensors_files import INDEX, TensorFiles
from tests.support.bundle_forger import Forger, save_tiny, showable_errors

DEADLINE_S = 5.0
QUICK, ALL = 60, 2000
DEEP = ["[" * 5000, '{"a":' * 5000, "[" * 30 + "]" * 30]
NUMBERS = [
    "0",
    "-1",
    "1",
    "2",
    "3",
    "17",
    str(2**31),
    str(2**40),
    str(2**62),
    str(2**63),
    "-0",
    "1.5",
    "1e9",
    "true",
    "null",
]


def mutate(content: bytes, draw: random.Random) -> bytes:
    """Damaged bytes, or JSON that is still mostly JSON."""
    kind = draw.randrange(8)
    pattern = [rb'"[^"\n]*"', rb"-?\d+", rb"\[[^\[\]\n]*\]", rb"[^\n]+\n", rb"\{[^{}\n]*\}"][kind % 5]
    places = list(re.finditer(pattern, content))
    if kind < 5 and len(places) > 1:
        one, other = draw.sample(places, 2)
        new = draw.choice(NUMBERS).encode() if kind == 1 else other.group()
        return content[: one.start()] + new + content[one.end() :]
    if kind == 5 and places:
        one = draw.choice(places)
        long = draw.choice([b'"' + b"x" * 100_000 + b'"', b"9" * 10_000, *(text.encode() for text in DEEP)])
        return content[: one.start()] + long + content[one.end() :]
    if kind == 6 and (lists := list(re.finditer(rb"\[[^\[\]\n]*\]", content))):
        one = draw.choice(lists)  # a list as long as it likes
        inner = one.group()[1:-1] or b"1"
        return (
            content[: one.start()]
            + b"["
            + b",".join([inner] * draw.choice([2, 17, 1000]))
            + b"]"
            + content[one.end() :]
        )
    changed = bytearray(content or b"x")
    for _ in range(draw.choice([1, 1, 2, 8])):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed[: draw.randrange(len(changed))] if draw.random() < 0.2 else changed)


def within_deadline(use: Callable[[], object]) -> tuple[str, float]:
    def late(*_: Any) -> None:
        raise AssertionError(f"not done after {DEADLINE_S} s")

    # of this process: on a busy machine it may wait for a processor as long
    before = signal.signal(signal.SIGPROF, late), signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_PROF, DEADLINE_S)
    signal.setitimer(signal.ITIMER_REAL, 12 * DEADLINE_S)
    started = time.process_time()
    refused: PartitionerError | None = None
    try:
        with showable_errors():
            use()
    except PartitionerError as error:
        refused = error
    finally:
        for timer in (signal.ITIMER_PROF, signal.ITIMER_REAL):
            signal.setitimer(timer, 0)
        for number, handler in zip((signal.SIGPROF, signal.SIGALRM), before, strict=True):
            signal.signal(number, handler)
    return "read" if refused is None else type(refused).__name__, time.process_time() - started


def run(seeds: range, one: Callable[[random.Random], tuple[str, float]]) -> Counter[str]:
    found: Counter[str] = Counter()
    longest = 0.0
    for seed in seeds:
        try:
            kind, seconds = one(random.Random(seed))
        except Exception as error:
            error.add_note(f"seed {seed}")
            raise
        found[kind] += 1
        longest = max(longest, seconds)
    print(f"{dict(found)}, the longest took {longest:.2f} s")
    return found


# -- bundles -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("valid") / "bundle"
    save_tiny(folder)
    return folder


def bundles(valid: Path, tmp_path: Path, seeds: range) -> Counter[str]:
    names = [path.relative_to(valid) for path in sorted(valid.rglob("*")) if path.is_file()]

    def one(draw: random.Random) -> tuple[str, float]:
        folder = Path(shutil.copytree(valid, tmp_path / "bundle"))
        try:
            path = folder / draw.choice(names)
            content, forger = path.read_bytes(), Forger(folder)
            if draw.random() < 0.2 or path.suffix == ".sha256":
                path.write_bytes(mutate(content, draw))  # and the digests as they were
            elif path.suffix == ".safetensors":
                path.write_bytes(with_header(content, draw))
                forger.rehash()
            elif path.name == "manifest.json":
                forger.write_manifest(mutate(content, draw))
            else:
                path.write_bytes(mutate(content, draw))
                forger.rehash()
            return within_deadline(lambda: partitioner.load(folder).verify())
        finally:
            shutil.rmtree(folder)

    return run(seeds, one)


def with_header(content: bytes, draw: random.Random) -> bytes:
    length = int.from_bytes(content[:8], "little")
    header = mutate(content[8 : 8 + length], draw)
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


def test_some_bundles(valid: Path, tmp_path: Path) -> None:
    assert bundles(valid, tmp_path, range(QUICK))["BundleError"] > QUICK // 2


@pytest.mark.slow
def test_many_bundles(valid: Path, tmp_path: Path) -> None:
    assert bundles(valid, tmp_path, range(QUICK, ALL))["BundleError"] > ALL // 2


# -- checkpoints -------------------------------------------------------------------------------------------------------


def checkpoints(tmp_path: Path, seeds: range) -> Counter[str]:
    tensors = {f"layer.{i}.weight": torch.full((i + 1, 3), float(i)) for i in range(6)}
    valid = tmp_path / "valid"
    valid.mkdir()
    names = list(tensors)
    for part in (0, 1):
        save_file({name: tensors[name] for name in names[part::2]}, valid / f"part-{part}.safetensors")
    places = {name: f"part-{index % 2}.safetensors" for index, name in enumerate(names)}
    (valid / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))

    def one(draw: random.Random) -> tuple[str, float]:
        folder = Path(shutil.copytree(valid, tmp_path / "checkpoint"))
        try:
            path = draw.choice(sorted(folder.iterdir()))
            content = path.read_bytes()
            spoil = mutate if path.suffix == ".json" or draw.random() < 0.2 else with_header
            path.write_bytes(spoil(content, draw))
            return within_deadline(lambda: Reader(TensorFiles(folder)))
        finally:
            shutil.rmtree(folder)

    return run(seeds, one)


def test_some_checkpoints(tmp_path: Path) -> None:
    assert checkpoints(tmp_path, range(QUICK))["WeightError"] > QUICK // 2


@pytest.mark.slow
def test_many_checkpoints(tmp_path: Path) -> None:
    assert checkpoints(tmp_path, range(QUICK, ALL))["WeightError"] > ALL // 2
