"""benchmarks/planning/silicon: how rows of the public sample are read, and which are not what their columns say."""

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.planning.silicon import engine_kernels
from benchmarks.planning.silicon.engine_kernels import ContiguousExperts, TableExperts
from benchmarks.planning.silicon.loads import degrees_of, pads_experts, requests_of
from benchmarks.planning.silicon.rows import _named_tp, _without
from partitioner.planning.kernels import Grouped, kernels_of
from partitioner.planning.pricing.batching import Curve


def row(**fields: Any) -> SimpleNamespace:
    usual = {"model": "m", "engine": "e", "prompt": 8, "new": 8, "ttft": 1.0, "tpot": 0.1, "gpus": 8, "named_tp": 8,
             "source": "s", "of_peak": 0.3, "of_memory": 0.9, "drafted": False}  # fmt: skip
    return SimpleNamespace(**(usual | fields))


def kept(*rows: SimpleNamespace) -> tuple[list[SimpleNamespace], Counter[str]]:
    left: Counter[str] = Counter()
    return list(_without(rows, left)), left  # type: ignore[arg-type]


@pytest.mark.parametrize(("dp", "requests"), [("", 16), ("1", 16), ("8", 128)])
def test_a_row_has_the_requests_of_all_ranks_of_dp(dp: str, requests: int) -> None:
    assert requests_of({"batch_size": "16", "attention_dp_size": dp}) == requests


@pytest.mark.parametrize(
    ("identity", "named"), [("a_c32_tp4_ep4_1", 4), ("a_c32_tp8_0_ep8_0_1", 8), ("a_c64_cfg83", 16)]
)
def test_an_identity_names_its_ranks_or_none(identity: str, named: int) -> None:
    assert _named_tp({"id": identity}, 16) == named


def test_rows_that_are_not_what_they_say_are_counted_apart() -> None:
    good = row()
    assert kept(good) == ([good], Counter())
    assert kept(good, row(gpus=16, named_tp=4, ttft=2.0))[1] == {"degrees in doubt (16 GPUs)": 1}
    assert kept(good, row(gpus=64, named_tp=64))[1] == {"degrees in doubt (64 GPUs)": 1}
    assert kept(row(gpus=16, named_tp=16))[1] == {}
    assert kept(good, row(drafted=True))[1] == {"tokens drafted": 1}
    assert kept(good, row(of_peak=0.8, source="other"))[1] == {"prompts from a cache": 1}
    assert kept(good, row(of_memory=1.01)) == ([good], Counter({"faster than memory": 1}))


@pytest.mark.parametrize(
    ("version", "precision", "tp", "padded"),
    [
        ("0.12.0", "fp8", "4", True),
        ("0.18.0", "fp8", "4", False),
        ("0.12.0", "", "4", False),
        ("0.12.0", "fp8", "8", False),
    ],
)
def test_which_rows_multiply_experts_padded(version: str, precision: str, tp: str, padded: bool) -> None:
    told = {"backend": "vllm", "backend_version": version, "precision": precision, "tp_size": tp, "moe_tp_size": tp}
    assert pads_experts(told) is padded
    assert not pads_experts(told | {"backend": "sglang"})


def test_padded_experts_take_as_long_with_few_tokens_as_with_more() -> None:
    plain = kernels_of("H200", 4800e9, {"bfloat16": 989e12, "float8_e4m3fn": 1979e12}, fitted="h200_sxm")
    padded = ContiguousExperts.of(plain)

    def seconds(kernels: Any, rows: float) -> float:
        flops, moved = 6 * rows * 4096 * 768, 3 * min(rows, 128) * 4096 * 768
        return float(kernels.experts(Grouped(rows, 128, 4096, 768, flops, moved, "float8_e4m3fn")))

    assert seconds(padded, 160) == pytest.approx(seconds(padded, 32), rel=0.02)
    assert seconds(plain, 160) > 1.5 * seconds(plain, 32)
    # the published speeds that its two constants are of
    tile = 2 * 128 * 128 / 1e12
    for summed, tflops in ((7168, 1297), (2048, 1099)):
        took = summed / 128 * engine_kernels.STEP_S + engine_kernels.END_S
        assert tile * summed * engine_kernels.PROCESSORS / took == pytest.approx(tflops, rel=0.01)
    assert padded.experts(Grouped(0, 128, 4096, 768, 0, 0, "bfloat16")) == 0


@pytest.mark.parametrize(
    ("model", "backend", "version", "isl", "batch", "source", "degrees"),
    [
        ("MiniMax-M2.5", "vllm", "0.18.0", "1024", "4", "db-dump", (8, 1, 8, 1)),
        ("MiniMax-M2.5", "vllm", "0.16.0", "1024", "4", "db-dump", (8, 1, 1, 8)),
        ("MiniMax-M2.5", "vllm", "0.18.0", "1024", "4", "gap-analysis", (8, 1, 1, 8)),
        ("DeepSeek-V3", "trtllm", "", "8192", "32", "db-dump", (8, 1, 8, 1)),
        ("DeepSeek-V3", "trtllm", "", "8192", "64", "db-dump", (1, 8, 8, 1)),
        ("DeepSeek-V3", "trtllm", "", "1024", "64", "db-dump", (8, 1, 8, 1)),
        ("DeepSeek-V3", "sglang", "0.5.9", "8192", "64", "db-dump", (8, 1, 1, 8)),
    ],
)
def test_degrees_are_those_that_a_script_ran(
    model: str, backend: str, version: str, isl: str, batch: str, source: str, degrees: tuple[int, ...]
) -> None:
    told = {"model_path": f"org/{model}", "backend": backend, "backend_version": version, "isl": isl,
            "batch_size": batch, "silicon_data_source": source, "system": "h200_sxm", "tp_size": "8",
            "attention_dp_size": "1", "moe_ep_size": "1", "moe_tp_size": "8"}  # fmt: skip
    assert degrees_of(told) == degrees


def test_experts_take_what_their_own_table_says() -> None:
    plain = kernels_of("H200", 4.8e12, {"bfloat16": 989e12}, fitted="h200_sxm")
    times = {(4, 3072, 1536, 8, 256, 1): Curve((512, 1024), (1e-3, 2e-3))}
    own = TableExperts.of(plain, times, (4, 8, 256, 1))
    other = TableExperts.of(plain, times, (1, 8, 256, 4))

    def experts(tokens: int) -> Grouped:
        return Grouped(8.0 * tokens, 256, 3072, 384, 1e12, 1e9, "bfloat16")

    assert own.experts(experts(768)) == pytest.approx(1.5e-3)
    assert other.experts(experts(768)) == plain.experts(experts(768))
    assert own.experts(experts(0)) == 0.0
