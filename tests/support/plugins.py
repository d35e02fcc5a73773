"""Packages made up for a test and installed on sys.path, and a real one installed as a third party would."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "plugin"


def fake(site: Path, distribution: str, module: str, source: str | None, entries: dict[str, str]) -> None:
    """A distribution of one module, as installers leave it; `entries`: name of a pass -> what of the module it is."""
    if source is not None:
        (site / f"{module}.py").write_text(textwrap.dedent(source))
    info = site / f"{distribution.replace('-', '_')}-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n")
    lines = [f"{name} = {module}{f':{what}' if what else ''}" for name, what in entries.items()]
    (info / "entry_points.txt").write_text("\n".join(["[partitioner.passes]", *lines, ""]))


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
