"""partitioner: a model-parallelism compiler for inference on Hugging Face models.

    from partitioner import Plan, partition

    parts = partition(model, Plan(tp=2))
    print(parts.report)                        what was split, what was not and why
    parts.simulate(input_ids=input_ids)        all ranks in this process
    parts.rank(1).graph_module                 what rank 1 runs

Names are imported when first used, so that importing a leaf module (`partitioner.errors`, `partitioner.sharding.mesh`,
`partitioner.sharding.layout`) pulls in nothing else: `runtime` and `passes` import those without a circle.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import importlib
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from partitioner.compile.partition import partition
    from partitioner.compile.parts import Parts
    from partitioner.errors import (
        BundleError,
        CaptureError,
        CommunicationError,
        InputError,
        LayoutError,
        PartitionerError,
        PlanError,
        RankLost,
        RankMismatch,
        WeightError,
    )
    from partitioner.planning.cluster import Cluster
    from partitioner.planning.quantities import Workload
    from partitioner.planning.search import choose_plan
    from partitioner.program.plan import Plan
    from partitioner.serving.launch import launch
    from partitioner.storage.bundle.bundle import load
    from runtime.kv_cache.cache_size import CacheSize

__version__ = "0.1.0"

__all__ = [
    "BundleError",
    "CacheSize",
    "CaptureError",
    "Cluster",
    "CommunicationError",
    "InputError",
    "LayoutError",
    "PartitionerError",
    "Parts",
    "Plan",
    "PlanError",
    "RankLost",
    "RankMismatch",
    "WeightError",
    "Workload",
    "__version__",
    "choose_plan",
    "launch",
    "load",
    "partition",
]

_HOMES = {
    "BundleError": "partitioner.errors",
    "CacheSize": "runtime.kv_cache.cache_size",
    "CaptureError": "partitioner.errors",
    "Cluster": "partitioner.planning.cluster",
    "CommunicationError": "partitioner.errors",
    "InputError": "partitioner.errors",
    "LayoutError": "partitioner.errors",
    "PartitionerError": "partitioner.errors",
    "Parts": "partitioner.compile.parts",
    "Plan": "partitioner.program.plan",
    "PlanError": "partitioner.errors",
    "RankLost": "partitioner.errors",
    "RankMismatch": "partitioner.errors",
    "WeightError": "partitioner.errors",
    "Workload": "partitioner.planning.quantities",
    "choose_plan": "partitioner.planning.search",
    "launch": "partitioner.serving.launch",
    "load": "partitioner.storage.bundle.bundle",
    "partition": "partitioner.compile.partition",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'partitioner' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _check_companions() -> None:
    """Raise ImportError where `runtime` or `passes` is not the folder installed beside this one.

    Both are plain names: someone's own `runtime/` earlier on sys.path would be imported in place of ours, and fail
    later with an error that says nothing.
    """
    ours = Path(__file__).resolve().parent.parent
    for name in ("runtime", "passes"):
        spec = sys.modules[name].__spec__ if name in sys.modules else importlib.util.find_spec(name)
        origin = None if spec is None else spec.origin or next(iter(spec.submodule_search_locations or ()), None)
        wanted = ours / name / "__init__.py"
        if origin is None:
            raise ImportError(
                f"partitioner needs its package {name!r} at {wanted}, which is not on sys.path", name=name
            )
        if Path(origin).resolve() != wanted:
            raise ImportError(
                f"partitioner needs its own package {name!r}, but another one of that name comes first on sys.path:\n"
                f"  found:    {origin}\n"
                f"  required: {wanted}\n"
                f"Rename yours, or start Python elsewhere (python -P keeps the working folder off sys.path).",
                name=name,
                path=origin,
            )


def _check_contents(ours: Path) -> None:
    """Raise ImportError where a file of `runtime` or `passes` is not the one that was installed.

    The names are plain, so another distribution may have them too: installed after this one its files overwrite ours,
    and uninstalled it takes them away, both without a word. A wheel's RECORD has the digest of each. A working copy has
    none, and is not checked.
    """
    for record in ours.glob("partitioner-*.dist-info/RECORD"):
        for name, digest in _recorded(record):
            path = ours / name
            content = path.read_bytes() if path.is_file() else None
            if content is not None and hashlib.sha256(content).digest() == digest:
                continue
            others = {
                other.parent.name.partition("-")[0]
                for other in ours.glob("*.dist-info/RECORD")
                if other != record and any(name == theirs for theirs, _ in _recorded(other))
            }
            by = f" by {', '.join(sorted(others))}, which brings a file of that name" if others else ""
            raise ImportError(
                f"{path} is not the file that was installed with partitioner: it was "
                f"{'removed' if content is None else 'overwritten'}{by}.\n"
                "Uninstall what brought it, and install partitioner again (pip install --force-reinstall --no-deps).",
                name=name.partition("/")[0],
                path=str(path),
            )


def _recorded(record: Path) -> list[tuple[str, bytes]]:
    """The modules of `runtime` and `passes` in a RECORD, and their digests."""
    found = []
    for row in csv.reader(record.read_text(encoding="utf-8").splitlines()):
        if len(row) == 3 and row[0].startswith(("runtime/", "passes/")) and row[1].startswith("sha256="):
            found.append((row[0], base64.urlsafe_b64decode(row[1].removeprefix("sha256=") + "=")))
    return found


_check_companions()
_check_contents(Path(__file__).resolve().parent.parent)
