"""What opening a folder yields, against from_pretrained, and what is refused."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from partitioner import CaptureError, Plan, WeightError, partition
from partitioner.storage.checkpoint.open_checkpoint import open_checkpoint
from partitioner.storage.checkpoint.strided_windows import permute
from tests.support import zoo
from tests.supported_models import checkpoints


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved(tmp_path / "checkpoint", "llama")


def saved(folder: Path, name: str, *, max_shard_size: str = "1GB", **overrides: Any) -> Path:
    zoo.tiny(name, **overrides)[0].float().save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def configure(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "gpt2",
        "mixtral",
        pytest.param("qwen3_moe", marks=pytest.mark.slow),
        "deepseek_v3",
        "gpt_oss",
        "granitemoe",
        "mamba2",
        "recurrent_gemma",
        "masked:bert",
        pytest.param("hy_v4", marks=pytest.mark.slow),
    ],
)
def test_every_weight_has_the_bits_of_from_pretrained(name: str) -> None:
    """In the stored dtype, in bfloat16 and in float16, where some stay in float32; in many small files."""
    verdict, line = checkpoints.survey(name)
    assert verdict == "equal", line


def test_the_comparison_sees_a_wrong_origin(folder: Path) -> None:
    opened = open_checkpoint(folder)
    expected = type(opened.model).from_pretrained(folder)
    assert not list(checkpoints.differences(opened, expected))
    moved = dict(opened.origins.moved)
    name = next(name for name, tensor in moved.items() if len(tensor.shape) == 2 and len({*tensor.shape}) == 1)
    moved[name] = permute(moved[name], (1, 0))
    wrong = dataclasses.replace(opened, origins=dataclasses.replace(opened.origins, moved=moved))
    assert "other values" in next(iter(checkpoints.differences(wrong, expected)))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float64])
def test_the_dtype_is_that_of_the_configuration_unless_asked(folder: Path, dtype: torch.dtype | None) -> None:
    configure(folder, dtype="float16")
    model = open_checkpoint(folder, dtype=dtype).model
    assert model.dtype == (dtype or torch.float16)
    assert next(model.parameters()).is_meta


def test_without_a_dtype_in_the_configuration_it_is_that_of_the_files(folder: Path) -> None:
    configure(folder, dtype=None)
    change(folder, lambda tensors: tensors.update({k: v.bfloat16() for k, v in tensors.items()}))
    assert open_checkpoint(folder).model.dtype == torch.bfloat16


def test_where_text_ends_is_read_too(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 7]}))
    assert partition(folder, Plan()).rank(0).eos_token_id == (5, 7)


@pytest.mark.parametrize("equal", [True, False])
def test_two_stored_weights_are_tied_only_where_they_are_equal(tmp_path: Path, equal: bool) -> None:
    folder = saved(tmp_path / "tied", "llama", tie_word_embeddings=True)

    def untie(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["lm_head.weight"][-1, -1] += 0 if equal else 1

    change(folder, untie)
    opened = open_checkpoint(folder)
    expected = type(opened.model).from_pretrained(folder)
    assert (opened.model.lm_head.weight is opened.model.model.embed_tokens.weight) == equal
    assert not list(checkpoints.differences(opened, expected))


def remove(folder: Path) -> None:
    change(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))


def rename(folder: Path) -> None:
    change(
        folder, lambda t: t.update({"model.layers.1.mlp.upp_proj.weight": t.pop("model.layers.1.mlp.up_proj.weight")})
    )


def add(folder: Path) -> None:
    change(folder, lambda tensors: tensors.update({"model.layers.1.mlp.more.weight": torch.ones(3)}))


def add_many(folder: Path) -> None:
    extra = [f"model.layers.{layer}.attn.{name}" for layer in range(4) for name in ("bias", "masked_bias")]
    change(folder, lambda tensors: tensors.update({name: torch.ones(3) for name in extra}))


def add_a_value_head(folder: Path) -> None:
    change(folder, lambda tensors: tensors.update({"v_head.summary.weight": torch.ones(1, 64)}))


LEFT_OUT = {
    "a weight more": ("llama", add, "1 tensor of .* LlamaForCausalLM .*: 'model.layers.1.mlp.more.weight'$"),
    "old buffers": ("llama", add_many, r"8 tensors of .*'model.layers.0.attn.bias', .* and 3 more$"),
    "a value head": ("llama", add_a_value_head, r"1 tensor of .*: 'v_head.summary.weight'$"),
    "a base class over a head": (
        "llama",
        lambda folder: configure(folder, architectures=["LlamaModel"]),
        r"1 tensor of .*LlamaModel .*: 'lm_head.weight'$",
    ),
    "fewer layers": ("llama", lambda folder: configure(folder, num_hidden_layers=1), r"\d+ tensors of .*layers\.1\."),
    "fewer layers of experts": (
        "mixtral",
        lambda folder: configure(folder, num_hidden_layers=1),
        r"\d+ tensors of .*layers\.1\.",
    ),
    "an encoder's other heads": (
        "masked:bert",
        lambda folder: change(
            folder,
            lambda tensors: tensors.update(
                {"bert.pooler.dense.weight": torch.ones(64, 64), "cls.seq_relationship.weight": torch.ones(2, 64)}
            ),
        ),
        r"2 tensors of .*: 'bert.pooler.dense.weight', 'cls.seq_relationship.weight'$",
    ),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_what_the_class_has_no_place_for_is_left_out_and_named(name: str, tmp_path: Path) -> None:
    model, spoil, note = LEFT_OUT[name]
    folder = saved(tmp_path / "checkpoint", model)
    spoil(folder)
    opened = open_checkpoint(folder)
    expected = type(opened.model).from_pretrained(folder)
    assert not list(checkpoints.differences(opened, expected))
    assert len(opened.notes) == 1
    assert re.search(note, opened.notes[0]), opened.notes


def test_what_was_left_out_is_in_the_report(folder: Path) -> None:
    add(folder)
    parts = partition(folder, Plan(tp=2))
    assert "note: 1 tensor of the checkpoint not loaded" in str(parts.report)


def test_nothing_is_named_where_all_was_loaded(folder: Path) -> None:
    assert open_checkpoint(folder).notes == ()


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])


def pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (remove, r"lacks 1 weights of LlamaForCausalLM: 'model.layers.1.mlp.up_proj.weight'.*near it"),
        (
            rename,
            r"lacks 1 weights.*'model.layers.1.mlp.up_proj.weight' \(near it: 'model.layers.1.mlp.upp_proj.weight'",
        ),
        (
            lambda f: configure(f, intermediate_size=40),
            r"'model.layers.0.mlp.down_proj.weight' is \[64, \d+\], required \[",
        ),
        (
            lambda f: configure(f, quantization_config={"quant_method": "bitsandbytes"}),
            r"is quantised by 'bitsandbytes'.*those that can: fp8.*model.dequantize\(\).*save_pretrained",
        ),
        (lambda f: configure(f, transformers_weights="x.safetensors"), r"names files of its own.*x\.safetensors"),
        (lambda f: configure(f, model_type="unheard_of"), r"model_type that transformers knows, got 'unheard_of'"),
        (lambda f: (f / "adapter_config.json").write_text("{}"), r"an adapter \(adapter_config.json\).*merge"),
        (lambda f: (f / "config.json").unlink(), r"no checkpoint: it has no config.json"),
        (lambda f: (f / "config.json").write_text("[1]"), r"must be a JSON object"),
        (lambda f: (f / "config.json").write_text("{"), r"cannot read the configuration"),
        (pickle, r"no model.safetensors and no model.safetensors.index.json, but pytorch_model.bin.*save_pretrained"),
        (cut, r"is cut short: '.*' ends at byte \d+, the file at \d+"),
    ],
    ids=[
        "lacks one",
        "misspells one",
        "another shape",
        "quantised",
        "files of its own",
        "unknown type",
        "adapter",
        "no configuration",
        "configuration of another kind",
        "configuration cut short",
        "pickle",
        "file cut short",
    ],
)
def test_what_is_no_checkpoint_of_its_model_is_refused(folder: Path, spoil: Callable, message: str) -> None:
    spoil(folder)
    with pytest.raises((CaptureError, WeightError), match=message):
        partition(folder, Plan(tp=2))


def test_a_refusal_allocates_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """from_pretrained would draw what is missing at random; for a large model that is all memory and minutes."""
    made: list[str] = []
    real = torch.Tensor.normal_
    monkeypatch.setattr(
        torch.Tensor, "normal_", lambda self, *a, **k: (made.append(self.device.type), real(self, *a, **k))[1]
    )
    change(folder, lambda tensors: [tensors.pop(name) for name in list(tensors)[3:]])
    with pytest.raises(WeightError, match=r"lacks \d+ weights"):
        open_checkpoint(folder)
    assert set(made) <= {"meta"}


def test_a_folder_that_does_not_exist() -> None:
    with pytest.raises(CaptureError, match=r"'nowhere' is no folder"):
        partition("nowhere", Plan())


def test_a_weight_that_loading_changes_is_refused(tmp_path: Path) -> None:
    """transformers writes into it when it initialises what is missing, so that the file has another value."""
    folder = saved(tmp_path / "changed", "zaya")
    with pytest.raises(
        WeightError, match=r"balancing_biases' is not stored in .* as the model has it: aten.copy_ writes"
    ):
        partition(folder, Plan())


def test_a_dtype_is_for_folders_only(folder: Path) -> None:
    with pytest.raises(CaptureError, match=r"model\.to\(dtype\)"):
        partition(zoo.tiny("llama")[0], Plan(), dtype=torch.float32)
