"""Capture every architecture of the zoo and compare the graph with the model, one line each.

python -m tests.support.zoo survey [names]      columns: verdict, relative difference at lengths 1, 5, 40, 64, 150
(batch 1 and 2), nodes, seconds

equal: within 1e-10 in float64, casts to float32 lifted, at every length (and to 1e-4 of the unchanged model). wrong:
captured, and different: must never happen. refused: an error says why.
"""

from __future__ import annotations

import logging
import time
import warnings

import torch
from torch import Tensor
from transformers import PreTrainedModel

from partitioner.capture import capture
from partitioner.errors import PartitionerError
from partitioner.program.program import Program
from partitioner.sharding.mesh import Mesh
from tests.support import reference, zoo
from tests.support.interpret import run

LENGTHS = (1, 5, 40, 64, 150)
TOLERANCE = 1e-10


def difference(
    model: PreTrainedModel, program: Program, ids: Tensor, *, exact: bool = True, lifted: bool = False
) -> float:
    """The largest difference between graph and model, relative to the largest logit; padding on the right where masks
    are taken."""
    given = {"input_ids": ids}
    if any(i.name == "attention_mask" for i in program.inputs):
        mask = torch.ones_like(ids)
        mask[0, ids.shape[1] // 2 + 1 :] = 0
        given["attention_mask"] = mask
    expected = reference.forward(model, exact=exact, lifted=lifted, **given)
    got = run(program, lifted=lifted, **given)
    if "attention_mask" in given:  # what a padded position outputs has no meaning
        expected, got = expected[given["attention_mask"].bool()], got[given["attention_mask"].bool()]
    assert expected.shape == got.shape, f"shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    return ((expected - got).abs().max() / expected.abs().max()).item()


def _admits(program: Program, length: int) -> bool:
    """Whether the program's notes allow this length."""
    for note in program.notes:
        if note.startswith("sequence from "):
            words = note.split()
            return int(words[2]) <= length <= (int(words[4]) if len(words) > 4 else length)
    return True


def _on_meta(name: str, program: Program) -> str:
    """What differs when the same model is captured on the meta device, without weights; "" where nothing does."""
    with torch.device("meta"):
        empty, _ = zoo.tiny(name)
    try:
        other = capture(empty, mesh=Mesh.of())
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if str(other.graph) != str(program.graph):
        return "the graph on meta is another one"
    for weight in other.weights.values():
        value = other.weight_data[weight.name]
        # a real model rounds to float32 before it becomes float64
        if weight.source != "checkpoint" and not torch.allclose(
            value.double(), program.weight_data[weight.name].double(), rtol=1e-6
        ):
            return f"{weight.name} has other values on meta"
    return ""


def survey(name: str, *, odd: bool = False, meta: bool = False) -> tuple[str, str]:
    """(verdict, line)."""
    try:
        model, ids = zoo.odd(name) if odd else zoo.tiny(name)
        reference.forward(model, input_ids=ids, lifted=model.dtype == torch.float64)
    except Exception as error:
        return "unbuilt", f"{type(error).__name__}: {error}"
    start = time.perf_counter()
    try:
        program = capture(model, mesh=Mesh.of())
    except PartitionerError as error:
        return "refused", str(error)
    except Exception as error:
        return "crashed", f"{type(error).__name__}: {error}"
    seconds = time.perf_counter() - start
    model.double()
    program.weight_data = {
        name: value.double() if value.dtype == torch.float32 else value for name, value in program.weight_data.items()
    }
    differences, notes = [], [*program.notes]
    ids = torch.randint(3, model.get_input_embeddings().weight.shape[0], (2, max(LENGTHS)))
    for length in LENGTHS:
        try:
            if not _admits(program, length):
                continue
            for batch in (1, 2):
                differences.append(difference(model, program, ids[:batch, :length], lifted=True))
        except Exception as error:
            differences.append(float("nan"))
            notes.append(f"length {length}: {type(error).__name__}: {error}")
    if not differences:
        return "refused", f"no length of {LENGTHS} is within its limits: {program.notes}"
    worst = max(differences, key=lambda value: float("inf") if value != value else value)
    try:
        own = difference(model, program, ids[:, :40], exact=False)
    except Exception:
        own = float("nan")
    # some models mix dtypes and run only in float32 without the lifting
    verdict = "equal" if worst < TOLERANCE and not own > 1e-4 else "wrong"
    if meta and verdict == "equal":
        complaint = _on_meta(name, program)
        verdict, notes = ("meta", [complaint]) if complaint else (verdict, notes)
    kinds = "dynamic" if "sequence" in program.symbols else "static"
    shown = " ".join(f"{value:.0e}" for value in differences)
    line = f"{kinds} [{shown}] own {own:.0e} {len(program.graph.nodes)} nodes {seconds:.1f} s {' | '.join(notes)}"
    return verdict, line


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] != "survey":
        print(__doc__)
        return 2
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    options = {"odd": "--odd" in arguments, "meta": "--meta" in arguments}
    chosen = [name for name in arguments[1:] if not name.startswith("--")] or zoo.names()
    counts: dict[str, int] = {}
    for name in chosen:
        verdict, line = survey(name, **options)
        counts[verdict] = counts.get(verdict, 0) + 1
        print(f"{name:32} {verdict:8} {' '.join(line.split())[:600]}", flush=True)
    print(counts)
    return 1 if counts.get("wrong") else 0
