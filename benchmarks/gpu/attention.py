"""Attention of an 8B model's layer (32 query heads, 8 kv heads of 128, bfloat16) behind long texts, on one GPU.

    one token       8k, 64k and 256k keys in the cache: bytes of the cache over the time, against the memory's speed
    a prompt        64k tokens in pieces of 8k behind each other, against all of them at once

In CUDA graphs, the median of some rounds; each call reads another layer's cache, so that nothing is read from L2.

    python -m benchmarks.gpu.attention
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu.decode import measured_speed
from runtime.ops.kernels.decode_attention import decode_attention
from runtime.ops.kernels.flash_attention import flash_attention

HEADS, KV_HEADS, WIDTH = 32, 8, 128


def milliseconds(call: Callable[[], object], *, graph: bool) -> float:
    call()
    torch.cuda.synchronize()
    run: Callable[[], object] = call
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            call()
        run = captured.replay
    times = []
    for _ in range(11):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


@torch.no_grad()
def one_token(speed: float) -> None:
    for batch, length in ((1, 1024), (1, 8192), (1, 65536), (1, 262144), (8, 8192), (32, 8192)):
        layers = max(2, min(64, 2**30 // (batch * length * KV_HEADS * WIDTH * 4)))
        keys = [draw(batch, KV_HEADS, length, WIDTH) for _ in range(layers)]
        values = [draw(batch, KV_HEADS, length, WIDTH) for _ in range(layers)]
        q, new = draw(batch, HEADS, 1, WIDTH), draw(batch, KV_HEADS, 1, WIDTH)
        at = torch.full((batch, 1), length - 1, device="cuda")

        def step(
            keys: list[Tensor] = keys, values: list[Tensor] = values, q: Tensor = q, new: Tensor = new, at: Tensor = at
        ) -> None:
            for k, v in zip(keys, values, strict=True):
                decode_attention(q, new, new, at, k, v, scale=0.1)

        took = milliseconds(step, graph=True) / layers
        num_bytes = 2 * keys[0].nbytes
        print(
            f"one token, {batch:3} x {length:6} keys: {took * 1e3:8.1f} us  {num_bytes / took / 1e9:5.2f} TB/s = "
            f"{num_bytes / took * 1e3 / speed:4.0%} of the memory's speed"
        )


@torch.no_grad()
def prompt() -> None:
    length, piece = 65536, 8192
    q, k, v = draw(1, HEADS, length, WIDTH), draw(1, KV_HEADS, length, WIDTH), draw(1, KV_HEADS, length, WIDTH)
    whole = milliseconds(
        lambda: scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.1, enable_gqa=True), graph=False
    )

    def in_pieces() -> None:
        for start in range(0, length, piece):
            end = start + piece
            flash_attention(q[:, :, start:end], k[:, :, :end], v[:, :, :end], scale=0.1)

    pieces = milliseconds(in_pieces, graph=False)
    rate = 2 * length * length * HEADS * WIDTH / 1e9
    print(
        f"a prompt of {length}: at once {whole:.1f} ms ({rate / whole:.0f} TFLOP/s), in pieces of {piece} {pieces:.1f} "
        f"ms: {pieces / whole:.2f} times"
    )


def main() -> None:
    speed = measured_speed()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, measured {speed / 1e12:.2f} TB/s")
    one_token(speed)
    prompt()


if __name__ == "__main__":
    main()
