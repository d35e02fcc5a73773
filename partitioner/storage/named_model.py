"""MODEL on the command line, as a module.

    a folder            a checkpoint: its configuration and weights
    config:FILE.json    a configuration file; weights drawn from a seed
    a model type        its default configuration, or that shrunk to run anywhere; weights drawn from a seed

The shrunk configuration changes sizes by the names that transformers' configurations share (`attribute_map` included);
no model is known by name.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging

from partitioner.errors import CaptureError, WeightError
from partitioner.storage.hub import hub_hint
from partitioner.storage.json_fields import read_fields
from partitioner.storage.recognise import MANIFEST

__all__ = [
    "class_notes",
    "class_of",
    "load_config",
    "load_model",
    "own_code",
    "without_grouped_mm",
]

_SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 112,
    "moe_intermediate_size": 48,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "vocab_size": 131,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

_LARGEST = 300_000_000
"""Parameters that are still drawn at random in a few seconds."""


def load_config(name: str, *, small: bool = False) -> Any:
    """The configuration of MODEL; `small` shrinks that of a model type."""
    path = Path(name)
    if name.startswith("config:"):
        return _from_file(Path(name.removeprefix("config:")))
    if path.is_dir():
        if not (path / "config.json").is_file():
            bundle = "; it is a bundle: partitioner show and run take it" if (path / MANIFEST).is_file() else ""
            raise CaptureError(f"{name} is a folder, but no checkpoint: it has no config.json{bundle}")
        return _from_file(path / "config.json")
    if name in CONFIG_MAPPING:
        return _small(name) if small else _configured(name, None, f"the default configuration of {name!r}")
    near = difflib.get_close_matches(name, list(CONFIG_MAPPING), n=3)
    hint = hub_hint(name) or (f"; near: {', '.join(near)}" if near else "")
    raise CaptureError(
        f"{name!r} is neither a checkpoint folder, nor config:FILE.json, nor a model type that transformers knows{hint}"
    )


def load_model(name: str, *, dtype: torch.dtype | None, seed: int = 0, meta: bool = False) -> Any:
    """MODEL in eval mode; `dtype`: None for that of its configuration, float32 where it names none.

    `meta`: its default size, without data.
    """
    if not meta and Path(name).is_dir():
        config = load_config(name)
        model_class = class_of(config)
        bar = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()  # of which each rank would draw its own
        try:
            model, info = model_class.from_pretrained(
                name, dtype=dtype, local_files_only=True, output_loading_info=True
            )
        except Exception as error:
            raise CaptureError(
                f"transformers cannot load {model_class.__name__} from {name!r}: {_line(error)}"
            ) from error
        finally:
            if bar:
                logging.enable_progress_bar()
        if missing := sorted(info["missing_keys"]):
            raise WeightError(
                f"{name} lacks {len(missing)} weights of {model_class.__name__}, {missing[0]!r} for one, which "
                "transformers draws at random: complete the checkpoint, or name its class in 'architectures'"
            )
        if dtype is not None and getattr(config, "quantization_config", None) is not None:
            _widen(model, dtype)
        return without_grouped_mm(model.eval())
    config = load_config(name, small=not meta)
    if not meta:
        num_parameters = sum(parameter.numel() for parameter in _build(name, config, "meta").parameters())
        if num_parameters > _LARGEST:
            raise CaptureError(
                f"{name!r} would have {num_parameters / 1e6:.0f} million parameters, drawn at random: "
                "give config:FILE.json with smaller sizes"
            )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _build(name, config, "meta" if meta else "cpu").to(dtype or _named_dtype(config)).eval()
    return without_grouped_mm(model)


def _widen(model: Any, dtype: torch.dtype) -> None:
    """Some of transformers' quantisers dequantise to 16 bits whatever `dtype` is asked for."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dtype in (torch.bfloat16, torch.float16):
            tensor.data = tensor.data.to(dtype)


def without_grouped_mm(model: Any) -> Any:
    """The default implementation of routed experts knows no float64, and no rows that are not multiples of 16 bytes."""
    model.set_experts_implementation("eager")
    return model


def _named_dtype(config: Any) -> torch.dtype:
    named = config.dtype
    return named if isinstance(named, torch.dtype) and named.is_floating_point else torch.float32


def _build(name: str, config: Any, device: str) -> Any:
    model_class = class_of(config)
    try:
        with torch.device(device):
            return model_class._from_config(copy.deepcopy(config), dtype=torch.float32)
    except Exception as error:
        raise CaptureError(f"transformers cannot build {model_class.__name__} for {name!r}: {_line(error)}") from error


def _from_file(path: Path) -> Any:
    fields = read_fields(path)
    kind = fields.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        own = f"; its own code ({own}) is not run" if (own := own_code(fields)) else ""
        raise CaptureError(f"{path} must name a model_type that transformers knows, got {str(kind)[:100]!r}{own}")
    return _configured(kind, path, str(path))


def own_code(fields: Mapping[str, Any]) -> str:
    """The code of its own that a configuration asks to be run, as it names it; "": none."""
    code = fields.get("auto_map")
    if not code:
        return ""
    named = list(code.values()) if isinstance(code, dict) else [code]
    flat = [str(each) for name in named for each in (name if isinstance(name, (list, tuple)) else [name]) if each]
    return f"auto_map: {', '.join(dict.fromkeys(flat))}"[:200]


def class_notes(fields: Mapping[str, Any], model_class: Any) -> tuple[str, ...]:
    """What is not done of what a configuration says of the model's class."""
    own = own_code(fields)
    notes = [f"its own code ({own}) is not run: the model is {model_class.__name__} of transformers"] if own else []
    named = _architectures(fields.get("architectures"))
    if not own and named and model_class.__name__ not in named:
        notes.append(f"transformers has no {named[0]!r}, which 'architectures' names: {model_class.__name__} is used")
    return tuple(notes)


def _configured(model_type: str, path: Path | None, where: str) -> Any:
    config_class = CONFIG_MAPPING[model_type]
    try:
        # not from_dict: files have their own way of writing infinity
        return config_class() if path is None else config_class.from_pretrained(path, local_files_only=True)
    except Exception as error:  # each configuration checks its fields in its own way
        raise CaptureError(f"transformers does not accept {where}: {_line(error)}") from error


def _line(error: Exception) -> str:
    """What an error says, in one line; its type where it says nothing else."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"


def class_of(config: Any) -> Any:
    """What the checkpoint says it is; for a bare configuration the causal language model, else the base model."""
    for architecture in _architectures(config.architectures):
        found = getattr(transformers, architecture) if hasattr(transformers, architecture) else None
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, transformers.MODEL_MAPPING):
        if type(config) in mapping:
            return mapping[type(config)]
    raise CaptureError(
        f"transformers has no model for a bare configuration of type {config.model_type!r}: name one in its "
        "'architectures'"
    )


def _architectures(named: object) -> list[str]:
    """What a configuration gives there, which may be anything."""
    named = [named] if isinstance(named, str) else named
    return [each for each in named if isinstance(each, str)] if isinstance(named, (list, tuple)) else []


def _small(model_type: str) -> Any:
    config_class = CONFIG_MAPPING[model_type]
    default = _configured(model_type, None, f"the default configuration of {model_type!r}")
    sizes = {}
    for field, size in _SMALL.items():
        value = getattr(default, field) if hasattr(default, field) else None
        # smaller only: one expert stays one, and a size that the model derives (None) stays derived
        if isinstance(value, int) and value > size:
            sizes[field] = size
    try:
        return config_class(**sizes)
    except Exception as error:
        raise CaptureError(
            f"the default configuration of {model_type!r} cannot be shrunk ({_line(error)}): give config:FILE.json"
        ) from error
