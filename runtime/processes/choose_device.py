"""Where ranks run, as a user says it: "auto", "cpu", "cuda", or a torch device.

choose_device("auto", num_ranks=2)    "cuda" where this host has a GPU for each of its ranks, "cpu" otherwise
choose_device("cuda", num_ranks=2)    InputError where it has not; so of any other device that cannot be used here
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from partitioner.errors import InputError

if TYPE_CHECKING:
    import torch

__all__ = ["choose_device"]


def choose_device(wanted: str | torch.device, *, num_ranks: int) -> torch.device:
    """The device of each of `num_ranks` ranks of this host; "cuda" without a number: each has one of its own."""
    import torch  # here: what is checked before a device is has no need of it

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "auto":
        return torch.device("cuda" if count >= num_ranks else "cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise InputError(f"the device must be auto, cpu or cuda, or one that torch knows; got {wanted!r}") from None
    if device.type not in ("cpu", "cuda") and isinstance(wanted, str):
        _require(device)
    if device.index is not None and device.type == "cuda" and device.index >= count:
        has = f"GPUs 0 to {count - 1}" if count else "no GPU that torch can use"
        raise InputError(f'the device is "{device}", and this machine has {has}: use "auto" or "cpu"')
    if device == torch.device("cuda") and count < num_ranks:
        has = "no GPU that torch can use" if count == 0 else f"{count} of them"
        raise InputError(
            f'"cuda" needs a GPU for each of {num_ranks} ranks; this machine has {has}: use "auto" or "cpu"'
        )
    return device


def _require(device: torch.device) -> None:
    import torch

    try:
        if device.type == "meta":
            raise RuntimeError("it holds no numbers")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:  # each kind of device says it in its own way
        why = " ".join(str(error).split())[:200]
        raise InputError(f'the device is "{device}", which this torch cannot use: {why}; use "auto" or "cpu"') from None
