"""Memory of a prompt whose tokens are shared out over sp, on one rank: what is alive at its peak, and its cache.

    alive     the most bytes of results at the same time in the run of the prompt's last piece, by a CPU's ops
    cache     what the rank sets aside for the prompt's keys and values

Nothing is computed and no rank is started: a rank's program for prompts, its cache and its attention run as they are,
on tensors that have sizes and no numbers, and what comes from other ranks has the sizes that they would send. The shape
is Llama-3-8B's in bfloat16, of which two layers are run. One rank over sp: n is ideal. Pieces are of --step tokens; 0
is the whole prompt at once.

    python -m benchmarks.generation.sequence_memory [--tokens 8192 32768 131072] [--ranks 2 4 8] [--way ring] [--step 0]
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.sequences import Peak
from partitioner import Parts, Plan, partition
from runtime.communication.channels import Channel, Handle, piece_sizes
from runtime.communication.communicator import Communicator
from runtime.execution.profile import Profiler
from runtime.execution.prompts.piece import Piece
from runtime.generation.steps import Loaded, Steps
from runtime.kv_cache.sharded_cache import cache_for
from runtime.ops.communicating import Axes, Kind
from runtime.program.rank_program import RankProgram

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    "hidden_size": 4096, "num_hidden_layers": 2, "num_attention_heads": 32, "num_key_value_heads": 8,
    "intermediate_size": 14336, "vocab_size": 128256, "max_position_embeddings": 131072, "rope_theta": 500000.0,
    "eos_token_id": None, "bos_token_id": None,
}  # fmt: skip


class SizesOnly(Channel):
    """What comes is as large as what was sent, or as the others' pieces are said to be."""

    def prepare(self, kind: Kind, *, overwrite: bool = False, **options: Any) -> Callable[..., Any]:
        return {
            "all_reduce": torch.empty_like,
            "all_gather": lambda x: self._joined(x, **options),
            "reduce_scatter": lambda x: self._piece(x, **options),
            "all_to_all": lambda x, out, back: x.new_empty(sum(back), *x.shape[1:]),
            "permute": lambda x: Handle.done(torch.empty_like(x)),
        }[kind]

    def _joined(self, x: Tensor, dim: int, sizes: Sequence[int] | None = None) -> Tensor:
        shape = list(x.shape)
        shape[dim] = shape[dim] * len(self.ranks) if sizes is None else sum(sizes)
        return x.new_empty(shape)

    def _piece(self, x: Tensor, dim: int, sizes: Sequence[int] | None = None) -> Tensor:
        shape = list(x.shape)
        shape[dim] = piece_sizes(x, dim, sizes, self)[self.coordinate]
        return x.new_empty(shape)


class Alone(Communicator):
    """The first rank of a mesh, whose others are not there."""

    def __init__(self, program: RankProgram) -> None:
        self.mesh, self.rank = program.mesh, program.rank

    def channel(self, axes: Axes, *, node: str) -> Channel:
        named = (axes,) if isinstance(axes, str) else tuple(axes)
        return SizesOnly(named, self.mesh.group(named, self.rank), self.rank, node=node)

    traceable_channel = channel

    def begin_run(self, *, new_shapes: bool) -> None:
        """Nothing is compared."""

    def explained(self, error: BaseException) -> BaseException:
        return error

    def abort(self, error: BaseException) -> None:
        """Nobody waits."""

    def barrier(self) -> None:
        """Nobody comes."""

    def close(self) -> None:
        """Nothing is open."""


def memory_of(parts: Parts[Any], tokens: int, step: int) -> tuple[int, int]:
    """Bytes that are alive at the peak of the last piece of a prompt, and of the cache, on the first rank."""
    program = parts.entry("prefill", 0)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        weights = [torch.empty(weight.local_shape, dtype=weight.dtype) for weight in program.weights]
        loaded = Loaded(program, weights)
        cache = cache_for(program, max_batch=1, max_length=tokens, step=step, device=CPU)
        steps = Steps(loaded, loaded, cache, Alone(program), CPU, Profiler(program, CPU))
        *before, last = (Piece([[3] * min(step, tokens - at)], [at], (True,)) for at in range(0, tokens, step))
        for piece in before:  # whose tokens are kept where they would be
            cache.begin(steps._inputs(piece, decode=False)[0])
        with Peak() as seen:
            steps.run(last)
    return seen.most, cache.bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 16384, 32768, 65536, 131072])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--way", choices=["ring", "gather", "ulysses"], default="ring")
    parser.add_argument("--step", type=int, default=0)
    given = parser.parse_args()
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SIZES, attn_implementation="sdpa")).to(torch.bfloat16).eval()
    plans = {n: Plan(sp=n, sp_attention=given.way if n > 1 else "auto") for n in (1, *given.ranks)}
    parts = {n: partition(model, plan, max_length=max(given.tokens)) for n, plan in plans.items()}
    pieces = f"pieces of {given.step}" if given.step else "at once"
    print(f"prompts {pieces}, by {given.way}: MiB alive and MiB of cache on a rank, and how often one rank has them")
    for tokens in given.tokens:
        line, whole = f"{tokens:7d} tokens", (0, 0)
        for n in plans:
            found = memory_of(parts[n], tokens, min(given.step or tokens, tokens))
            whole = whole if n > 1 else found
            less = "" if n == 1 else " ({:.2f}x, {:.2f}x)".format(*(a / b for a, b in zip(whole, found, strict=True)))
            line += "   sp={}: {:.0f}, {:.0f}".format(n, *(each / 2**20 for each in found)) + less
        print(line, flush=True)


if __name__ == "__main__":
    main()
