"""docs/extending/writing_a_pass.md as typed, and its plugin installed and used as a third party would."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.plugins import EXAMPLE, ROOT

DOC = ROOT / "docs" / "extending" / "writing_a_pass.md"
BLOCK = re.compile(r"(?P<before>[^\n]*)\n\n```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"`([\w/]+\.(?:py|toml))`:$")


def blocks() -> list[tuple[str, str, str]]:
    """Language, the file that it is said to be of ("" for one to be typed), text."""
    text = DOC.read_text(encoding="utf-8")
    found = [
        (match["language"], named[1] if (named := FILE.search(match["before"])) else "", match["text"])
        for match in BLOCK.finditer(text)
    ]
    assert len(found) == text.count("```") // 2, "a block that the test does not see"
    return found


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process that has the plugin, by the command in the doc."""
    folder = tmp_path_factory.mktemp("plugin")
    shutil.copytree(EXAMPLE, folder / "examples" / "plugin")  # building writes beside the sources
    (command,) = [text for language, _, text in blocks() if not language]
    program, *arguments = shlex.split(command)
    assert program == ".venv/bin/pip"
    environment = {**os.environ, "PIP_TARGET": str(folder / "site"), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pip", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(folder / "site")]), "HF_HUB_OFFLINE": "1"}


def run(environment: dict[str, str], *arguments: str, cwd: Path = ROOT) -> str:
    done = subprocess.run(
        [sys.executable, "-P", *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_what_the_doc_shows_of_a_file_is_in_it() -> None:
    shown = [(file, text) for _, file, text in blocks() if file]
    assert len(shown) >= 6
    for file, text in shown:
        assert text in (EXAMPLE / file).read_text(encoding="utf-8"), f"{file} has no such lines:\n{text}"


@pytest.mark.slow  # pip builds a package; tests/partitioner/storage/bundle/test_plugins.py uses what it would install
def test_what_the_doc_says_to_type_runs(installed: dict[str, str], tmp_path: Path) -> None:
    typed = "\n".join(text for language, file, text in blocks() if language == "python" and not file)
    said = run(installed, "-c", typed, cwd=tmp_path)
    assert "mlp.down_proj.weight_codes" in said
    assert "Plan(tp=2, passes=[int8-weights(weights=('*.mlp',))])" in said
    assert "torch.Size([1, 3, " in said


@pytest.mark.slow
def test_the_tests_of_the_plugin(installed: dict[str, str]) -> None:
    """In float64, at 1, 2 and 3 ranks, against the model with rounded weights, which differs from the model itself."""
    said = run(installed, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(EXAMPLE / "tests"))
    assert re.search(r"\b1[0-9] passed", said), said
