"""How the measured rows came about: what load their requests were, and how their engines made up steps.

Nothing here is fitted. The sample names its sources; what each ran is published:

    InferenceMAX (github.com/SemiAnalysisAI, benchmarks/*_h[12]00_*.sh), rows of dated files and of its data base:
        ten waves; lengths spread evenly over 80 to 100% of the ones named (--random-range-ratio 0.8); no cache of
        prefixes; vLLM: steps of 8192 tokens, async scheduling, on H200 a cache of fp8; TensorRT-LLM: Llama 70B steps of
        16384 tokens, for 1024 and 1024 tokens on fewer than 8 GPUs prompts wait up to 20 steps for a fuller one
        (batch_wait_timeout_iters); DeepSeek: prompt + concurrency + 64 tokens, with attention by dp prompts wait up to
        60 steps for one on each rank (attention_dp_config: timeout_iters); SGLang: prompts first, 32768 tokens
    gap-analysis files of aiconfigurator: lengths as named, ten requests for each at a time (github.com/ai-dynamo, eval/
        benchmarks/genai_perf_runner.py of 2025); steps of prompt + concurrency + 500 tokens for TensorRT-LLM, whose
        prompts are not cut, and of prompt + 1500 for vLLM (plus concurrency) and SGLang (aiconfigurator 0.12.0,
        generator/rule_plugin/*.rule)
    engines' defaults: TensorRT-LLM and SGLang make up a step while one runs (overlap scheduler), vLLM from 0.14 on;
        SGLang runs prompts first unless told to mix, as the generator does from 0.5.2 on. Without a cache of prefixes
        it takes requests that ignore the end of text until its prompts' tokens are used up, the last one whole, and
        cuts at 8192 (sglang 0.5.8, managers/schedule_policy.py, add_one_req_ignore_eos; server_args.py)

SGLang 0.5.1 in the gap-analysis rows is taken to run prompts first, since its first tokens come as those of such steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from partitioner.planning.pricing.batching import Load, Scheduler

__all__ = ["cache_dtype_of", "degrees_of", "load_of", "pads_experts", "requests_of", "scheduler_of"]


def is_inferencemax(row: Mapping[str, str]) -> bool:
    return "gap-analysis" not in row["silicon_data_source"]


def requests_of(row: Mapping[str, str]) -> int:
    """At a time, of all ranks of attention's dp; the column has those of one rank."""
    return int(row["batch_size"]) * max(1, int(row["attention_dp_size"] or 1))


def load_of(row: Mapping[str, str]) -> Load:
    return Load(shortest=0.8) if is_inferencemax(row) else Load()


def cache_dtype_of(row: Mapping[str, str], system: str) -> str | None:
    """Checkpoints in fp8 hold scales of the cache, which TensorRT-LLM uses and the others by request only."""
    if row["precision"] != "fp8":
        return None
    by_request = row["backend"] == "vllm" and is_inferencemax(row) and "Llama" in row["model_path"] and system == "H200"
    return "fp8" if row["backend"] == "trtllm" or by_request else None


def degrees_of(row: Mapping[str, str]) -> tuple[int, int, int, int]:
    """tp, dp, ep and etp; InferenceMAX's scripts ran others than their matrix names, and the columns have the matrix's:

    MiniMax M2.5, vLLM 0.18, H200     expert parallelism for any EP_SIZE from 1 on, and the matrix names none
                                      (benchmarks/single_node/minimaxm2.5_fp8_h200.sh at 0f78cf4e, 2026-03-27)
    DeepSeek, TensorRT-LLM, H200      EP_SIZE=$TP; attention by dp above 64 requests, of prompts of 8192 above 32
                                      (benchmarks/dsr1_fp8_h200_trt_slurm.sh at e06929c7, 2025-11-01)
    """
    tp, dp, ep, etp = (
        max(1, int(row[name] or 1)) for name in ("tp_size", "attention_dp_size", "moe_ep_size", "moe_tp_size")
    )
    if is_inferencemax(row) and row["system"].startswith("h200"):
        model, engine = row["model_path"].rpartition("/")[2], row["backend"]
        if model == "MiniMax-M2.5" and engine == "vllm" and row["backend_version"].startswith("0.18."):
            ep, etp = ep * etp, 1
        if model.startswith("DeepSeek") and engine == "trtllm" and not row["backend_version"]:
            ep, etp = ep * etp, 1
            if int(row["batch_size"]) > (32 if row["isl"] == "8192" else 64):
                tp, dp = 1, tp
    return tp, dp, ep, etp


def pads_experts(row: Mapping[str, str]) -> bool:
    """Whether experts are multiplied as `engine_kernels.ContiguousExperts` says."""
    old = row["backend"] == "vllm" and row["backend_version"].startswith("0.12.")
    return old and row["precision"] == "fp8" and int(row["moe_tp_size"] or row["tp_size"]) < 8


def scheduler_of(row: Mapping[str, str]) -> Scheduler:
    engine, version = row["backend"], row["backend_version"]
    prompt, new, batch = int(row["isl"]), int(row["osl"]), requests_of(row)
    if is_inferencemax(row):
        if engine == "vllm":
            return Scheduler(budget=8192)
        if engine == "sglang":
            return Scheduler(budget=32768, mixed=False)
        if "Llama" not in row["model_path"]:
            patience = 60 if degrees_of(row)[1] > 1 else 0
            return Scheduler(budget=prompt + batch + 64, chunked=False, patience=patience)
        waits = prompt == new == 1024 and int(row["tp_size"]) < 8
        return replace(Scheduler(budget=16384, chunked=False), patience=20 if waits else 0)
    if engine == "vllm":
        return Scheduler(budget=prompt + batch + 1500, ahead=0)
    if engine == "sglang":
        return Scheduler(budget=prompt + 1500, most=8192, mixed=not version.startswith("0.5.1"))
    return Scheduler(budget=prompt + batch + 500, chunked=False)
