"""Summaries of public models, from configurations alone, with few layers traced.

The shapes are those of the models' published configurations. Their layers repeat, so that a few are traced, and the
last kind is repeated to the real depth; `tests/partitioner/planning/test_summary.py` holds such a summary against one
of the whole depth. Summaries are kept in FOLDER, for a trace takes a minute.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import torch

from partitioner.planning.summary import Summary, summarize
from partitioner.storage.named_model import load_config, load_model

SHAPES = Path(__file__).with_name("shapes")
TRACED = {"deepseek-v3": 5}
"""Layers: its first three are dense."""


def deepened(summary: Summary, layers: int) -> Summary:
    """With the last kind of layer repeated: the summary of a deeper model of the same kinds."""
    part = summary.parts[summary.order[-1]]
    values = summary.values(tp=1)
    more = layers - len(summary.order)
    whole = float(part.weight_bytes.subs(values))
    summary.order = summary.order + [summary.order[-1]] * more
    summary.num_bytes += round(more * whole)
    if summary.expanded is not None:
        deepened(summary.expanded, layers)
    return summary


def summary_of(name: str, folder: Path) -> Summary:
    """By the name of a file in `shapes`."""
    kept = folder / f"{name}.pickle"
    if not kept.is_file():
        path = SHAPES / f"{name}.json"
        layers = int(load_config(f"config:{path}").num_hidden_layers)
        few = json.loads(path.read_text(encoding="utf-8")) | {"num_hidden_layers": min(layers, TRACED.get(name, 3))}
        shrunk = folder / f"{name}.json"
        shrunk.write_text(json.dumps(few), encoding="utf-8")
        model = load_model(f"config:{shrunk}", dtype=torch.bfloat16, meta=True)
        kept.write_bytes(pickle.dumps(deepened(summarize(model), layers)))
    found: Summary = pickle.loads(kept.read_bytes())
    return found
