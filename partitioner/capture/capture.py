"""`capture`: one Hugging Face model in, one Program out.

fake model       a copy without weights, free to change            fake model.py, rope.py
probe      one eager run: masks, positions, inputs            probe.py, masks.py, inputs.py
export     torch.export, through transformers' seams          trace.py, seams.py
build      functional, clean, named; runtime ops              functional.py, build.py, fold.py
weights    canonical names, computed values                   weights.py
"""

from __future__ import annotations

import inspect
import math
from typing import Any

from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from transformers import GenerationConfig, PreTrainedModel

from partitioner.capture.inputs.graph_inputs import choose_inputs
from partitioner.capture.inputs.rope import fix_rope
from partitioner.capture.layers.share_layers import SharedLayers
from partitioner.capture.layers.traced_once import traced_once
from partitioner.capture.trace.build_graph import Builder
from partitioner.capture.trace.export_graph import export, export_sharing
from partitioner.capture.trace.fake_model import make_fake_model
from partitioner.capture.trace.fold_masks import fold_masks
from partitioner.capture.trace.functionalize import functionalize
from partitioner.capture.trace.recurrence_hooks import recurrences_installed, rename_recurrences
from partitioner.capture.trace.weight_names import ModelWeights, check_constant
from partitioner.errors import CaptureError
from partitioner.program.program import Input, Program, Weight
from partitioner.program.progress import timed
from partitioner.sharding.mesh import Mesh

__all__ = ["capture", "describe_weights", "ends_of", "generation_of", "limits_of"]


def capture(
    model: PreTrainedModel, *, mesh: Mesh, max_length: int | None = None, fixed_length: int | None = None
) -> Program:
    """The model as one graph whose output is its logits (the last hidden state where it has no head).

    The model may hold its weights or be on the meta device; it is not modified. `max_length` is the longest sequence
    that will be run: RoPE variants that depend on the length are fixed by it. `fixed_length` captures for that one
    length only.
    """
    accepted = inspect.signature(type(model).forward).parameters
    # an encoder that was taken out of one has the same configuration
    if model.config.is_encoder_decoder and "decoder_input_ids" in accepted:
        raise CaptureError(
            f"cannot capture {type(model).__name__}: it is an encoder-decoder; only decoders and encoders are supported"
        )
    fake = FakeTensorMode()
    fake_model = make_fake_model(model, fake)
    known = ModelWeights(model)
    notes, longest = fix_rope(fake_model, known, max_length=max_length)
    with timed("probe"):
        example = choose_inputs(fake_model, fake, known.indices(), length=fixed_length)
    kinds = example.probe.kinds
    static, rename = fixed_length is not None, known.canonical.__getitem__

    def build(shared: SharedLayers | None) -> tuple[Builder, fx.Graph]:
        with timed("export" if shared is None else "export, identical layers once"), recurrences_installed(fake_model):
            exported = exported_by(shared)
        with timed("graph"):
            builder = Builder(functionalize(exported), tuple(example.tensors), rename, shared=shared)
            return builder, builder.build()

    def exported_by(shared: SharedLayers | None) -> ExportedProgram:
        if shared is None:
            return export(fake_model, example.tensors, kinds, static=static)
        return export_sharing(fake_model, example.tensors, kinds, shared, static=static)

    (builder, graph), layers = traced_once(fake_model, build, example.probe.skipped)
    fold_masks(graph, kinds)
    rename_recurrences(graph)

    weights, values = describe_weights(graph, builder, known)
    placeholders = {node.target: node for node in graph.nodes if node.op == "placeholder"}
    without = {"attention_mask": example.masks_by_itself}
    inputs = tuple(
        Input(name, placeholders[name].meta["val"], example.defaults[name], without=without.get(name))
        for name in example.tensors
    )
    notes += [*builder.limits(), *([] if fixed_length is None else [f"static length {fixed_length}"])]
    return Program(
        graph=graph,
        inputs=inputs,
        weights=weights,
        weight_data=values,
        symbols=builder.symbols,
        mesh=mesh,
        name=type(model).__name__,
        limits=limits_of(builder.ranges, longest),
        has_head=model.can_generate() or model.get_output_embeddings() is not None,
        eos_token_id=ends_of(model),
        generation=generation_of(model),
        layers=layers,
        notes=notes,
    )


def describe_weights(
    graph: fx.Graph, builder: Builder, known: ModelWeights
) -> tuple[dict[str, Weight], dict[str, Tensor]]:
    """The weights that `graph` reads, and their data."""
    used = {node.target for node in graph.nodes if node.op == "get_attr"}
    names = [name for name in builder.weights if name in used]
    values = known.data([name for name in names if name not in builder.constants])
    weights: dict[str, Weight] = {}
    for name in names:
        if name in builder.constants:
            values[name] = check_constant(name, builder.constants[name])
            weights[name] = Weight(name, tuple(values[name].shape), values[name].dtype, "constant")
        else:
            tensor = values[name]
            weights[name] = Weight(name, tuple(tensor.shape), tensor.dtype, known.source(name), known.aliases[name])
    return weights, values


_LARGEST_ID = 2**62
"""What a bundle's files take."""


def ends_of(model: PreTrainedModel) -> tuple[int, ...]:
    """The ids after which text of this model ends. A negative one is that of no token: how files say that there is
    none.
    """
    config = model.generation_config if model.can_generate() else None
    found = None if config is None else config.eos_token_id
    ends = [] if found is None else [found] if isinstance(found, int) else found
    if not isinstance(ends, (list, tuple)) or not all(type(end) is int and end <= _LARGEST_ID for end in ends):
        raise CaptureError(
            f"eos_token_id of {type(model).__name__}'s generation configuration must be whole numbers of at most 62 "
            f"bits, got {found!r}"
        )
    return tuple(end for end in ends if end >= 0)


def generation_of(model: PreTrainedModel) -> dict[str, Any]:
    """What else its generation config says, beside what is transformers' own default; plain data."""
    if not model.can_generate() or model.generation_config is None:
        return {}
    known = set(vars(GenerationConfig())) - {"eos_token_id", "transformers_version"}
    said = model.generation_config.to_diff_dict()
    return {
        name: _plain(value)
        for name, value in said.items()
        if name in known and not name.startswith("_") and value is not None
    }


def _plain(value: Any) -> Any:
    """As JSON has it, or the words for it: enough to be named."""
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return repr(value)


def limits_of(ranges: dict[str, tuple[int, int | None]], longest: int | None) -> dict[str, tuple[int, int | None]]:
    """The sizes that inputs may have: those that the trace holds for, within the length that RoPE is fixed for."""
    if longest is None:
        return dict(ranges)
    low, high = ranges.get("sequence", (1, None))
    most = longest if high is None else min(high, longest)
    return {**ranges, "sequence": (low, most), "positions": (1, longest)}
