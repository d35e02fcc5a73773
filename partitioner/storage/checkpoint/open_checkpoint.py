"""`open_checkpoint`: a folder as `save_pretrained` writes it becomes a model on the meta device, and its origins.

The model is made by `from_pretrained` itself, given stand-ins in place of the stored tensors: classes, dtypes, names,
conversions and ties are those of transformers, of whatever version. No byte of a tensor is read for it, except where
transformers compares two to decide whether they are tied.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import GenerationConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from partitioner.errors import CaptureError, PartitionerError, WeightError
from partitioner.storage.checkpoint.equal_tensors import same_values
from partitioner.storage.checkpoint.quantized_finder import FLOAT8
from partitioner.storage.checkpoint.quantized_tensors import Quantized, find_quantized, quantization_fields
from partitioner.storage.checkpoint.recording_tensor import RecordingTensor
from partitioner.storage.checkpoint.strided_windows import Moved
from partitioner.storage.checkpoint.weight_origins import Origins
from partitioner.storage.hub import hub_hint
from partitioner.storage.json_fields import read_fields
from partitioner.storage.named_model import class_notes, class_of, load_config, without_grouped_mm
from runtime.weights.quantized.formats import FORMATS
from runtime.weights.safetensors_files import INDEX, SINGLE, TensorFiles

__all__ = ["Checkpoint", "can_open", "open_checkpoint"]

_CODES = (".qweight", ".weight_packed", "_blocks")
"""Ends of the names that quantised weights have."""
_NAMED = 5
"""How many names an error lists."""


@dataclass(frozen=True)
class Checkpoint:
    """`model`: on the meta device; `origins`: where its weights lie; `notes`: what of the folder is not used."""

    model: PreTrainedModel
    origins: Origins
    notes: tuple[str, ...] = ()


def open_checkpoint(folder: str | Path, *, dtype: torch.dtype | None = None, mapped: bool = False) -> Checkpoint:
    """The model of a checkpoint folder, in `dtype`, or in that which its configuration (else its files) names.

    `mapped`: its weights are used where they lie in the files.

    Raises `CaptureError` where the folder is none that can be read, `WeightError` where its tensors are not those of
    the model.
    """
    path = Path(folder)
    _require_readable(path)
    config = load_config(str(path))
    model_class = class_of(config)
    files = TensorFiles(path.resolve())
    quantized = _take_quantization(path, config, files)
    if dtype is None and quantized.packed and config.dtype is None:
        dtype = _plain_dtype(files)
    stored = _recording_tensors(files, quantized)
    _require_few_layers(path, config, len(stored))
    model, info = _load(model_class, config, stored, dtype or "auto")
    if turned := _inputs_first(model, quantized):
        quantized.turned |= turned
        model, info = _load(model_class, config, _recording_tensors(files, quantized), dtype or "auto")
    _require_turned(path, model, quantized)
    _require_complete(path, model, info, files.entries, quantized)
    _require_numbers(path, model)
    moved, computed, cast = _take_recording_tensors(model)
    if model.can_generate() and (path / "generation_config.json").exists():
        model.generation_config = _generation_config(path / "generation_config.json")
    notes = (
        *class_notes(read_fields(path / "config.json"), model_class),
        *quantized.notes,
        *_left_out(model, sorted(info["unexpected_keys"])),
    )
    return Checkpoint(without_grouped_mm(model.eval()), Origins(files, moved, computed, cast, mapped), notes)


def _take_quantization(path: Path, config: Any, files: TensorFiles) -> Quantized:
    """What is quantised in `files`, which are told so; the configuration becomes that of a model without."""
    found = quantization_fields(read_fields(path / "config.json"))
    for part in (config, config.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    if found is None:
        return Quantized()
    quantized = find_quantized(files, found, str(path))
    files.packed = quantized.packed
    return quantized


def _recording_tensors(files: TensorFiles, quantized: Quantized) -> dict[str, RecordingTensor]:
    same = same_values(files)
    stored = {
        e.name: RecordingTensor.of(e.name, e.shape, e.dtype, same)
        for e in files.entries.values()
        if e.name not in quantized.used
    }
    for name, packed in quantized.packed.items():
        # the numbers are computed in that dtype, and cast to the model's once
        numbers = RecordingTensor.of(name, packed.shape, packed.computed_in, same)
        stored[name] = numbers.transpose(-1, -2) if name in quantized.turned else numbers  # type: ignore[assignment]
    return stored


def _inputs_first(model: PreTrainedModel, quantized: Quantized) -> set[str]:
    """Names of weights that the model has with inputs before outputs. Tools that pack linears turn these first."""
    owners = [path for path, module in model.named_modules() if isinstance(module, Conv1D)]
    names = [name for name, packed in quantized.packed.items() if FORMATS[packed.format].turned] if owners else []
    # a base model may be stored without its prefix, or be loaded from a model that has one
    ends = {name: "." + name.removesuffix(".weight") for name in names}
    return {
        name for name, end in ends.items() if any(f".{own}".endswith(end) or end.endswith(f".{own}") for own in owners)
    }


def _require_turned(path: Path, model: PreTrainedModel, quantized: Quantized) -> None:
    """A square one fits either way."""
    for own, module in model.named_modules():
        weight = module.weight if isinstance(module, Conv1D) else None
        if isinstance(weight, RecordingTensor) and not weight.computed:
            for name in {window.tensor for window in weight.moved.windows} - quantized.turned:
                if name in quantized.packed and FORMATS[quantized.packed[name].format].turned:
                    raise WeightError(
                        f"{path}: {name!r} holds outputs before inputs, and {own!r} of {type(model).__name__}, which "
                        "is loaded from it, the other way round: dequantise the model and save that"
                    )


def _plain_dtype(files: TensorFiles) -> torch.dtype | None:
    """That of the first tensor which is stored as it is computed with, as transformers finds it."""
    return next((e.dtype for e in files.entries.values() if e.dtype.is_floating_point and e.dtype.itemsize > 1), None)


def _generation_config(path: Path) -> GenerationConfig:
    fields = read_fields(path)
    try:
        return GenerationConfig.from_dict(fields)
    except Exception as error:  # it checks some of its fields, each in its own way
        raise CaptureError(
            f"transformers does not accept {path}: {type(error).__name__}: {' '.join(str(error).split())[:500]}"
        ) from error


def _require_few_layers(path: Path, config: Any, stored: int) -> None:
    """Each layer has a tensor at least: a number that is far too large would take all memory there is."""
    inner = config.get_text_config()
    layers = inner.num_hidden_layers if hasattr(inner, "num_hidden_layers") else 0
    if isinstance(layers, int) and layers > stored:
        raise WeightError(
            f"{path} does not fit its config.json: that has {layers} layers, and the files hold {stored} tensors"
        )


def can_open(folder: str | Path) -> bool:
    """Whether `folder` is a checkpoint that is read by parts; what it holds may still be refused."""
    try:
        _require_readable(Path(folder))
    except CaptureError:
        return False
    return True


def _require_readable(path: Path) -> None:
    if not path.is_dir():
        raise CaptureError(
            f"{str(path)!r} is no folder: give a checkpoint, as save_pretrained writes it{hub_hint(str(path))}"
        )
    if (path / "adapter_config.json").is_file():
        raise CaptureError(
            f"{path} holds an adapter (adapter_config.json), not a model: merge it into its base model first "
            "(merge_and_unload) and save that"
        )
    if not (path / "config.json").is_file():
        raise CaptureError(f"{path} is a folder, but no checkpoint: it has no config.json")
    fields = read_fields(path / "config.json")
    if fields.get("transformers_weights") is not None:
        raise CaptureError(
            f"{path}/config.json names files of its own (transformers_weights={fields['transformers_weights']!r}); "
            f"required are {SINGLE} or {INDEX}"
        )
    if not any((path / name).is_file() or (path / name).is_symlink() for name in (SINGLE, INDEX)):
        others = sorted(file.name for file in path.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".gguf", ".h5"))
        instead = f", but {', '.join(others[:_NAMED])}" if others else ""
        raise CaptureError(
            f"{path} has no {SINGLE} and no {INDEX}{instead}: load it by from_pretrained, and save it with "
            "save_pretrained, which writes safetensors"
        )


class _Weightless(TorchFunctionMode):
    """What from_pretrained allocates, to initialise what a checkpoint lacks, is allocated on the meta device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty_like:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def _load(
    model_class: Any, config: Any, stored: dict[str, RecordingTensor], dtype: object
) -> tuple[PreTrainedModel, Any]:
    try:
        with _quiet(), _Weightless():
            model, info = model_class.from_pretrained(
                None,
                config=config,
                state_dict=stored,
                dtype=dtype,
                ignore_mismatched_sizes=True,  # reported by us, with the names
                output_loading_info=True,
            )
    except PartitionerError:
        raise
    except Exception as error:
        raise CaptureError(
            f"transformers cannot load {model_class.__name__} from {len(stored)} tensors: {type(error).__name__}: "
            f"{' '.join(str(error).split())[-500:]}"
        ) from error
    return model, info


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bar and its table of what did not fit, which we say ourselves."""
    level, bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bar:
            transformers_logging.enable_progress_bar()


def _require_complete(
    path: Path, model: PreTrainedModel, info: Any, stored: Collection[str], quantized: Quantized
) -> None:
    name = type(model).__name__
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if info["mismatched_keys"]:
        wrong = [f"{key!r} is {list(got)}, required {list(wanted)}" for key, got, wanted in info["mismatched_keys"]]
        raise WeightError(f"{path} does not fit {name}: {_some(sorted(wrong))}; its config.json has other sizes")
    if missing:
        near = {key: difflib.get_close_matches(key, unexpected or stored, n=1) for key in missing[:_NAMED]}
        said = [f"{key!r}" + (f" (near it: {found[0]!r})" if found else "") for key, found in near.items()]
        codes = next((each for each in unexpected if each.endswith(_CODES) and each not in quantized.used), None)
        raise WeightError(
            f"{path} lacks {len(missing)} weights of {name}: {', '.join(said)}{_more(missing)}; "
            + (
                "transformers would draw them at random: complete the checkpoint, or name the class it was saved from "
                "in 'architectures'"
                if codes is None
                else f"{codes!r} looks like codes of a quantised weight, which the quantization_config of config.json "
                "does not explain: add it as it was released"
            )
        )


def _require_numbers(path: Path, model: nn.Module) -> None:
    """Codes that no configuration calls codes: transformers casts them to numbers."""
    for name, parameter in model.named_parameters():
        if isinstance(parameter, RecordingTensor) and parameter.is_floating_point():
            stored = parameter.stored
            if not stored.is_floating_point or stored in FLOAT8:
                raise WeightError(
                    f"{path}: {name!r} is stored as {str(stored).removeprefix('torch.')}, and no quantization_config "
                    "in config.json says with which scales: add it as it was released, or save the weights in 16 bits"
                )


def _left_out(model: PreTrainedModel, unexpected: list[str]) -> tuple[str, ...]:
    """A note on the tensors that the class has no place for: other heads, old buffers. transformers drops them too."""
    if not unexpected:
        return ()
    tensors = "1 tensor" if len(unexpected) == 1 else f"{len(unexpected)} tensors"
    return (
        f"{tensors} of the checkpoint not loaded, as {type(model).__name__} has no place for them: "
        f"{_some(list(map(repr, unexpected)))}",
    )


def _some(said: list[str]) -> str:
    return ", ".join(said[:_NAMED]) + _more(said)


def _more(of: list[Any]) -> str:
    return f" and {len(of) - _NAMED} more" if len(of) > _NAMED else ""


def _take_recording_tensors(model: nn.Module) -> tuple[dict[str, Moved], dict[str, str], dict[str, torch.dtype]]:
    """Puts empty tensors in place of the stand-ins, one for all names of one.

    Returns what Origins holds of them: where they came from, why from nowhere, and to which dtype they are cast.
    """
    moved: dict[str, Moved] = {}
    computed: dict[str, str] = {}
    cast: dict[str, torch.dtype] = {}
    empty: dict[int, Tensor] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for own in (module._parameters, module._buffers):
            for name, tensor in own.items():
                if isinstance(tensor, RecordingTensor):
                    full = f"{path}.{name}" if path else name
                    if tensor.dtype != tensor.stored:
                        cast[full] = tensor.dtype
                    if tensor.computed:
                        computed[full] = tensor.computed[0]
                    else:
                        moved[full] = tensor.moved
                    if id(tensor) not in empty:
                        data = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
                        empty[id(tensor)] = (
                            nn.Parameter(data, requires_grad=False) if own is module._parameters else data
                        )
                    own[name] = empty[id(tensor)]
    return moved, computed, cast
