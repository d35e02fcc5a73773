"""Partition every architecture of the zoo, compare it with the model, and write `docs/reference/supported_models.md`.

    python -m tests.supported_models.survey run [names]       each architecture, built tiny: a line in coverage.jsonl
    python -m tests.supported_models.survey run --odd         the same with sizes that divide by little
    python -m tests.supported_models.survey generate [names]  each causal one, built tiny, continues texts
    python -m tests.supported_models.survey generate --again  the same where there is a row already
    python -m tests.supported_models.survey bundles [names]   each, built tiny, saved and loaded: the same, bit by bit
    python -m tests.supported_models.survey experts [names]   each mixture of experts, built tiny, over ep
    python -m tests.supported_models.survey stages [names]    each, built tiny, as pipeline stages
    python -m tests.supported_models.survey sequences [names] each, built tiny, its tokens shared out over sp
    python -m tests.supported_models.survey layers [names]    each, built tiny and deep: identical layers traced once
    python -m tests.supported_models.survey prompts [names]   each causal one with states: prompts many tokens at a time
    python -m tests.supported_models.survey shares [names]    each default configuration, on the meta device
    python -m tests.supported_models.survey write             coverage.jsonl becomes docs/reference/supported_models.md
    python -m tests.supported_models.survey add               stages, sp, layers and prompts are put into the page

Per architecture, built tiny: captured or why not; the partitioned model against the model's own code at tp = 2, 3 and 4
and lengths 1, 5 and 40, in float64 (internal float32 casts raised to float64 in both models, 1e-10) and in float32
(1e-5); what it generates with a cache at tp = 1, 2 and 3, against the model's own forward without one. Over pipeline
stages: whole texts at pp=2, pp=3 and tp=2 x pp=2, and up to 64 greedy tokens of four prompts at pp=2 and tp=2 x pp=2,
in float64. On the default configuration, on the meta device: the fullest rank's share of the matrices, and the
all-reduces per layer. Only eight of its layers are built, and their weights counted as often as it has layers.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import re
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from partitioner.analysis.report.report import Report
from partitioner.compile.compare import difference
from partitioner.compile.partition import compile_program
from partitioner.compile.parts import Parts
from partitioner.compile.tracing.trace import trace
from partitioner.errors import CaptureError, PartitionerError
from partitioner.program.plan import Plan
from partitioner.proof.float64 import in_float64
from tests.support import reference, zoo
from tests.supported_models.columns import sequences
from tests.supported_models.columns.bundles import compare_bundle
from tests.supported_models.columns.experts import compare_experts, may_have_experts
from tests.supported_models.columns.layers import compare_layers
from tests.supported_models.columns.prompts import compare_prompts
from tests.supported_models.columns.stages import compare_stages
from tests.supported_models.generation import compare_generation
from tests.supported_models.table import add, read, write

PLANS = ("tp=2", "tp=3", "tp=4")
SHARE_PLANS = ("tp=2", "tp=4")
LENGTHS = (1, 5, 40)
BATCH = 2


class OutOfTime(Exception):
    pass


def measure_shares(name: str, *, minutes: float) -> dict[str, Any]:
    """What the default configuration adds to a row."""
    try:
        with TimeLimit(minutes):
            return {"name": name, "odd": False, "default": _shares(*zoo.default_with_few_layers(name))}
    except Exception as error:
        return {"name": name, "odd": False, "default": {"why": short(error)}}


def measure(name: str, *, minutes: float, odd: bool = False) -> dict[str, Any]:
    """Whether one architecture, built tiny, computes what its own code does."""
    row: dict[str, Any] = {"name": name, "odd": odd}
    try:
        model, _ = zoo.odd(name) if odd else zoo.tiny(name)
    except Exception as error:
        return {**row, "verdict": "not built", "why": short(error)}
    start = time.perf_counter()
    try:
        with TimeLimit(minutes):
            traced = trace(model.float())
            row["static"] = [note for note in traced.notes if note.startswith("s")]
            row["equal32"] = _compare(model, traced, exact=False)
            # the same weights, and the same graph with every float32 in it made float64
            row["equal64"] = _compare(model.double(), in_float64(traced), exact=True)
    except (PartitionerError, OutOfTime) as error:
        return {**row, "verdict": "refused", "why": short(error)}
    except Exception as error:
        return {**row, "verdict": "crashed", "why": short(error)}
    row["seconds"] = round(time.perf_counter() - start, 1)
    right = all(worst <= 1e-10 for worst in row["equal64"].values())
    right32 = all(worst <= 1e-5 for worst in row["equal32"].values())
    row["verdict"] = "equal" if right and right32 else "wrong"
    return row


def measure_generation(name: str, *, minutes: float) -> dict[str, Any]:
    """What generating adds to a row."""
    return {"name": name, "odd": False, "generates": _generates(name, minutes)}


def _generates(name: str, minutes: float) -> dict[str, Any]:
    try:
        model, _ = zoo.tiny(name)
    except Exception as error:
        return {"verdict": "not built", "why": short(error)}
    try:
        with TimeLimit(minutes):
            try:
                traced = trace(model.float())
            except CaptureError:  # not for all lengths at once: texts are continued a token at a time
                traced = trace(model.float(), fixed_length=8)
            # the same weights, and the same graph with every float32 in it made float64
            return compare_generation(model.double(), in_float64(traced))
    except (CaptureError, OutOfTime) as error:
        return {"verdict": "refused", "why": short(error)}
    except Exception as error:
        return {"verdict": "wrong", "why": short(error)}


def measure_bundle(name: str, *, minutes: float) -> dict[str, Any]:
    """What saving it as a bundle adds to a row."""
    row: dict[str, Any] = {"name": name, "odd": False}
    try:
        model, _ = zoo.tiny(name)
    except Exception as error:
        return {**row, "bundle": {"verdict": "not built", "why": short(error)}}
    start = time.perf_counter()
    try:
        with TimeLimit(minutes):
            found = compare_bundle(model.float(), lambda traced: [n for n in LENGTHS if _admits(traced, n)])
    except OutOfTime as error:
        found = {"verdict": "refused", "why": short(error)}
    except Exception as error:
        found = {"verdict": "crashed", "why": short(error)}
    return {**row, "bundle": {**found, "seconds": round(time.perf_counter() - start, 1)}}


def measure_experts(name: str, *, minutes: float) -> dict[str, Any]:
    """What dealing its experts out adds to a row."""
    row: dict[str, Any] = {"name": name, "odd": False}
    start = time.perf_counter()
    try:
        model, _ = zoo.tiny(name)
    except Exception as error:
        return {**row, "experts": {"verdict": "not built", "why": short(error)}}
    try:
        with TimeLimit(minutes):
            traced = in_float64(trace(model.double()))
            found = compare_experts(model, traced, [n for n in LENGTHS if _admits(traced, n)])
    except (CaptureError, OutOfTime) as error:
        found = {"verdict": "refused", "why": short(error)}
    except Exception as error:
        found = {"verdict": "crashed", "why": short(error)}
    return {**row, "experts": {**found, "seconds": round(time.perf_counter() - start, 1)}}


def measure_stages(name: str, *, minutes: float) -> dict[str, Any]:
    """What running it as pipeline stages adds to a row."""
    return _of_both("stages", compare_stages, name, LENGTHS, minutes)


def measure_sequences(name: str, *, minutes: float) -> dict[str, Any]:
    """What sharing out the tokens of its sequences adds to a row."""
    return _of_both("sequences", sequences.compare_sequences, name, sequences.LENGTHS, minutes)


def measure_layers(name: str, *, minutes: float) -> dict[str, Any]:
    """What tracing identical layers once adds to a row."""
    try:
        with TimeLimit(minutes):
            found = compare_layers(name, steps=not name.startswith("masked:"))
    except (PartitionerError, OutOfTime) as error:
        found = {"verdict": "refused", "why": short(error)}
    except Exception as error:
        found = {"verdict": "not built", "why": short(error)}
    return {"name": name, "odd": False, "layers": found}


def measure_prompts(name: str, *, minutes: float) -> dict[str, Any]:
    """What a state per sequence does to its prompts."""
    try:
        with TimeLimit(minutes):
            found = compare_prompts(name)
    except CaptureError as error:  # of what its cache does: nobody knows whether it has such a state
        found = {"verdict": "", "why": short(error)}
    except (PartitionerError, OutOfTime) as error:
        found = {"verdict": "refused", "why": short(error)}
    except Exception as error:
        found = {"verdict": "not built", "why": short(error)}
    return {"name": name, "odd": False, "prompts": found}


def _of_both(
    column: str, compare: Callable[..., dict[str, Any]], name: str, wanted: Sequence[int], minutes: float
) -> dict[str, Any]:
    """Of decoders, which generate as well, and of encoders."""
    row: dict[str, Any] = {"name": name, "odd": False}
    start = time.perf_counter()
    try:
        model, _ = zoo.tiny(name)
        with TimeLimit(minutes):
            try:
                traced, lengths = trace(model.float()), list(wanted)
            except CaptureError:
                traced, lengths = trace(model.float(), fixed_length=8), [8]
            lengths = [n for n in lengths if _admits(traced, n)]
            causal = not name.startswith("masked:")
            found = compare(model.double(), in_float64(traced), lengths, generates=causal)
    except (PartitionerError, OutOfTime) as error:
        found = {"verdict": "refused", "why": short(error)}
    except Exception as error:
        found = {"verdict": "crashed", "why": short(error)}
    return {**row, column: {**found, "seconds": round(time.perf_counter() - start, 1)}}


def _compare(model: Any, traced: Any, *, exact: bool) -> dict[str, float]:
    found = {}
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(3, vocabulary, (BATCH, max(LENGTHS)), generator=torch.Generator().manual_seed(0))
    expected = {
        n: reference.forward(model, exact=exact, lifted=exact, input_ids=ids[:, :n])
        for n in LENGTHS
        if _admits(traced, n)
    }
    for plan in PLANS:
        parts = compile_program(traced, Plan.parse(plan))
        found[plan] = max(
            (difference(parts.simulate(input_ids=ids[:, :n]), logits) for n, logits in expected.items()), default=0.0
        )
    return found


def _admits(program: Any, length: int) -> bool:
    """Whether the program's notes allow this length."""
    for note in program.notes:
        if found := re.match(r"sequence from (\d+)(?: to (\d+))?", note):
            return int(found[1]) <= length <= int(found[2] or length)
    return True


def _shares(model: Any, repeats: float) -> dict[str, Any]:
    """`repeats`: how often each layer stands for one of the default configuration."""
    traced = trace(model)
    found: dict[str, Any] = {}
    for plan in SHARE_PLANS:
        parts = compile_program(traced, Plan.parse(plan))
        report: Report = parts.report
        found[plan] = round(_share(parts, repeats), 4)
        if plan == SHARE_PLANS[0]:
            layers = Counter(n for layer, n in report.per_layer("all_reduce").items() if layer)
            found["all_reduces"] = sorted(layers)
            found["outside"] = report.per_layer("all_reduce").get("", 0)
            found["whole"] = sorted({f"{re.sub('[0-9]+', '*', r.pattern)}: {_generic(r.reason)}" for r in report.whole})
    return found


def _share(parts: Parts[Report], repeats: float) -> float:
    """The fullest rank's share of the matrices."""
    matrices = {name for row in parts.report.rows if row.is_matrix for name in row.names}
    times = {name: repeats if re.search(r"\.\d+\.", name) else 1.0 for name in matrices}
    total = sum(parts.program.weights[name].bytes * times[name] for name in matrices)
    ranks = [parts.rank(rank) for rank in range(parts.mesh.world_size)]
    return max(sum(w.bytes * times[w.name] for w in rank.weights if w.name in matrices) for rank in ranks) / total


def _generic(reason: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$|\b)", "*", reason)


def short(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".split("\n")[0][:300]


class TimeLimit:
    """Raises OutOfTime in the main thread after so many minutes."""

    def __init__(self, minutes: float) -> None:
        self.seconds = max(int(minutes * 60), 1)

    def __enter__(self) -> None:
        def stop(*_: Any) -> None:
            raise OutOfTime(f"not done after {self.seconds} s")

        signal.signal(signal.SIGALRM, stop)
        signal.alarm(self.seconds)

    def __exit__(self, *_: Any) -> None:
        signal.alarm(0)


def _worker(request: tuple[str, str, float, bool]) -> dict[str, Any]:
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    what, name, minutes, odd = request
    if what == "run":
        return measure(name, minutes=minutes, odd=odd)
    others = {
        "shares": measure_shares,
        "generate": measure_generation,
        "bundles": measure_bundle,
        "experts": measure_experts,
        "stages": measure_stages,
        "sequences": measure_sequences,
        "layers": measure_layers,
        "prompts": measure_prompts,
    }
    return others[what](name, minutes=minutes)


_KEYS = {
    "run": "verdict",
    "shares": "default",
    "generate": "generates",
    "bundles": "bundle",
    "experts": "experts",
    "stages": "stages",
    "sequences": "sequences",
    "layers": "layers",
    "prompts": "prompts",
}
"""By action: what tells that a row has its results."""


def run(what: str, names: list[str], to: Path, *, minutes: float, jobs: int, odd: bool, again: bool = False) -> int:
    """Appends one line per architecture that the file does not have yet; returns how many are wrong.

    Later lines of an architecture replace what earlier ones say. again: so those that the file has are done too.
    """
    done = {(row["name"], row["odd"]) for row in read(to) if _KEYS[what] in row} if to.exists() and not again else set()
    chosen = names or [
        name for name in zoo.names() if what not in ("generate", "prompts") or not name.startswith("masked:")
    ]
    if what == "experts":
        chosen = [name for name in chosen if may_have_experts(name)]
    requests = [(what, name, minutes, odd) for name in chosen if (name, odd) not in done]
    counts: Counter[str] = Counter()
    with multiprocessing.get_context("spawn").Pool(jobs, maxtasksperchild=12) as pool, to.open("a") as out:
        for row in pool.imap_unordered(_worker, requests):
            out.write(json.dumps(row) + "\n")
            out.flush()
            counts[_verdict(row)] += 1
            print(_line(row), flush=True)
    print(", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items()) if verdict))
    return counts["wrong"] + counts["crashed"]


def _verdict(row: dict[str, Any]) -> str:
    """What a row of one action says; those of shares say none."""
    found: str = row.get("verdict") or _of_action(row).get("verdict", "")
    return found


_COLUMNS = ("generates", "bundle", "experts", "stages", "sequences", "layers", "prompts")


def _of_action(row: dict[str, Any]) -> dict[str, Any]:
    return next((row[key] for key in _COLUMNS if key in row), {})


def _line(row: dict[str, Any]) -> str:
    worst = {k: f"{max(row[k].values()):.0e}" for k in ("equal64", "equal32") if row.get(k)}
    share, generates = row.get("default", {}), _of_action(row)
    line = f"{row['name']:30} {_verdict(row):9}"
    line += f" {worst or generates.get('logprob_error', '')} {share.get(SHARE_PLANS[0], share.get('why', ''))}"
    return f"{line} {row.get('why', generates.get('why', ''))}"[:240]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=(*_KEYS, "write", "add"))
    parser.add_argument("names", nargs="*")
    parser.add_argument("--from", dest="source", type=Path, default=Path("coverage.jsonl"))
    parser.add_argument("--to", type=Path)
    parser.add_argument("--minutes", type=float, default=4.0, help="limit per architecture and step")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--odd", action="store_true", help="sizes that divide by little")
    parser.add_argument("--again", action="store_true", help="also those that have a row, which is then replaced")
    given = parser.parse_intermixed_args()
    if given.action == "write":
        write(
            given.source,
            given.to or Path("docs/reference/supported_models.md"),
            made_by=(__doc__ or "").split("\n\n")[-1],
        )
        return 0
    if given.action == "add":
        add(given.source, given.to or Path("docs/reference/supported_models.md"))
        return 0
    options = {"minutes": given.minutes, "jobs": given.jobs, "odd": given.odd, "again": given.again}
    return min(run(given.action, given.names, given.to or given.source, **options), 1)


if __name__ == "__main__":
    sys.exit(main())
