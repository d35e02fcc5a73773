"""Scripts that set a default device: what is made here lies on the host, what they make lies where they say.

Their default is "meta" here, where nothing has a value: whatever were made there by mistake would be no use.
"""

from pathlib import Path

import pytest
import torch

from partitioner import CacheSize, Plan, choose_plan, load, partition
from partitioner.planning.quantities import Workload
from runtime.program.host_default import host_default, host_default_steps
from tests.support import zoo


@pytest.mark.parametrize(("family", "plan"), [("llama", "tp=2,pp=2"), ("mixtral", "dp=2,ep=2")])
def test_a_scripts_default_device_is_its_own(family: str, plan: str, tmp_path: Path) -> None:
    model, ids = zoo.tiny(family)
    model.set_experts_implementation("eager")
    prompt = ids[:, :5]
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False)[0]
        tokens = model.generate(prompt, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": []}
    with torch.device("meta"):
        parts = partition(model, Plan.parse(plan))
        torch.testing.assert_close(parts.simulate(input_ids=ids), logits, rtol=0, atol=1e-10)
        parts.reserve(CacheSize(max_batch=2, max_length=16))
        assert torch.equal(parts.generate(prompt, **options), tokens)
        said = []
        for step in parts.stream(prompt, **options):
            said.append(step.tokens)
            assert torch.empty(0).device.type == "meta"
        parts.save(tmp_path / "saved")
        assert torch.equal(load(tmp_path / "saved").generate(prompt, **options), tokens)
        assert choose_plan(model, "2xH200", Workload(prompt=8, new=4, batch=2)).mesh.world_size <= 2
    assert [list(row) for row in zip(*said, strict=True)] == tokens[:, 5:].tolist()
    assert torch.empty(0).device.type == "cpu"


def test_what_a_script_advances_is_left_in_order() -> None:
    closed = []

    def steps():  # type: ignore[no-untyped-def]
        try:
            for _ in range(3):
                yield torch.empty(0).device.type
        finally:
            closed.append(torch.empty(0).device.type)

    plain = steps()
    assert host_default_steps(plain) is plain, "nothing is done where the default is the host's"
    with torch.device("meta"):
        taken = host_default_steps(steps())
        assert next(taken) == "cpu"
        assert torch.empty(0).device.type == "meta"
        taken.close()  # type: ignore[attr-defined]
        assert list(host_default_steps(steps())) == ["cpu"] * 3
        assert host_default(lambda: torch.empty(0).device.type)() == "cpu"
    assert closed == ["cpu", "cpu"]
