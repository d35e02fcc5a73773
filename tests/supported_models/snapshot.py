"""What the compiler makes of many architectures, as one file per checkout, to see what a change has changed.

    python -m tests.supported_models.snapshot take OUT [names] [--plans tp=2 tp=3]     adds what OUT does not have yet
    python -m tests.supported_models.snapshot compare BEFORE AFTER                     exit code 1 where they differ

Of each architecture and plan: the reports, the printed graphs of all ranks and entries, the weights that each rank
holds, greedy tokens, and the logits of a whole text, bit by bit. Take both with one torch and one number of threads.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import sys
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from partitioner import Plan, partition
from partitioner.compile.parts import Parts
from partitioner.errors import PartitionerError
from tests.support import zoo

NEW_TOKENS = 8
TRACE_LENGTH = 7


def take(out: Path, names: list[str], plans: list[str]) -> None:
    """Adds a row per architecture and plan to `out`, JSON."""
    torch.set_num_threads(1)
    rows: dict[str, dict[str, Any]] = json.loads(out.read_text()) if out.exists() else {}
    for name in names or zoo.names():
        for plan in plans:
            key = f"{name} {plan}"
            if key not in rows:
                rows[key] = _row(name, Plan.parse(plan))
                out.write_text(json.dumps(rows))
                print(key, rows[key].get("error", "taken")[:120], flush=True)


def _row(name: str, plan: Plan) -> dict[str, Any]:
    torch.manual_seed(0)
    try:
        model, ids = zoo.tiny(name)
        parts = partition(model, plan)
        row = {"report": str(parts.report), "graphs": _graphs(parts, "text"), "weights": _weights(parts)}
        row["logits"] = _digest(parts.simulate(input_ids=ids))
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    try:
        row["tokens"] = parts.generate(ids[:2, :TRACE_LENGTH], max_new_tokens=NEW_TOKENS).tolist()
        row |= {entry: _graphs(parts, entry) for entry in ("prefill", "decode")}
        row["generation report"] = str(parts.generation_report)
    except (PartitionerError, NotImplementedError) as error:
        row["tokens"] = f"{type(error).__name__}: {error}"
    return row


def _graphs(parts: Parts, entry: Any) -> list[str]:
    return [parts.entry(entry, rank).graph_module.code for rank in range(parts.mesh.world_size)]


def _weights(parts: Parts) -> list[str]:
    held = [[(w.name, w.local_shape, w.indices) for w in parts.rank(r).weights] for r in range(parts.mesh.world_size)]
    return [hashlib.sha256(repr(of_rank).encode()).hexdigest() for of_rank in held]


def _digest(outputs: Any) -> str:
    tensors = outputs if isinstance(outputs, tuple) else (outputs,)
    return hashlib.sha256(b"".join(t.contiguous().numpy().tobytes() for t in tensors)).hexdigest()


def compare(before: dict[str, dict[str, Any]], after: dict[str, dict[str, Any]]) -> tuple[list[str], int]:
    """What differs, a line each, and how many rows both have. What only one of them has is a difference too."""
    lines = []
    by_field: dict[str, list[str]] = defaultdict(list)
    for key in sorted({*before, *after}):
        if key not in before or key not in after:
            lines.append(f"{key}: only in the {'second' if key in after else 'first'}")
            continue
        for field in sorted({*before[key], *after[key]}):
            if before[key].get(field) != after[key].get(field):
                by_field[field].append(key)
    lines += [f"{field} differ: {', '.join(keys)}" for field, keys in sorted(by_field.items())]
    return lines, len(before.keys() & after.keys())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    taking = actions.add_parser("take")
    taking.add_argument("out", type=Path)
    taking.add_argument("names", nargs="*")
    taking.add_argument("--plans", nargs="+", default=["tp=2", "tp=3"])
    comparing = actions.add_parser("compare")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    options = parser.parse_args()
    if options.action == "take":
        logging.disable(logging.WARNING)
        warnings.simplefilter("ignore")
        take(options.out, options.names, options.plans)
        return 0
    lines, both = compare(json.loads(options.before.read_text()), json.loads(options.after.read_text()))
    print(*lines, f"{both} rows in both, {len(lines)} differences", sep="\n")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
