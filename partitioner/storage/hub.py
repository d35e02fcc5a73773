"""A name such as "org/name" becomes the folder of its snapshot, from the local cache or downloaded.

    fetched("org/name")     the folder
    hub_hint("org/name")    for errors of what takes folders only: where the snapshot is, or would be

huggingface_hub is imported where a name is that of a repository.

What is fetched is configuration, tokenizer and safetensors: no code, and nothing that is unpickled. The hub, the token
and the cache are those that huggingface_hub is told of: HF_ENDPOINT, HF_TOKEN or `hf auth login`, HF_HOME, and
HF_HUB_OFFLINE.
"""

from __future__ import annotations

import re
from pathlib import Path

from partitioner.errors import InputError

__all__ = ["fetched", "hub_hint", "may_be_repository"]

_WANTED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")


def may_be_repository(name: str) -> bool:
    """Whether it has the form of a repository's name, and nothing here has that name."""
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name)) and not Path(name).exists()


def fetched(name: str, *, revision: str | None = None) -> str:
    """MODEL as a folder, where it is the name of a repository; as it is otherwise, and where offline it is not known.

    revision: a branch, tag or commit; None: the repository's main branch.
    """
    if not may_be_repository(name):
        if revision is not None:
            raise InputError(f"--revision is for a repository on a hub; {name!r} is none")
        return name
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=list(_WANTED))
    except LocalEntryNotFoundError as error:
        if huggingface_hub.constants.HF_HUB_OFFLINE:
            return name  # whoever opens it says what to do
        raise _cannot(name, revision, huggingface_hub.constants.ENDPOINT, error) from error
    except Exception as error:  # of the network, of the hub, of the disk
        raise _cannot(name, revision, huggingface_hub.constants.ENDPOINT, error) from error


def hub_hint(name: str) -> str:
    """Where the snapshot of a hub's repository lies, if `name` may be one; "" otherwise. Nothing is fetched."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        return ""
    import huggingface_hub

    found = huggingface_hub.try_to_load_from_cache(name, "config.json")
    if isinstance(found, str):
        return f"; it is the name of a repository, whose snapshot is in {Path(found).parent}: give that folder"
    place = Path(huggingface_hub.constants.HF_HUB_CACHE, f"models--{name.replace('/', '--')}", "snapshots")
    return (
        "; it may be the name of a repository on a hub: nothing is fetched from there, and its snapshot would be a "
        f"folder in {place} (hf download {name} puts it there)"
    )


def _cannot(name: str, revision: str | None, endpoint: str, error: Exception) -> InputError:
    of = "" if revision is None else f" at {revision!r}"
    why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return InputError(f"{name!r}{of} is no folder here, and cannot be had from {endpoint}: {why}")
