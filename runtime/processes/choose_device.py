"""Where ranks run, as a user says it: "auto", "cpu", "cuda", or a torch device.

choose_device("auto", num_ranks=2)    "cuda" where this host has a GPU for each of its ranks, "cpu" otherwise
choose_device("cuda", num_ranks=2)    InputError where it has not
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
    if device == torch.device("cuda") and count < num_ranks:
        has = "no GPU that torch can use" if count == 0 else f"{count} of them"
        raise InputError(
            f'"cuda" needs a GPU for each of {num_ranks} ranks; this machine has {has}: use "auto" or "cpu"'
        )
    return device
