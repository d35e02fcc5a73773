"""The kernel for one token per row in Triton's interpreter, against attention written out in float64."""

from __future__ import annotations

import pytest
import torch

from runtime.ops.kernels import decode_attention as kernels
from runtime.ops.kernels.decode_attention import _tile_and_stages
from tests.runtime.ops.kernels.in_tritons_interpreter import assert_interpreted, needs_triton

CODE = """
import torch
from runtime.execution.fusion.operations import rotated
from runtime.ops.attention import allowed
from runtime.ops.kernels import decode_attention as kernels
from runtime.ops.kernels.float8_rows import from_float8, to_float8

def off(
    heads, kv_heads, width, value_width, slots, positions, *, splits, rotates=False, float8=False, block=0, cut=False,
    **options
):
    torch.manual_seed(0)
    kernels._splits = lambda *given, **named: splits
    batch, group = len(positions), heads // kv_heads
    draw = torch.randn
    q, k, v = draw(batch, heads, 1, width), draw(batch, kv_heads, 1, width), draw(batch, kv_heads, 1, value_width)
    if cut:  # as one product for all three leaves them
        whole = torch.cat([x.transpose(1, 2).flatten(2) for x in (q, k, v)], -1)
        of_each = whole.split([x.shape[1] * x.shape[3] for x in (q, k, v)], -1)
        q, k, v = (of.view(batch, 1, -1, x.shape[3]).transpose(1, 2) for of, x in zip(of_each, (q, k, v)))
        assert not (q.is_contiguous() or k.is_contiguous() or v.is_contiguous())
    parts = [draw(batch, kv_heads, slots, size) for size in (width, value_width)]
    rotation = (draw(batch, 1, 1, width), draw(batch, 1, 1, width), width // 2) if rotates else None
    turned = (rotated(q, *rotation), rotated(k, *rotation)) if rotates else (q, k)
    new = [turned[1], v]
    if float8:
        parts = [each.contiguous() for part in parts for each in to_float8(part)]
        held = [from_float8(*parts[at : at + 2], torch.float64) for at in (0, 2)]
        new = [from_float8(*to_float8(each), torch.float64) for each in new]
    else:
        held = [part.double() for part in parts]
    for row, position in enumerate(positions):
        for kept, own in zip(held, new):
            kept[row, :, position % slots] = own[row, :, 0]
        for part in parts:  # what nobody may look at
            part[row, :, position + 1 :] = 0x7F if part.dtype == torch.uint8 else float("nan")
    given, table = parts, None
    if block:
        count = slots // block
        table = torch.randperm(batch * count + 3)[: batch * count].view(batch, count)
        given = []
        for part in parts:
            buffer = torch.zeros(kv_heads, batch * count + 3, block, part.shape[-1], dtype=part.dtype)
            buffer[:, table] = part.unflatten(2, (count, block)).transpose(0, 1)
            given.append(buffer)
    scales = {"key_scales": given[1], "value_scales": given[3]} if float8 else {}
    at = torch.tensor(positions)[:, None]
    sinks = draw(heads) if options.pop("sinks", False) else None
    out, lse = kernels.decode_attention(
        q, k, v, at, given[0], given[2 if float8 else 1], sinks, scale=0.2, return_lse=True, table=table,
        rotation=rotation, **scales, **options,
    )
    worst = 0.0
    for row, position in enumerate(positions):
        lies = position - (position - torch.arange(slots)) % slots
        seen = allowed(at[row], lies, causal=True, window=options.get("window"), chunk=options.get("chunk"))
        keys, values = (kept[row].repeat_interleave(group, 0) for kept in held)
        scores = turned[0][row].double() @ keys.transpose(-1, -2) * 0.2
        if "softcap" in options:
            scores = torch.tanh(scores / options["softcap"]) * options["softcap"]
        scores = scores.masked_fill(~seen, -torch.inf)
        if sinks is not None:
            scores = torch.cat([scores, sinks.double().view(-1, 1, 1)], -1)
        wanted = torch.softmax(scores, -1)[..., :slots] @ values
        worst = max(worst, float((out[row] - wanted).abs().max()))
        worst = max(worst, float((lse[row] - torch.logsumexp(scores, -1)[:, 0]).abs().max()))
    return worst
"""


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        "8, 2, 64, 64, 300, [0, 63, 64, 299], splits=4, rotates=True",
        "8, 2, 64, 64, 700, [0, 63, 64, 690], splits=5",
        "8, 2, 64, 64, 300, [0, 63, 64, 299], splits=4, rotates=True, cut=True",
        "6, 2, 80, 48, 300, [299, 5], splits=2, cut=True",
        "8, 2, 64, 64, 300, [0, 63, 64, 299], splits=1",
        "6, 2, 80, 48, 300, [299, 5], splits=2, rotates=True, softcap=20.0",
        "16, 1, 96, 64, 700, [650, 64], splits=8, sinks=True",
        "4, 4, 64, 64, 200, [40, 150, 500], splits=2, window=100",
        "4, 2, 64, 64, 256, [40, 150], splits=2, chunk=64, sinks=True",
        "8, 2, 64, 64, 320, [0, 63, 64, 299], splits=4, block=64, rotates=True",
        "8, 2, 64, 64, 320, [0, 63, 64, 299], splits=4, block=16, float8=True",
        "8, 2, 160, 200, 200, [40, 150, 250], splits=2, float8=True, window=100",
    ],
)
def test_a_token_sees_what_it_may(case: str) -> None:
    assert_interpreted(f"{CODE}\nassert off({case}) < 5e-6")


@needs_triton
@pytest.mark.slow
def test_another_rotation_is_noticed() -> None:
    """The negative control."""
    wrong = "right = rotated\nrotated = lambda x, cos, sin, half: right(x, sin, cos, half)"
    assert_interpreted(f"{CODE}\n{wrong}\nassert off(8, 2, 64, 64, 100, [50], splits=1, rotates=True) > 0.1")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shared", [99 << 10, 163 << 10, 227 << 10])
def test_any_head_fits_into_the_memory_of_a_processor(
    dtype: torch.dtype, shared: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_shared", lambda device: shared)
    tiles = {}
    for width in (16, 64, 128, 256):
        for scales in (0, 1, 2) if width > 128 else (0, 1):
            tile, stages = _tile_and_stages(width, width, 16, dtype, (scales, scales), torch.device("cpu"))
            tiles[width, scales] = tile
            assert tile in (16, 32, 64)
            assert stages in (1, 2, 3)
            # what is under way, as it lies in the cache
            under_way = (stages - 1) * tile * 2 * width * (1 if scales else dtype.itemsize)
            assert under_way < shared
    assert tiles[64, 0] == 64
    assert tiles[256, 2] < 64
