"""Damage at random, from a seed: a bundle is refused, or does what it did.

damaged   bits flipped, bytes lost, of any file: PartitionerError, or the same result bit by bit
forged    the same and worse, hashes made right again: PartitionerError, or another program that runs
"""

from __future__ import annotations

import json
import random
import re
import resource
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from partitioner import PartitionerError
from tests.support.bundle_forger import Forger, use

pytestmark = pytest.mark.usefixtures("canary")
QUICK, ALL = 30, 1000
SECONDS = 100
"""For one case: longer than ranks wait for each other."""
SPARE_BYTES = 4 << 30
NUMBERS = ["0", "-1", "1", "2", "3", "7", "128", str(2**40), str(2**62), str(2**63 - 1), str(-(2**63)), "1.5", "true"]


@pytest.fixture(autouse=True)
def bounded() -> Iterator[None]:
    """A program may ask for all memory there is: here it gets little."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + SPARE_BYTES, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def attempt(folder: Path) -> tuple[Tensor, Tensor] | PartitionerError:
    """What comes of using it: anything but a result and a PartitionerError is an error of the test."""

    def late(*_: Any) -> None:
        raise AssertionError(f"not done after {SECONDS} s")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        return use(folder)
    except PartitionerError as error:
        return error
    finally:
        signal.alarm(0)


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def damage(content: bytes, draw: random.Random) -> bytes:
    if draw.random() < 0.3:
        return content[: draw.randrange(len(content))]
    changed = bytearray(content)
    for _ in range(draw.choice([1, 1, 1, 2, 8])):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def forge(content: bytes, draw: random.Random) -> bytes:
    """JSON that is still mostly JSON."""
    kind = draw.randrange(6)
    if kind == 0:
        return damage(content, draw)
    pattern = {1: rb'"[^"\n]*"', 2: rb"-?\d+", 3: rb"\[[^\[\]\n]*\]", 4: rb"[^\n]+\n", 5: rb"\{[^{}\n]*\}"}[kind]
    places = list(re.finditer(pattern, content))
    if len(places) < 2:
        return damage(content, draw)
    one, other = draw.sample(places, 2)
    if kind == 2:
        return content[: one.start()] + draw.choice(NUMBERS).encode() + content[one.end() :]
    return content[: one.start()] + other.group() + content[one.end() :]


def run(folder: Path, seeds: range, one: Callable[[random.Random], str]) -> Counter[str]:
    found: Counter[str] = Counter()
    for seed in seeds:
        try:
            found[one(random.Random(seed))] += 1
        except Exception as error:
            error.add_note(f"seed {seed}")
            raise
    return found


def damaged(valid: Path, tmp_path: Path, seeds: range) -> Counter[str]:
    expected = use(valid)

    def one(draw: random.Random) -> str:
        folder = Path(shutil.copytree(valid, tmp_path / "bundle"))
        path = draw.choice(files(folder))
        before = path.read_bytes()
        after = damage(before, draw)
        path.write_bytes(after)
        result = attempt(folder)
        shutil.rmtree(folder)
        if isinstance(result, PartitionerError):
            return type(result).__name__
        assert all(map(Tensor.equal, result, expected)), f"{path.name} is damaged, and the result another one"
        return "equal"

    return run(valid, seeds, one)


def forged(valid: Path, tmp_path: Path, seeds: range) -> Counter[str]:
    expected = use(valid)

    def one(draw: random.Random) -> str:
        folder = Path(shutil.copytree(valid, tmp_path / "bundle"))
        path = draw.choice([path for path in files(folder) if path.suffix != ".sha256"])
        forger = Forger(folder)
        content = path.read_bytes()
        if path.suffix == ".safetensors":
            length = int.from_bytes(content[:8], "little")
            forger.header(path.relative_to(folder).as_posix(), lambda header: forge(json.dumps(header).encode(), draw))
            assert length
        elif path.name == "manifest.json":
            forger.write_manifest(forge(content, draw))
        else:
            path.write_bytes(forge(content, draw))
            forger.rehash()
        result = attempt(folder)
        shutil.rmtree(folder)
        if isinstance(result, PartitionerError):
            return type(result).__name__
        return "equal" if all(map(Tensor.equal, result, expected)) else "another program"

    return run(valid, seeds, one)


def test_some_damage(valid: Path, tmp_path: Path) -> None:
    found = damaged(valid, tmp_path, range(QUICK))
    assert found["equal"] <= QUICK // 10, found


def test_some_forgeries(valid: Path, tmp_path: Path) -> None:
    found = forged(valid, tmp_path, range(QUICK))
    assert found["BundleError"] > QUICK // 4, found


@pytest.mark.slow
def test_much_damage(valid: Path, tmp_path: Path) -> None:
    found = damaged(valid, tmp_path, range(QUICK, ALL))
    print(found)
    assert found["equal"] <= ALL // 10, found


@pytest.mark.slow
def test_many_forgeries(valid: Path, tmp_path: Path) -> None:
    found = forged(valid, tmp_path, range(QUICK, ALL))
    print(found)
    assert found["BundleError"] > ALL // 4, found
