"""A rank's shard of a quantised checkpoint: bytes read, memory and time, expanded and as stored.

    stored shard      bytes of the rank's codes, scales and unquantised weights, as the files have them
    read              bytes asked of the files, over the stored shard
    peak              highest Private_Dirty from before loading on, less what was there then (the imports and the trace)

A made-up checkpoint is written into a temporary folder: codes drawn at random, a file a layer, in the shape of a Llama;
of mxfp4 in that of gpt-oss, and of fp8-experts in that of a Qwen3-MoE, whose ranks are those of experts too.
Each row is a process of its own, which partitions the folder and loads rank 0. Whether peak is at most 1.05 times what
the rank holds and 250 MB is said in the last column.

    python -m benchmarks.compiling.quantized_loading               1 GB in fp8, then in 4 bits; tp=2, tp=3 and ep=2
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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: it reads this once
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor
from transformers import GptOssConfig, LlamaConfig, PreTrainedConfig, Qwen3MoeConfig

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
EXPERTS = {
    "mxfp4": {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router"],
    },
    "fp8-experts": CONFIGS["fp8"],
}
PLANS = ("tp=2,weights=stored", "tp=3,weights=stored", "tp=2")
EXPERT_PLANS = ("ep=2,weights=stored", "tp=3,weights=stored", "ep=2")
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
    """`form`: of CONFIGS or EXPERTS."""
    sizes: dict[str, Any] = {"num_hidden_layers": layers, "vocab_size": vocabulary, "dtype": torch.bfloat16}
    config: PreTrainedConfig
    if form == "mxfp4":
        config = GptOssConfig(**sizes, num_local_experts=32, architectures=["GptOssForCausalLM"])
    elif form == "fp8-experts":
        config = Qwen3MoeConfig(
            **sizes, hidden_size=2048, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8, head_dim=128,
            num_attention_heads=32, num_key_value_heads=4, architectures=["Qwen3MoeForCausalLM"],
        )  # fmt: skip
    else:
        config = LlamaConfig(
            **sizes, hidden_size=HIDDEN, intermediate_size=FFN, num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS, architectures=["LlamaForCausalLM"],
        )  # fmt: skip
    fields = CONFIGS[form] if form in CONFIGS else EXPERTS[form]
    (folder / "config.json").write_text(json.dumps(config.to_dict() | {"quantization_config": fields}))
    places: dict[str, str] = {}

    def put(file: str, tensors: dict[str, Tensor]) -> None:
        save_file(tensors, folder / file, {"format": "pt"})
        places.update(dict.fromkeys(tensors, file))

    table = (torch.randn(vocabulary, config.hidden_size) * 0.02).bfloat16()
    ones = torch.ones(config.hidden_size, dtype=torch.bfloat16)
    tables = {"model.embed_tokens.weight": table, "lm_head.weight": table.clone(), "model.norm.weight": ones}
    put("model-tables.safetensors", tables)
    for layer in range(layers):
        base = f"model.layers.{layer}"
        norms = {f"{base}.{which}_layernorm.weight": ones.clone() for which in ("input", "post_attention")}
        if form in CONFIGS:
            linears = [quantised(form, f"{base}.{name}", *shape) for name, shape in LINEARS.items()]
        else:
            linears = mxfp4_layer(base, config) if form == "mxfp4" else fp8_layer(base, config)
        put(f"model-{layer}.safetensors", {**norms, **{k: v for each in linears for k, v in each.items()}})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def attention(base: str, config: Any, names: Sequence[str] = "qkvo") -> dict[str, tuple[int, int]]:
    queries, keys = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    outputs = {"q": queries, "k": keys, "v": keys}
    shapes = {name: (outputs[name], config.hidden_size) for name in "qkv"} | {"o": (config.hidden_size, queries)}
    return {f"{base}.self_attn.{name}_proj": shapes[name] for name in names}


def mxfp4_layer(base: str, config: Any) -> Iterator[dict[str, Tensor]]:
    """The experts in MXFP4, [E, outputs, inputs / 32, 16]; the rest in 16 bits."""

    def plain(*shape: int) -> Tensor:
        return (torch.randn(shape) * 0.02).bfloat16()

    for name, (rows, cols) in attention(base, config).items():
        yield {f"{name}.weight": plain(rows, cols), f"{name}.bias": plain(rows)}
    hidden, ffn, experts = config.hidden_size, config.intermediate_size, config.num_local_experts
    yield {f"{base}.self_attn.sinks": plain(config.num_attention_heads)}
    yield {f"{base}.mlp.router.weight": plain(experts, hidden), f"{base}.mlp.router.bias": plain(experts)}
    for name, rows, cols in (("gate_up_proj", 2 * ffn, hidden), ("down_proj", hidden, ffn)):
        found = f"{base}.mlp.experts.{name}"
        yield {
            f"{found}_blocks": torch.randint(0, 256, (experts, rows, cols // 32, 16), dtype=torch.uint8),
            f"{found}_scales": torch.randint(110, 125, (experts, rows, cols // 32), dtype=torch.uint8),
            f"{found}_bias": plain(experts, rows),
        }


def fp8_layer(base: str, config: Any) -> Iterator[dict[str, Tensor]]:
    """Each expert's linears by themselves."""
    for name, (rows, cols) in attention(base, config).items():
        yield quantised("fp8", name, rows, cols)
    for name in ("q_norm", "k_norm"):
        yield {f"{base}.self_attn.{name}.weight": torch.ones(config.head_dim, dtype=torch.bfloat16)}
    yield {f"{base}.mlp.gate.weight": (torch.randn(config.num_experts, config.hidden_size) * 0.02).bfloat16()}
    wide, narrow = config.hidden_size, config.moe_intermediate_size
    for expert in range(config.num_experts):
        for name, rows, cols in (("gate", narrow, wide), ("up", narrow, wide), ("down", wide, narrow)):
            yield quantised("fp8", f"{base}.mlp.experts.{expert}.{name}_proj", rows, cols)


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
    parser.add_argument("--formats", nargs="+", choices=[*CONFIGS, *EXPERTS], default=[*CONFIGS, *EXPERTS])
    parser.add_argument("--rank", nargs=2, metavar=("FOLDER", "PLAN"), help="what a process of ours is started with")
    given = parser.parse_args()
    if given.rank:
        rank_main(*given.rank)
        return
    table = Table("format", "plan", "stored shard", "held", "read", "peak", "seconds", "within")
    for form in given.formats:
        with tempfile.TemporaryDirectory() as folder:
            make_checkpoint(Path(folder), form, given.layers if form in CONFIGS else max(1, given.layers // 2))
            for plan in PLANS if form in CONFIGS else EXPERT_PLANS:
                command = [sys.executable, "-m", "benchmarks.compiling.quantized_loading", "--rank", folder, plan]
                said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                told = json.loads(said.splitlines()[-1])
                print(f"{form} {plan}: {told}", file=sys.stderr, flush=True)  # a run takes minutes
                within = told["peak"] <= ALLOWED * told["held"] + EXTRA_BYTES and told["read"] <= 1.1 * told["shard"]
                table.add_row(
                    form, plan, f"{told['shard'] / 1e6:.0f} MB", f"{told['held'] / 1e6:.0f} MB",
                    f"{told['read'] / told['shard']:.3f}", f"{told['peak'] / 1e6:.0f} MB", f"{told['s']:.1f}",
                    "yes" if within else "no",
                )  # fmt: skip
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
