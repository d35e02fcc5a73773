"""Traces that tests share: most of a partition's time is torch.export's, and many tests ask for the same model's.

Of layers that are alike the first is traced, and the last is not compared with it: whether they come out the same is
what tests about tracing are for, and of a model of two layers that is a third of the time.

A trace follows from the model's classes, configurations and tensors and from what is asked of it. Where all of these
are the same as before, the test is handed a copy of the trace made then, over its own model's weights; where tests run
in several processes, whichever of them made it (`keep_in`). Models with code that is not transformers' own are always
traced, and so is every model of a test about tracing (`shares`): one that patches what traces belongs in such a folder.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

import partitioner.compile.tracing.trace as compiling
from partitioner.capture.capture import ends_of, generation_of
from partitioner.capture.layers.share_layers import SharedLayers
from partitioner.program.program import Program
from tests.support.traces import stored_traces

LARGEST = 32 * 2**20
"""Bytes of a model's tensors up to which they are compared; larger ones are traced."""

KEPT = 64

_NOT_COMPARED = {"_parameters", "_buffers", "_modules", "config", "generation_config"}

_known: OrderedDict[Any, tuple[Program, dict[str, str | None]]] = OrderedDict()
_folder: Path | None = None
"""Where the processes of this run keep theirs."""


def keep_in(folder: Path | None) -> None:
    """From now on, traces are looked for in `folder` as well, and left there."""
    global _folder
    _folder = folder


def shares(test: pytest.Item) -> bool:
    """Whether a test may be handed a trace that another one had made: not where pages show what the product traces."""
    return not {"capture", "docs"} & set(test.path.parts)


@contextmanager
def sharing() -> Iterator[None]:
    """As long as it is open, `partition` and `trace` make each trace once, and trace one of layers that are alike."""
    own = compiling.capture, compiling.capture_step, compiling.capture_piece
    shared = (functools.partial(_capture, each) for each in own)
    compiling.capture, compiling.capture_step, compiling.capture_piece = shared
    fewest = SharedLayers.fewest
    SharedLayers.fewest, SharedLayers.compares = 2, False
    try:
        yield
    finally:
        compiling.capture, compiling.capture_step, compiling.capture_piece = own
        SharedLayers.fewest, SharedLayers.compares = fewest, True


def _capture(own: Callable[..., Program], model: Any, **asked: Any) -> Program:
    about = describe(model)
    if about is None:
        return own(model, **asked)
    key = own.__name__, repr(sorted(asked.items())), torch.get_default_dtype(), about
    tensors = _tensors(model)
    if key in _known:
        _known.move_to_end(key)
        program, origins = _known[key]
    else:
        program, origins = _known[key] = _found_or_traced(key, lambda: own(model, **asked), tensors)
        while len(_known) > KEPT:
            _known.popitem(last=False)
    data = {
        name: program.weight_data[name].clone() if origin is None else tensors[origin].detach()
        for name, origin in origins.items()
    }
    own_ends = {"eos_token_id": ends_of(model), "generation": generation_of(model)}  # of no graph
    return dataclasses.replace(program.copy(), weight_data=data, **own_ends)


def _found_or_traced(
    key: Any, trace: Callable[[], Program], tensors: dict[str, Tensor]
) -> tuple[Program, dict[str, str | None]]:
    """The program, and of each of its weights the name of the model's tensor; None where no tensor is it."""
    name = None if _folder is None else stored_traces.key(key)
    path = None if _folder is None or name is None else _folder / name
    if path is not None and path.exists():
        program = stored_traces.read(path)
        return program, {each: each if each not in program.weight_data else None for each in program.weights}
    program = trace()
    where = {tensor.data_ptr(): name for name, tensor in tensors.items() if not tensor.is_meta and tensor.numel()}
    origins = {
        name: name if name in tensors and (data.is_meta or where.get(data.data_ptr()) is not None) else None
        for name, data in program.weight_data.items()
    }
    if path is not None:  # of the model's own tensors, its next owner has some
        data = {name: data for name, data in program.weight_data.items() if origins[name] is None}
        stored_traces.write(path, dataclasses.replace(program, weight_data=data))
    return program, origins


def describe(model: nn.Module) -> Any:
    """All that its trace can depend on, comparable; None where that cannot be told."""
    modules = dict(model.named_modules(remove_duplicate=False))
    if any(type(module).__module__.partition(".")[0] not in ("torch", "transformers") for module in modules.values()):
        return None
    tensors = _tensors(model)
    if sum(tensor.nbytes for tensor in tensors.values() if not tensor.is_meta) > LARGEST:
        return None
    same: dict[int, int] = {}
    return (
        tuple((name, type(module), type(module).forward, _attributes(module)) for name, module in modules.items()),
        tuple((name, _digest(tensor), same.setdefault(id(tensor), len(same))) for name, tensor in tensors.items()),
    )


def _attributes(module: nn.Module) -> str:
    """What a module holds beside its tensors and modules, its configurations in full."""
    plain = {
        name: sorted(value) if isinstance(value, set) else value  # whose order differs between processes
        for name, value in vars(module).items()
        if name not in _NOT_COMPARED
    }
    configs = [
        (each.to_json_string(use_diff=False), getattr(each, "_attn_implementation", None))
        for each in (getattr(module, "config", None), getattr(module, "generation_config", None))
        if each is not None and (isinstance(each, PreTrainedConfig) or _reads_generation_config(module))
    ]
    return repr((sorted(plain.items()), configs))


def _reads_generation_config(module: nn.Module) -> bool:
    return "generation_config" in inspect.unwrap(type(module).forward).__code__.co_names


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def _digest(tensor: Tensor) -> tuple[Any, ...]:
    about = type(tensor), tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.device, tensor.requires_grad
    if tensor.is_meta:
        return about
    return *about, hashlib.blake2b(tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy()).digest()
