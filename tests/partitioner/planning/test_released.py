"""The bytes of a checkpoint as it is released, by its configuration alone, against files that hold it."""

import json
import tempfile
from pathlib import Path

import pytest

from partitioner import CaptureError
from partitioner.planning.released import released_bytes
from runtime.weights.safetensors_files import TensorFiles
from tests.support import zoo
from tests.supported_models import quantise


@pytest.mark.parametrize(
    ("name", "form"),
    [("llama", "fp8"), ("llama", "awq"), ("llama", "gptq"), ("qwen3_moe", "fp8"), ("gpt_oss", "mxfp4")],
)
def test_bytes_are_those_of_the_files(name: str, form: str) -> None:
    model, _ = zoo.tiny(name, **({"moe_intermediate_size": 96} if name == "qwen3_moe" else {}))
    model = model.bfloat16()
    with tempfile.TemporaryDirectory() as plain, tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(plain)
        quantise.quantise(Path(plain), Path(folder), form)
        files = TensorFiles(folder)
        fields = json.loads(Path(folder, "config.json").read_text())["quantization_config"]
        # an order of columns is told by a few bytes; nothing else is left out
        stored = sum(entry.bytes for entry in files.entries.values() if not entry.name.endswith("g_idx"))
    assert released_bytes(model, fields) == pytest.approx(stored, rel=0.01)


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(CaptureError, match="released by 'aqlm' are not known"):
        released_bytes(zoo.tiny("llama")[0], {"quant_method": "aqlm"})
