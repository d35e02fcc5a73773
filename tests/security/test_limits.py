"""What could take time or room without bound ends within a deadline, and says why."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

from partitioner.cli.app import app
from partitioner.errors import InputError, WeightError
from partitioner.serving.text import chat_template
from partitioner.serving.text.chat_template import TemplateFailed, render
from partitioner.storage.bundle.format.tiling import MOST_BLOCKS, is_filled
from partitioner.storage.example import EXAMPLE_MODEL
from runtime.processes import capacity, launch
from runtime.program.shards import Block
from runtime.weights.safetensors_files import TensorFiles

DEADLINE_S = 5


@pytest.fixture(autouse=True)
def _deadline() -> Iterator[None]:
    def late(*_: Any) -> None:
        raise AssertionError(f"not done after {DEADLINE_S} s")

    # of this process: on a busy machine it may wait for a processor as long
    before = signal.signal(signal.SIGPROF, late), signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_PROF, DEADLINE_S)
    signal.setitimer(signal.ITIMER_REAL, 12 * DEADLINE_S)
    yield
    for timer in (signal.ITIMER_PROF, signal.ITIMER_REAL):
        signal.setitimer(timer, 0)
    for number, handler in zip((signal.SIGPROF, signal.SIGALRM), before, strict=True):
        signal.signal(number, handler)


# -- blocks ------------------------------------------------------------------------------------------------------------


def staggered(num_dims: int, num_blocks: int) -> list[Block]:
    """Overlapping in every dim at other places: what cutting at every end makes exponentially many of."""
    draw = random.Random(0)
    return [
        tuple((start := draw.randrange(40), start + 1 + draw.randrange(60))[:2] for _ in range(num_dims))
        for _ in range(num_blocks)
    ]


@pytest.mark.parametrize(("num_dims", "num_blocks"), [(12, 66), (16, 500), (2, 2000), (16, 2000)])
def test_blocks_that_overlap_everywhere(num_dims: int, num_blocks: int) -> None:
    assert not is_filled([100] * num_dims, staggered(num_dims, num_blocks))


def cut_in_turn(num_dims: int, pieces: int) -> list[Block]:
    """A slab of the last dim for each other dim, cut along that one: cells of all ends are pieces ** (num_dims - 1)."""
    blocks: list[Block] = []
    for dim in range(num_dims - 1):
        for piece in range(pieces):
            bounds = [(0, pieces)] * (num_dims - 1) + [(dim, dim + 1)]
            bounds[dim] = (piece, piece + 1)
            blocks.append(tuple(bounds))
    return blocks


@pytest.mark.parametrize(("num_dims", "pieces"), [(12, 6), (16, 100)])
def test_blocks_that_fill_and_overlap_in_every_dim(num_dims: int, pieces: int) -> None:
    shape, blocks = [*[pieces] * (num_dims - 1), num_dims - 1], cut_in_turn(num_dims, pieces)
    assert is_filled(shape, blocks)
    assert not is_filled(shape, [*blocks[:-1], blocks[-2]])


def test_many_blocks_whose_volumes_are_right() -> None:
    """The pairs have to be looked at, and only the last two meet."""
    rows = [((row, row + 1), (0, 1000)) for row in range(4000)]
    assert is_filled((4000, 1000), rows)
    assert not is_filled((4000, 1000), [*rows[:-1], ((3998, 3999), (0, 1000))])
    assert not is_filled((MOST_BLOCKS + 1,), [((at, at + 1),) for at in range(MOST_BLOCKS + 1)])


def test_it_says_what_counting_says() -> None:
    draw = random.Random(1)
    filled = 0
    for _ in range(300):
        shape = [draw.randrange(1, 5) for _ in range(draw.randrange(1, 4))]
        ends = [sorted({0, size, *(draw.randrange(size + 1) for _ in range(draw.randrange(2)))}) for size in shape]
        blocks: list[Block] = list(itertools.product(*([*itertools.pairwise(each)] for each in ends)))
        if blocks and draw.random() < 0.5:
            blocks[draw.randrange(len(blocks))] = draw.choice(blocks)
        cells = [cell for block in blocks for cell in itertools.product(*(range(a, b) for a, b in block))]
        expected = sorted(cells) == sorted(itertools.product(*map(range, shape)))
        assert is_filled(shape, blocks) == expected, (shape, blocks)
        filled += expected
    assert 50 < filled < 290


# -- headers of tensors ------------------------------------------------------------------------------------------------


def header(folder: Path, fields: object, *, size: int = 64) -> Path:
    text = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))
    return folder


def entry(start: int, stop: int, **other: Any) -> dict[str, Any]:
    return {"dtype": "U8", "shape": [stop - start], "data_offsets": [start, stop], **other}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"a": entry(0, 64, shape=[2] * 250_000)}, "'a' has 250000 dims, more than 16"),
        ({"a": entry(0, 64, shape=[2**62] * 250_000)}, "'a' has 250000 dims, more than 16"),
        ({"a": entry(0, 64, shape=[1] * 17)}, "'a' has 17 dims, more than 16"),
        ({"a": entry(0, 40), "b": entry(32, 64)}, "'b' shares bytes with the tensor before it"),
        ({"a": entry(0, 64), "b": entry(0, 64)}, "shares bytes with the tensor before it"),
        ({"a": entry(0, 64), "b": entry(8, 16)}, "'b' shares bytes with the tensor before it"),
        ({"a": entry(0, 30), "b": entry(32, 64)}, "'b' follows a gap"),
        ({"a": entry(8, 64)}, "'a' follows a gap"),
        ({"a": entry(0, 60)}, "its tensors end at byte"),
        ({}, "its tensors end at byte"),
        ({"a" * 1_000_000: entry(0, 64)}, "has 1000000 characters, more than 1000"),
        ({"a": entry(0, 64, shape=[64.0])}, "must be whole numbers"),
        ({"a": entry(0, 64, shape=["64"])}, "must be whole numbers"),
        ({"a": entry(0, 1, shape=[True])}, "must be whole numbers"),
        ({"a": entry(0, 64, shape=[None])}, "must be whole numbers"),
        ({"a": entry(0, 64, shape=[[64]])}, "must be whole numbers"),
        ({"a": entry(0, 64, shape="64")}, "must be whole numbers"),
        (b'{"a":{"dtype":"U8","shape":[64],"data_offsets":[0,64]},"a":{}}', "a name stands twice"),
        (b"[" * 1_000_000, "is no JSON"),
    ],
    ids=range(19),
)
def test_a_header_is_refused_in_a_line(fields: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(WeightError, match=message) as caught:
        TensorFiles(header(tmp_path, fields))
    assert len(str(caught.value)) < 1000
    assert "\n" not in str(caught.value)


def test_a_right_header_is_read(tmp_path: Path) -> None:
    both = {"b": entry(24, 64), "a": entry(0, 24), "none": entry(24, 24), "deep": entry(64, 64, shape=[0] * 16)}
    assert set(TensorFiles(header(tmp_path, both)).entries) == set(both)


# -- processes ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def none_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*_: Any, **__: Any) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(launch.subprocess, "Popen", start)


@pytest.mark.usefixtures("none_started")
@pytest.mark.parametrize("command", [["run", "--prompt", "a"], ["verify", str(EXAMPLE_MODEL)]])
def test_more_ranks_than_there_is_room_for_are_refused(command: list[str]) -> None:
    done = CliRunner().invoke(app, [*command, "--tp", "10000"])
    assert done.exit_code == 2, done.output
    assert "10000 ranks are too many for this machine" in " ".join(done.output.split())


def test_ranks_are_bounded_by_cores_and_by_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = len(os.sched_getaffinity(0))
    monkeypatch.setattr(capacity, "_free_bytes", lambda: 2**50)
    capacity.require_capacity(cores * capacity.RANKS_PER_CORE)
    with pytest.raises(InputError, match="at most 16 ranks are started per core"):
        capacity.require_capacity(cores * capacity.RANKS_PER_CORE + 1)
    monkeypatch.setattr(capacity, "_free_bytes", lambda: 3 * capacity.RANK_BYTES)
    capacity.require_capacity(3)
    with pytest.raises(InputError, match="4 ranks are too many for this machine: each takes at least 200 MB"):
        capacity.require_capacity(4)
    monkeypatch.setattr(capacity, "_free_bytes", lambda: None)
    capacity.require_capacity(4)


def test_the_kernel_ends_a_rank_with_its_launcher(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    """Also one that is stopped, and one whose Python runs nothing."""
    (tmp_path / "stuck.py").write_text(
        "import os, pathlib, signal, sys\npathlib.Path(sys.argv[1]).write_text(str(os.getpid()))\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals) - {signal.SIGKILL})\n"
        "import ctypes; ctypes.PyDLL(None).sleep(60)\n"  # with the interpreter's lock
    )
    code = (
        "import subprocess, sys, os, time\n"
        f"subprocess.Popen([sys.executable, '-P', '-m', 'runtime.processes.worker', str(os.getpid()), 'stuck', "
        f"{str(tmp_path / 'pid')!r}])\ntime.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{pytestconfig.rootpath}:{tmp_path}"}
    launcher = subprocess.Popen([sys.executable, "-P", "-c", code], env=environment)
    try:
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            time.sleep(0.01)
        time.sleep(0.2)
    finally:
        launcher.kill()
        launcher.wait()
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 5
    while Path(f"/proc/{pid}/stat").exists() and " Z " not in Path(f"/proc/{pid}/stat").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# -- chat templates ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(EXAMPLE_MODEL)


LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}"
LOOPS += "{% endfor %}{% endfor %}"
MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (LOOPS, "did not end within 0.5 s"),
        ("{{ 9**(9**(9**9)) }}", "did not end within 0.5 s|ValueError|MemoryError"),
        ("{{ 'a' * 10**10 }}", "MemoryError|too much memory"),
        ("{{ (range(99999)|list) * 99999 }}", "MemoryError|too much memory"),
        ("{{ 'a' * 99999999 }}", "answered with more than 64 MB|did not end within 4 s"),
        ("{{ raise_exception('not so') }}", "TemplateError: not so"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{% for", "TemplateSyntaxError"),
    ],
)
def test_a_template_has_limits(template: str, message: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", template)
    with pytest.raises(TemplateFailed, match=message):
        render(tokenizer, MESSAGES, timeout_s=0.5 if "0.5" in message else 4)


def test_a_template_is_put_in(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\u00e9\n{% endfor %}{{ add_generation_prompt }}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    expected = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert render(tokenizer, MESSAGES) == expected == "<user>hello\u00e9\nTrue"
    assert chat_template.LONGEST_S == DEADLINE_S
