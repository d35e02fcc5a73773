"""A folder partitioned and run, against the model that from_pretrained yields, partitioned in memory."""

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from partitioner import CaptureError, Plan, WeightError, partition
from partitioner.compile.partition import compile_program
from partitioner.compile.tracing.trace import trace
from partitioner.program.program import Program
from partitioner.proof.float64 import in_float64
from runtime.engine.simulator import Simulator
from runtime.program.rank_program import RankProgram
from runtime.program.shards import at
from runtime.weights.load_weights import load_weights
from runtime.weights.read_shards import Reader
from runtime.weights.safetensors_files import TensorFiles
from tests.support import zoo
from tests.supported_models.checkpoints import same_bits

NAMES = ["llama", "gpt2", "mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"]
# stored as they are held; transposed; one tensor per expert; experts in one. What each tensor becomes, of all of them
# and more, is in test_open_checkpoint.py.
QUICK = {"llama", "gpt2", "mixtral", "gpt_oss"}
WHOLE = {("llama", 1), ("mixtral", 1)}
CPU = torch.device("cpu")


@functools.cache
def checkpoint(name: str) -> tuple[Path, Any, torch.Tensor, tempfile.TemporaryDirectory]:
    """A folder with many files, the model that from_pretrained makes of it, and ids; all kept while tests run."""
    kept = tempfile.TemporaryDirectory()
    model, ids = zoo.tiny(name)
    model.bfloat16().save_pretrained(kept.name, max_shard_size="30KB")
    return Path(kept.name), type(model).from_pretrained(kept.name).eval(), ids, kept


@functools.cache
def traced(name: str) -> tuple[Program, Program]:
    """By parts, and in memory."""
    folder, model, _, _ = checkpoint(name)
    by_parts = partition(folder, Plan()).traced
    assert by_parts is not None
    return by_parts, trace(model)


@pytest.mark.parametrize(
    ("name", "tp"),
    [
        pytest.param(name, tp, marks=() if (name in QUICK and tp == 3) or (name, tp) in WHOLE else pytest.mark.slow)
        for name in NAMES
        for tp in (1, 2, 3)
    ],
)
def test_every_rank_has_the_slices_of_from_pretrained(name: str, tp: int) -> None:
    folder, model, ids, _ = checkpoint(name)
    parts, whole = (compile_program(program, Plan(tp=tp)) for program in traced(name))
    known = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    assert len(list(folder.glob("*.safetensors"))) > 3
    for rank in range(tp):
        program = parts.rank(rank)
        reader = Reader(TensorFiles(folder))
        loaded = load_weights(program.weights, program.weight_data, reader, CPU)
        for weight, tensor in zip(program.weights, loaded, strict=True):
            if weight.source == "checkpoint":
                expected = torch.empty_like(tensor)
                for own in weight.own_pieces:
                    expected[at(own.destination)] = known[weight.name][at(own.source)]
                assert same_bits(tensor, expected), weight.name
                assert tensor.untyped_storage().nbytes() == tensor.nbytes
    assert same_bits(parts.simulate(input_ids=ids), whole.simulate(input_ids=ids))


def test_pieces_name_the_tensors_of_the_checkpoint() -> None:
    program = compile_program(traced("mixtral")[0], Plan(tp=2)).rank(1)
    assert isinstance(program.source, Reader)
    assert program.source.files.folder == checkpoint("mixtral")[0].resolve()
    experts = next(weight for weight in program.weights if weight.name.endswith("layers.0.mlp.experts.gate_up_proj"))
    stored = program.source.files.entries
    assert len(experts.pieces) == 2 * experts.global_shape[0]
    assert {piece.tensor for piece in experts.pieces} <= stored.keys()
    assert all(piece.strides is None for piece in experts.pieces), "one stored tensor per expert: plain blocks"
    # half of the rows of an expert, and not one byte more
    reader = Reader(program.source.files)
    reader.load([experts], CPU)
    assert reader.bytes_read == experts.bytes
    assert json.loads(json.dumps([vars(piece) for piece in experts.pieces]))


@pytest.mark.parametrize("name", ["llama", pytest.param("mamba2", marks=pytest.mark.slow)])
def test_generating_reads_the_files_too(name: str) -> None:
    """The second has states per sequence: its program for generation is a trace of its own."""
    folder, model, ids, _ = checkpoint(name)
    length = 8 if name == "mamba2" else None
    by_parts, in_memory = (partition(each, Plan(tp=2), fixed_length=length) for each in (folder, model))
    options = {"max_new_tokens": 6, "eos_token_id": []}
    found = by_parts.generate(ids[:, :4], **options)
    assert torch.equal(found, in_memory.generate(ids[:, :4], **options))


def test_weights_that_are_given_take_the_place_of_the_files() -> None:
    _, model, _, _ = checkpoint("mixtral")
    program = compile_program(traced("mixtral")[0], Plan()).rank(0)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    loaded = load_weights(program.weights, program.weight_data, zeros, CPU)
    assert all(not t.any() for w, t in zip(program.weights, loaded, strict=True) if w.source == "checkpoint")
    asked: list[str] = []

    def read(name: str, block: Any) -> torch.Tensor:
        asked.append(name)
        return zeros[name][at(block)]

    load_weights(program.weights, program.weight_data, read, CPU)
    assert set(asked) == {weight.name for weight in program.weights if weight.source == "checkpoint"}


def test_a_cast_is_made_once(tmp_path: Path) -> None:
    """A program lifted to float64 after the trace would be read without the rounding to bfloat16."""
    model, ids = zoo.tiny("llama")
    model.float().save_pretrained(tmp_path)
    rounded = partition(tmp_path, Plan(), dtype=torch.bfloat16).traced
    stored = partition(tmp_path, Plan()).traced
    assert rounded is not None
    assert stored is not None
    with pytest.raises(WeightError, match=r"read as torch.bfloat16, and cannot be had as torch.float64"):
        compile_program(in_float64(rounded), Plan()).rank(0)
    compile_program(in_float64(stored), Plan()).simulate(input_ids=ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mapped_weights_run_as_copied_ones_do(dtype: torch.dtype, tmp_path: Path) -> None:
    """Bit for bit: columns of a mapped matrix are steps apart."""
    model, ids = zoo.tiny("llama")
    model.to(dtype).save_pretrained(tmp_path)
    parts = partition(tmp_path, Plan(tp=2))
    where_they_lie = partition(tmp_path, Plan(tp=2), mapped=True)
    mapped = Simulator([where_they_lie.rank(rank) for rank in range(2)])
    assert torch.equal(mapped(input_ids=ids)[0], parts.simulate(input_ids=ids))
    apart = [weight for weight in mapped.engines[0].weights if not weight.is_contiguous()]
    assert len(apart) == (0 if dtype == torch.float16 else 2 * zoo.LAYERS)


def test_a_model_that_has_its_weights_is_not_mapped() -> None:
    with pytest.raises(CaptureError, match="mapped=True is for the files of a folder; this LlamaForCausalLM has its"):
        partition(zoo.tiny("llama")[0], Plan(tp=2), mapped=True)


def test_a_folder_that_went_away_is_named(tmp_path: Path) -> None:
    model, ids = zoo.tiny("llama")
    model.save_pretrained(tmp_path)
    parts = partition(tmp_path, Plan(tp=2), dtype=torch.float32)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(WeightError, match=r"model\.safetensors could be read before, and cannot any more"):
        parts.simulate(input_ids=ids)


def test_the_runtime_reads_a_shard_without_transformers(pytestconfig: pytest.Config) -> None:
    """What a rank program holds is plain data: a process that only runs ranks needs no conversion tables."""
    program: RankProgram = compile_program(traced("mixtral")[0], Plan(tp=2)).rank(0)
    assert isinstance(program.source, Reader)
    weight = max(program.weights, key=lambda weight: len(weight.pieces))
    code = (
        "import json, sys, torch\n"
        "from runtime.program.shards import Piece, WeightShard\n"
        "from runtime.weights.read_shards import Reader\n"
        "from runtime.weights.safetensors_files import TensorFiles\n"
        "folder, shape, pieces = json.loads(sys.argv[1])\n"
        "deep = lambda x: tuple(map(deep, x)) if isinstance(x, list) else x\n"
        "pieces = tuple(Piece(**{k: deep(v) for k, v in piece.items()}) for piece in pieces)\n"
        "shard = WeightShard('w', torch.bfloat16, tuple(shape), tuple(shape), (), 'checkpoint', (), pieces)\n"
        "(loaded,) = Reader(TensorFiles(folder)).load([shard], torch.device('cpu'))\n"
        "assert 'transformers' not in sys.modules and 'safetensors' not in sys.modules\n"
        "print(loaded.double().sum().item())\n"
    )
    folder = str(program.source.files.folder)
    given = json.dumps([folder, weight.local_shape, [vars(piece) for piece in weight.pieces]])
    environment = {**os.environ, "PYTHONPATH": str(pytestconfig.rootpath)}
    command = [sys.executable, "-P", "-c", code, given]
    said = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    assert weight.dtype == torch.bfloat16
    (loaded,) = Reader(TensorFiles(folder)).load([weight], CPU)
    assert float(said) == loaded.double().sum().item()
