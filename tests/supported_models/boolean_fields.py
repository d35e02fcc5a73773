"""Flip every boolean field of every configuration of the zoo once, and compare what is captured with the model.

    python -m tests.supported_models.boolean_fields run [names]    adds what boolean_fields.jsonl lacks
    python -m tests.supported_models.boolean_fields write          boolean_fields.jsonl becomes the page beside it

Each architecture is built tiny in float64, once as it is and once per field. The model's own forward, with the
attention implementation that transformers gives it by default, is compared with the graph that is traced from it,
detours through float32 lifted on both sides, to 1e-10. What the graph becomes on several ranks is another table's
matter.

    equal        within 1e-10
    no effect    the model's own logits are the same, bit by bit, and so are its weights: not traced again
    refused      an error says why
    fails        transformers itself cannot build or run the model
    different    captured, and not equal: must never happen
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel

from partitioner.capture import capture
from partitioner.errors import PartitionerError
from partitioner.sharding.mesh import Mesh
from tests.support import reference, zoo
from tests.supported_models.capture_survey import difference
from tests.supported_models.survey import OutOfTime, TimeLimit, short
from tests.supported_models.table import read

LENGTH = 9
TOLERANCE = 1e-10
AS_IT_IS = "as it is"
"""Stands for a field where nothing is flipped."""
_OF_ALL = {field.name for field in dataclasses.fields(PreTrainedConfig)}
_OF_CALLS = {"use_cache", "output_router_logits"}
"""Fields that say what is returned beside the logits."""


def fields(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each boolean field of the configuration and of those within it, with what `zoo.tiny` is told to flip it."""
    cls = CONFIG_MAPPING[name.removeprefix("masked:")]
    for field in _boolean(cls):
        yield field.name, {field.name: not field.default}
    for part, sub in cls.sub_configs.items():
        if sub is not AutoConfig:
            for field in _boolean(sub):
                yield f"{part}.{field.name}", {part: {field.name: not field.default}}


def _boolean(cls: type[PreTrainedConfig]) -> list[Any]:
    known = _OF_ALL | _OF_CALLS
    return [field for field in dataclasses.fields(cls) if isinstance(field.default, bool) and field.name not in known]


def measure(name: str, field: str, overrides: dict[str, Any], plain: _Plain, *, minutes: float) -> dict[str, Any]:
    row: dict[str, Any] = {"name": name, "field": field}
    try:
        model, ids = zoo.tiny(name, **overrides)
        logits = _logits(model, ids)
    except Exception as error:
        return {**row, "verdict": "fails", "why": short(error)}
    if overrides and plain.is_like(model, logits):
        return {**row, "verdict": "no effect"}
    if not overrides:
        plain.set(model, logits)
    start = time.perf_counter()
    try:
        with TimeLimit(minutes):
            error = _difference(model, ids[:, :LENGTH])
    except (PartitionerError, OutOfTime) as refusal:
        return {**row, "verdict": "refused", "why": short(refusal)}
    except Exception as crash:
        return {**row, "verdict": "different", "why": short(crash)}
    verdict = "equal" if error <= TOLERANCE else "different"
    return {**row, "verdict": verdict, "error": error, "seconds": round(time.perf_counter() - start, 1)}


class _Plain:
    """The model as it is, to tell whether a field changes it."""

    def __init__(self) -> None:
        self._shapes: dict[str, Any] | None = None
        self._logits: Tensor | None = None

    def set(self, model: PreTrainedModel, logits: Tensor) -> None:
        self._shapes, self._logits = _shapes(model), logits

    def is_like(self, model: PreTrainedModel, logits: Tensor) -> bool:
        same = self._logits is not None and torch.equal(self._logits, logits)
        return same and self._shapes == _shapes(model)


def _shapes(model: PreTrainedModel) -> dict[str, Any]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    return reference.forward(model, exact=False, lifted=True, input_ids=ids[:, :LENGTH])


def _difference(model: PreTrainedModel, ids: Tensor) -> float:
    try:
        program = capture(model, mesh=Mesh.of())
    except PartitionerError:  # not for all lengths at once
        program = capture(model, mesh=Mesh.of(), fixed_length=LENGTH)
    model.double()
    values = program.weight_data.items()
    program.weight_data = {name: value.double() if value.dtype == torch.float32 else value for name, value in values}
    return difference(model, program, ids, exact=False, lifted=True)


def run(names: list[str], to: Path, *, minutes: float, without: frozenset[str] = frozenset()) -> int:
    """Appends a line for each that the file does not have yet; returns how many differ. without: left for later."""
    done = {(row["name"], row["field"]): row for row in read(to)} if to.exists() else {}
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    with to.open("a") as out:
        for name in names or zoo.names():
            left = [(f, o) for f, o in ((AS_IT_IS, {}), *fields(name)) if (name, f) not in done and f not in without]
            plain = _Plain()
            if left and left[0][0] != AS_IT_IS:
                with contextlib.suppress(Exception):  # its own row says why
                    model, ids = zoo.tiny(name)
                    plain.set(model, _logits(model, ids))
            for field, overrides in left:
                row = measure(name, field, overrides, plain, minutes=minutes)
                out.write(json.dumps(row) + "\n")
                out.flush()
                counts[row["verdict"]] += 1
                print(f"{name:30} {field:40} {row['verdict']:10} {row.get('why', '')}"[:240], flush=True)
    print(", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items())))
    return counts["different"]


def write(source: Path, to: Path) -> None:
    """The table; of several lines for one field the last counts."""
    rows = {(row["name"], row["field"]): row for row in read(source)}
    counts = Counter(row["verdict"] for row in rows.values())
    every = len({*rows, *((name, field) for name in zoo.names() for field in (AS_IT_IS, *dict(fields(name))))})
    text = [
        "# Boolean fields",
        "",
        "Made by `python -m tests.supported_models.boolean_fields run` and `... boolean_fields write`. Every boolean "
        "field of every configuration, flipped once: what is captured against the model's own forward with the "
        "attention implementation that transformers gives it by default, in float64 (detours through float32 lifted on "
        "both sides), to 1e-10.",
        "",
        f"{len(rows)} of {every} rows, of {len({name for name, _ in rows})} architectures: "
        + ", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items())) + ".",
        "",
        "*No effect*: the model's own logits are the same, bit by bit. *Fails*: transformers itself cannot build or "
        "run the model.",
        "",
        "| architecture | equal | no effect | refused, and why | fails in transformers, and why | different |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name in dict.fromkeys(name for name, _ in sorted(rows)):
        mine = [row for (of, _), row in rows.items() if of == name]
        cells = [", ".join(r["field"] for r in mine if r["verdict"] == v) for v in ("equal", "no effect")]
        cells += [_with_reasons([r for r in mine if r["verdict"] == v]) for v in ("refused", "fails", "different")]
        text.append(f"| {name} | " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    to.write_text("\n".join(text) + "\n")


def _with_reasons(rows: list[dict[str, Any]]) -> str:
    """Fields of one reason stand together."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        reasons.setdefault(row.get("why", ""), []).append(row["field"])
    return "; ".join(f"{', '.join(names)}: {why}" for why, names in reasons.items())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "write"))
    parser.add_argument("names", nargs="*")
    parser.add_argument("--from", dest="source", type=Path, default=Path("docs/reference/boolean_fields.jsonl"))
    parser.add_argument("--to", type=Path)
    parser.add_argument("--minutes", type=float, default=4.0, help="limit per field")
    parser.add_argument("--without", nargs="*", default=[], help="fields (or 'as it is') to leave for a later run")
    given = parser.parse_intermixed_args()
    if given.action == "write":
        write(given.source, given.to or Path("docs/reference/boolean_fields.md"))
        return 0
    return min(run(given.names, given.to or given.source, minutes=given.minutes, without=frozenset(given.without)), 1)


if __name__ == "__main__":
    sys.exit(main())
