"""A rank's shard of a quantised checkpoint: bytes read, memory and time, expanded and as stored.

    stored shard      bytes of the rank's codes, scales and unquantised weights, as the files have them
    read              bytes asked of the files, over the stored shard
    peak              highest Private_Dirty from before loading on, less what was there then (the imports and the trace)

A made-up checkpoint in the shape of a Llama is written into a temporary folder: codes drawn at random, a file a layer.
Each row is a process of its own, which partitions the folder and loads rank 0. Whether peak is at most 1.05 times what
the rank holds and 250 MB is said in the last column.

    python -m benchmarks.compiling.quantized_loading                     1 GB in fp8, then in 4 bits; tp=2 and tp=3
    python -m benchmarks.compiling.quantized_loading --layers 1
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: it reads this once
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig

from benchmarks.loading import peak, private_bytes
from partitioner import Plan, partition
from runtime.weights.load_weights import load_weights
from runtime.weights.read_shards import Reader

HIDDEN, FFN, HEADS, KV_HEADS = 4096, 14336, 32, 8
BLOCK, GROUP = 128, 128
LINEARS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN // HEADS * KV_HEADS, HIDDEN),
    "self_attn.v_proj": (HIDDEN // HEADS * KV_HEADS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (FFN, HIDDEN),
    "mlp.up_proj": (FFN, HIDDEN),
    "mlp.down_proj": (HIDDEN, FFN),
}
CONFIGS = {
    "fp8": {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False},
}
ALLOWED, EXTRA_BYTES = 1.05, 250_000_000
DRAWN_ON = "cuda" if torch.cuda.is_available() else "cpu"


def quantised(form: str, name: str, rows: int, cols: int) -> dict[str, Tensor]:
    def words(*shape: int) -> Tensor:
        return torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, device=DRAWN_ON).cpu()

    if form == "fp8":
        drawn = torch.randint(0, 120, (rows, cols), dtype=torch.uint8, device=DRAWN_ON)
        codes = drawn.cpu().view(torch.float8_e4m3fn)
        scales = torch.rand(-(-rows // BLOCK), -(-cols // BLOCK)) * 1e-4
        return {f"{name}.weight": codes, f"{name}.weight_scale_inv": scales}
    shape = (cols, rows // 8) if form == "awq" else (cols // 8, rows)
    return {
        f"{name}.qweight": words(*shape),
        f"{name}.qzeros": words(cols // GROUP, rows // 8),
        f"{name}.scales": (torch.rand(cols // GROUP, rows) * 1e-3).half(),
    }


def make_checkpoint(folder: Path, form: str, layers: int, vocabulary: int = 1000) -> None:
    """`form`: of CONFIGS."""
    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=layers, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, vocab_size=vocabulary, dtype=torch.bfloat16, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config.to_dict() | {"quantization_config": CONFIGS[form]}))
    places: dict[str, str] = {}

    def put(file: str, tensors: dict[str, Tensor]) -> None:
        save_file(tensors, folder / file, {"format": "pt"})
        places.update(dict.fromkeys(tensors, file))

    table = (torch.randn(vocabulary, HIDDEN) * 0.02).bfloat16()
    ones = torch.ones(HIDDEN, dtype=torch.bfloat16)
    tables = {"model.embed_tokens.weight": table, "lm_head.weight": table.clone(), "model.norm.weight": ones}
    put("model-tables.safetensors", tables)
    for layer in range(layers):
        base = f"model.layers.{layer}"
        norms = {f"{base}.{which}_layernorm.weight": ones.clone() for which in ("input", "post_attention")}
        linears = (quantised(form, f"{base}.{name}", *shape) for name, shape in LINEARS.items())
        put(f"model-{layer}.safetensors", {**norms, **{k: v for each in linears for k, v in each.items()}})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def rank_main(folder: str, plan: str) -> None:
    """One process: prints what it measured as JSON."""
    parts = partition(folder, Plan.parse(plan))
    program = parts.rank(0)
    stored = program if "stored" in plan else partition(folder, Plan.parse(f"{plan},weights=stored")).rank(0)
    assert isinstance(program.source, Reader)
    before, began = private_bytes(), time.perf_counter()
    with peak() as found:
        tensors = load_weights(program.weights, program.weight_data, program.source, torch.device("cpu"))
    seconds = time.perf_counter() - began
    held = sum(tensor.nbytes for tensor in tensors)
    shard = sum(weight.bytes for weight in stored.weights if weight.source == "checkpoint")
    told = {"held": held, "shard": shard, "read": program.source.bytes_read, "s": seconds}
    print(json.dumps(told | {"peak": max(found) - before}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--formats", nargs="+", choices=list(CONFIGS), default=["fp8", "awq", "gptq"])
    parser.add_argument("--rank", nargs=2, metavar=("FOLDER", "PLAN"), help="what a process of ours is started with")
    given = parser.parse_args()
    if given.rank:
        rank_main(*given.rank)
        return
    table = Table("format", "plan", "stored shard", "held", "read", "peak", "seconds", "within")
    for form in given.formats:
        with tempfile.TemporaryDirectory() as folder:
            make_checkpoint(Path(folder), form, given.layers)
            for plan in ("tp=2,weights=stored", "tp=3,weights=stored", "tp=2"):
                command = [sys.executable, "-m", "benchmarks.compiling.quantized_loading", "--rank", folder, plan]
                said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                told = json.loads(said.splitlines()[-1])
                within = told["peak"] <= ALLOWED * told["held"] + EXTRA_BYTES and told["read"] <= 1.1 * told["shard"]
                table.add_row(
                    form, plan, f"{told['shard'] / 1e6:.0f} MB", f"{told['held'] / 1e6:.0f} MB",
                    f"{told['read'] / told['shard']:.3f}", f"{told['peak'] / 1e6:.0f} MB", f"{told['s']:.1f}",
                    "yes" if within else "no",
                )  # fmt: skip
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
