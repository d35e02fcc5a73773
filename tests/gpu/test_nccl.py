"""Results over real NCCL, 2 and 4 ranks, against one rank on the same GPU."""

import json
from pathlib import Path

import pytest
import torch

from runtime.processes.launch import launch
from tests.gpu.nccl_rank import NEW, model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.processes,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def _path(monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config) -> None:
    monkeypatch.setenv("PYTHONPATH", str(pytestconfig.rootpath))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # products in TF32 would differ by the shape of what is multiplied
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")


def ranks(num_ranks: int, folder: Path, *case: str) -> list[dict[str, torch.Tensor]]:
    folder = folder / str(num_ranks)
    folder.mkdir()
    launch(["tests.gpu.nccl_rank", "results", str(folder), *case], num_ranks=num_ranks, timeout_s=400)
    return [torch.load(folder / f"rank-{rank}.pt") for rank in range(num_ranks)]


def alone(family: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The original's logits on the GPU, and in float64."""
    original = model(family, dtype).cuda()
    ids = torch.arange(1, 17).reshape(2, 8).cuda()
    with torch.no_grad():
        logits = original(input_ids=ids, use_cache=False)[0].float().cpu()
    exact = model(family, dtype).to(torch.float64)
    exact.set_experts_implementation("eager")
    with torch.no_grad():
        reference = exact(input_ids=ids.cpu(), use_cache=False)[0].float()
    return logits, reference


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_float32_says_the_same_tokens(family: str, num_ranks: int, tmp_path: Path) -> None:
    logits, _ = alone(family, torch.float32)
    tokens = ranks(1, tmp_path, family, "float32", "eager")[0]["tokens"]
    assert tokens.shape == (2, 5 + NEW)
    for found in ranks(num_ranks, tmp_path, family, "float32", "eager"):
        assert relative(found["logits"], logits) < 1e-5
        assert torch.equal(found["tokens"], tokens)


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_bfloat16_is_as_near_to_the_exact_result_as_one_rank_is(family: str, num_ranks: int, tmp_path: Path) -> None:
    logits, reference = alone(family, torch.bfloat16)
    rounding = relative(logits, reference)
    for found in ranks(num_ranks, tmp_path, family, "bfloat16", "eager"):
        error = relative(found["logits"], reference)
        print(f"{family}, {num_ranks} ranks, bfloat16: {error:.1e} from the exact logits, one rank {rounding:.1e}")
        # partial sums are rounded once more; a router's near-tie may fall the other way for a token
        assert error < (2 if family == "llama" else 4) * rounding


def test_captured_steps_say_the_same_tokens(tmp_path: Path) -> None:
    tokens = ranks(1, tmp_path, "llama", "float32", "eager")[0]["tokens"]
    for found in ranks(2, tmp_path, "llama", "float32", "graph"):
        assert torch.equal(found["tokens"], tokens)


@pytest.mark.parametrize("carrier", ["nccl", "peer memory"])
def test_captured_prompts_say_the_same(carrier: str, tmp_path: Path) -> None:
    if carrier == "peer memory" and torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    launch(["tests.gpu.nccl_rank", "prompts", str(tmp_path), carrier], num_ranks=2, timeout_s=200)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_tokens_over_sp_with_experts_and_stages(num_ranks: int, tmp_path: Path) -> None:
    """Over NCCL, and through the GPUs' own memory where each rank has one."""
    launch(["tests.gpu.nccl_rank", "sequences", str(tmp_path)], num_ranks=num_ranks, timeout_s=400)
    said = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(num_ranks)]
    for of_plan in zip(*said, strict=True):
        errors = [error for _, _, error, _ in of_plan if error is not None]  # stages but the last have no logits
        assert errors, of_plan
        assert max(errors) < 1e-5, of_plan
        assert all(is_alike for *_, is_alike in of_plan), of_plan


@pytest.mark.parametrize("carrier", ["nccl", "peer memory"])
@pytest.mark.parametrize(
    ("plan", "num_ranks"),
    [("pp=2,pipeline.share_head=false", 2), ("pp=2,pipeline.share_head=true", 2), ("pp=3", 3), ("tp=2,pp=2", 4)],
)
def test_many_requests_over_stages(plan: str, num_ranks: int, carrier: str, tmp_path: Path) -> None:
    if carrier == "peer memory" and torch.cuda.device_count() < num_ranks:
        pytest.skip(f"needs {num_ranks} CUDA devices")
    launch(["tests.gpu.nccl_rank", "batches", str(tmp_path), carrier, plan], num_ranks=num_ranks, timeout_s=300)
