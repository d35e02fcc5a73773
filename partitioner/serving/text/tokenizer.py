"""The tokenizer of a checkpoint folder or a bundle, whose own code is not run; how long the model's texts may be."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer

from partitioner.errors import CaptureError, InputError
from partitioner.storage.bundle.bundle import load
from partitioner.storage.json_fields import read_fields
from partitioner.storage.named_model import own_code
from partitioner.storage.recognise import is_bundle

__all__ = ["context_length", "load_tokenizer"]


def load_tokenizer(folder: str) -> tuple[Any, str]:
    """The tokenizer, and a note where it has code of its own, "" otherwise."""
    with _model_folder(folder) as files:
        own = _own_code(files)
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(files), local_files_only=True, trust_remote_code=False)
        except Exception as error:  # what its files hold is not checked by who reads them
            why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            not_run = f" (code of its own, {own}, is not run)" if own else ""
            raise InputError(f"transformers finds no tokenizer in {folder!r}{not_run}: {why}") from error
    if own:
        return (
            tokenizer,
            f"the tokenizer's own code ({own}) is not run: it is {type(tokenizer).__name__} of transformers",
        )
    return tokenizer, ""


def context_length(folder: str) -> int | None:
    """How many tokens a text has at most by the model's configuration; None: it does not say."""
    with _model_folder(folder) as files:
        try:
            config = AutoConfig.from_pretrained(str(files), local_files_only=True, trust_remote_code=False)
        except Exception:  # a model that needs no configuration of transformers' runs without a limit from it
            return None
    fields = config.get_text_config()
    name = "max_position_embeddings"  # which configurations that call it otherwise map to theirs
    longest = getattr(fields, name) if hasattr(fields, name) else None
    return longest if isinstance(longest, int) and longest > 1 else None


@contextlib.contextmanager
def _model_folder(folder: str) -> Iterator[Path]:
    with load(folder).model_folder() if is_bundle(folder) else contextlib.nullcontext(Path(folder)) as files:
        yield files


def _own_code(folder: str | Path) -> str:
    try:
        return own_code(read_fields(Path(folder, "tokenizer_config.json")))
    except CaptureError:  # the tokenizer's own reader says more of a file that cannot be read
        return ""
