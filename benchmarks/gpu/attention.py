"""Attention of an 8B model's layer (32 query heads, 8 kv heads of 128, bfloat16) behind long texts, on one GPU.

    one token       8k, 64k and 256k keys in the cache: bytes of the cache over the time, against the memory's speed
    in fp8          the same, keys and values held as float8 with a scale per token and head
    latents         those of a DeepSeek-V3 layer, 512 and 64 numbers of a token, once for 128 heads or for the 16 of
                    one of 8 ranks; in bfloat16 and fp8; of 16 heads also against the keys and values they stand for
    a prompt        64k tokens in pieces of 8k behind each other, against all of them at once

In CUDA graphs, the median of some rounds; each call reads another layer's cache, so that nothing is read from L2.

    python -m benchmarks.gpu.attention
    python -m benchmarks.gpu.attention --only fp8 latents
"""

from __future__ import annotations

import argparse
import functools
import statistics
import unittest.mock
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.support.single_tokens import measured_speed
from runtime.ops.kernels import decode_attention as kernel_module
from runtime.ops.kernels.decode import latent_decode as latent_module
from runtime.ops.kernels.decode.latent_decode import latent_decode
from runtime.ops.kernels.decode_attention import decode_attention
from runtime.ops.kernels.flash_attention import flash_attention
from runtime.ops.kernels.float8_rows import to_float8

HEADS, KV_HEADS, WIDTH = 32, 8, 128
LATENT, CARRIED, KEY = 512, 64, 192


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
        tell(f"one token, {batch:3} x {length:6} keys", took, 2 * keys[0].nbytes, speed)


@torch.no_grad()
def in_float8(speed: float) -> None:
    for batch, length in ((1, 8192), (1, 65536), (1, 262144), (8, 8192), (32, 8192)):
        layers = max(2, min(64, 2**31 // (batch * length * KV_HEADS * WIDTH * 4)))
        held = [(*float8(batch, length), *float8(batch, length)) for _ in range(layers)]
        q, new = draw(batch, HEADS, 1, WIDTH), draw(batch, KV_HEADS, 1, WIDTH)
        at = torch.full((batch, 1), length - 1, device="cuda")

        took = milliseconds(functools.partial(over_float8, q, new, at, held), graph=True) / layers
        tell(f"one token in fp8, {batch:3} x {length:6} keys", took, sum(part.nbytes for part in held[0]), speed)


@torch.no_grad()
def latents(speed: float) -> None:
    sizes = ((1, 1024), (1, 32768), (1, 131072), (32, 8192))
    for heads, (batch, length) in ((heads, size) for heads in (16, 128) for size in sizes):
        layers = max(2, min(64, 2**31 // (batch * length * (LATENT + CARRIED) * 2)))
        q, new = draw(batch, heads, 1, LATENT + CARRIED), draw(batch, 1, LATENT + CARRIED)
        at = torch.full((batch, 1), length - 1, device="cuda")
        rows = [draw(batch, 1, length, LATENT + CARRIED) for _ in range(layers)]
        codes = [[part.contiguous() for part in to_float8(each)] for each in rows]
        times = {}
        for name, held in (("bfloat16", [[each, None] for each in rows]), ("fp8", codes)):
            times[name] = milliseconds(functools.partial(over_latents, q, new, at, held), graph=True) / layers
            num_bytes = sum(part.nbytes for part in held[0] if part is not None)
            tell(f"{heads:3} heads over latents, {name:8}, {batch:3} x {length:6}", times[name], num_bytes, speed)
        if heads == 16 and batch == 1:
            took = expanded(heads, length)
            print(
                f"    their keys and values: {took * 1e3:8.1f} us; latents take {times['bfloat16'] / took:.2f} of that"
            )


def over_latents(q: Tensor, new: Tensor, at: Tensor, held: list[list[Tensor | None]]) -> None:
    for rows, scales in held:
        assert rows is not None
        latent_decode(q, new, at, rows, latent=LATENT, scale=0.1, scales=scales)


def expanded(heads: int, length: int) -> float:
    """Milliseconds of one token over keys and values of heads of their own."""
    layers = max(2, min(64, 2**32 // (length * heads * 2 * (KEY + WIDTH))))
    held = [(draw(1, heads, length, KEY), draw(1, heads, length, WIDTH)) for _ in range(layers)]
    q, k, v = draw(1, heads, 1, KEY), draw(1, heads, 1, KEY), draw(1, heads, 1, WIDTH)
    at = torch.full((1, 1), length - 1, device="cuda")

    def step() -> None:
        for keys, values in held:
            decode_attention(q, k, v, at, keys, values, scale=0.1)

    return milliseconds(step, graph=True) / layers


def float8(batch: int, length: int) -> tuple[Tensor, Tensor]:
    codes, scales = to_float8(draw(batch, KV_HEADS, length, WIDTH))
    return codes.contiguous(), scales


def tell(what: str, took: float, num_bytes: int, speed: float) -> None:
    """took: milliseconds."""
    print(
        f"{what}: {took * 1e3:8.1f} us  {num_bytes / took / 1e9:5.2f} TB/s = {num_bytes / took * 1e3 / speed:4.0%} of "
        "the memory's speed",
        flush=True,
    )


LAUNCHES = {
    16: ((32, 3, 4, 16, 1), (32, 3, 4, 16, 2), (64, 2, 4, 16, 2), (64, 3, 8, 16, 1), (32, 2, 4, 16, 3)),
    128: ((32, 2, 8, 64, 1), (64, 2, 8, 64, 1), (32, 3, 8, 64, 1)),
}
"""By heads: tile, stages, warps, heads of a program, programs for each processor."""


@torch.no_grad()
def launches(speed: float) -> None:
    """One text of 32k by how kernels are launched: over latents, and over keys and values in fp8."""
    length = 32768
    at = torch.full((1, 1), length - 1, device="cuda")
    q, new = draw(1, HEADS, 1, WIDTH), draw(1, KV_HEADS, 1, WIDTH)
    quantised = [(*float8(1, length), *float8(1, length)) for _ in range(8)]
    num_bytes = sum(part.nbytes for part in quantised[0])
    for warps, stages, each in ((4, 3, 1), (4, 3, 2), (4, 3, 4), (8, 3, 2)):
        launch = {"_WARPS": warps, "_STAGES": stages, "_PER_PROCESSOR_FLOAT8": each}
        with unittest.mock.patch.multiple(kernel_module, **launch):
            took = milliseconds(functools.partial(over_float8, q, new, at, quantised), graph=True) / len(quantised)
        tell(f"fp8, {warps} warps, {stages} stages, {each} for each processor", took, num_bytes, speed)
    for heads, choices in LAUNCHES.items():
        q, new = draw(1, heads, 1, LATENT + CARRIED), draw(1, 1, LATENT + CARRIED)
        held: list[list[Tensor | None]] = [[draw(1, 1, length, LATENT + CARRIED), None] for _ in range(8)]
        for tile, stages, warps, most, each in choices:
            launch = {
                "_TILES": {q.dtype: tile}, "_WARPS": {most: warps}, "_STAGES": {most: stages}, "_MOST_HEADS": most,
                "_PER_PROCESSOR": {most: each},
            }  # fmt: skip
            with unittest.mock.patch.multiple(latent_module, **launch):
                took = milliseconds(functools.partial(over_latents, q, new, at, held), graph=True) / len(held)
            name = f"{heads} heads, {most} of a program, tiles of {tile}, {stages} stages, {warps} warps, {each} each"
            tell(name, took, length * (LATENT + CARRIED) * 2, speed)


def over_float8(q: Tensor, new: Tensor, at: Tensor, held: list[tuple[Tensor, ...]]) -> None:
    for k, of_k, v, of_v in held:
        decode_attention(q, new, new, at, k, v, scale=0.1, key_scales=of_k, value_scales=of_v)


@torch.no_grad()
def prompt(speed: float) -> None:
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


PARTS: dict[str, Callable[[float], None]] = {
    "one_token": one_token, "fp8": in_float8, "latents": latents, "prompt": prompt, "launches": launches,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Attention behind long texts on a GPU.")
    every = [name for name in PARTS if name != "launches"]
    parser.add_argument("--only", nargs="+", choices=PARTS, default=every, help="some of the rows")
    given = parser.parse_args()
    speed = measured_speed()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, measured {speed / 1e12:.2f} TB/s", flush=True)
    for name in given.only:
        PARTS[name](speed)


if __name__ == "__main__":
    main()
