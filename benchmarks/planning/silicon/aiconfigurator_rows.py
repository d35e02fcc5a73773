"""What AIConfigurator itself predicts for the rows that `silicon` is held to; and the same tables for it.

    python -m venv other && other/bin/pip install aiconfigurator==0.12.0     in an environment of its own
    other/bin/python benchmarks/planning/silicon/aiconfigurator_rows.py FOLDER ESTIMATES.json [MODEL]
    python -m benchmarks.planning.silicon FOLDER --others ESTIMATES.json

FOLDER: an unpacked wheel of aiconfigurator-core. The first call needs nothing of this repository: it asks
`cli_estimate` for each aggregated row on H100 and H200, with the tables of the engine's newest version, and keeps its
times, or its error; MODEL: only of paths with this text in them. No GPU is needed; a row takes about a second of one
core. What is in ESTIMATES.json already is not asked again.
"""

from __future__ import annotations

import csv
import json
import logging
import sys
from collections import Counter
from pathlib import Path
from typing import Any

SAME_SHAPES = {
    "meta-llama/Llama-3.1-8B-Instruct": "meta-llama/Meta-Llama-3.1-8B",
    "nvidia/Llama-3.1-8B-Instruct-FP8": "meta-llama/Meta-Llama-3.1-8B",
    "meta-llama/Llama-3.1-70B": "meta-llama/Meta-Llama-3.1-70B",
}
"""Models whose configuration it would download, by the one that it has."""


def estimate(row: dict[str, str]) -> dict[str, Any]:
    """Seconds of ttft and tpot, or the error."""
    from aiconfigurator.cli.api import cli_estimate  # type: ignore[import-not-found]

    degrees = {name: int(row[name] or 1) for name in ("tp_size", "pp_size", "attention_dp_size")}
    degrees |= {name: int(row[name]) for name in ("moe_tp_size", "moe_ep_size") if row[name]}
    kinds = {name: row[name] for name in ("gemm_quant_mode", "moe_quant_mode") if row[name]}
    sizes = {"isl": int(row["isl"]), "osl": int(row["osl"]), "batch_size": int(row["batch_size"])}
    try:
        name = SAME_SHAPES.get(row["model_path"], row["model_path"])
        found = cli_estimate(name, row["system"], backend_name=row["backend"], **degrees, **sizes, **kinds)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:200]}
    return {"ttft": float(found.ttft) * 1e-3, "tpot": float(found.tpot) * 1e-3}


def main() -> None:
    folder, out = map(Path, sys.argv[1:3])
    only = sys.argv[3] if len(sys.argv) > 3 else ""
    logging.disable(logging.WARNING)
    rows = list(csv.DictReader(next(folder.rglob("silicon_sample.csv")).open(encoding="utf-8")))
    asked = [row for row in rows if row["system"][:4] in ("h100", "h200") and row["mode"] == "agg"]
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {}
    asked = [row for row in asked if only in row["model_path"] and row["id"] not in found]
    for number, row in enumerate(asked, start=1):
        found[row["id"]] = estimate(row)
        if number % 20 == 0 or number == len(asked):
            out.write_text(json.dumps(found), encoding="utf-8")
            print(f"{number} of {len(asked)}", file=sys.stderr, flush=True)
    errors = Counter(each["error"].partition(":")[0] for each in found.values() if "error" in each)
    print(f"{len(found) - errors.total()} of {len(found)} rows estimated; errors: {dict(errors)}")


if __name__ == "__main__":
    main()
