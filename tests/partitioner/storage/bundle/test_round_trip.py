"""What is saved and loaded again runs the same, bit by bit."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from transformers import GPT2Config, GPT2LMHeadModel

import partitioner
from partitioner import BundleError, CaptureError, Parts, Plan, PlanError, partition
from partitioner.storage.bundle.bundle import Bundle
from partitioner.storage.bundle.format.graph_format import build, share
from runtime.ops.collectives import all_reduce
from runtime.ops.communicating import named_axes
from runtime.weights.read_shards import Reader
from tests.support import bundle_forger as bundles
from tests.support import zoo

NAMES = ("llama", "mixtral", "gpt2", "mamba2", "bloom", "deepseek_v3", "masked:bert")
# falcon: columns in another order; minimax: values that only its own cache needs; the others: ops that few models have
RARE = ("falcon", "minimax", "masked:fnet", "masked:convbert")
QUICK = ("deepseek_v3", "masked:bert", "falcon")  # llama's are in the tests below, mixtral's in test_experts.py


def same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def generated(ranks: Any, ids: Tensor) -> Tensor | str:
    """What it continues with, or why it cannot."""
    try:
        return ranks.generate(ids[:, :6], max_new_tokens=4)
    except PlanError as error:
        return str(error)


def assert_same(parts: Parts[Any], bundle: Bundle, ids: Tensor) -> None:
    assert same(bundle.simulate(input_ids=ids), parts.simulate(input_ids=ids))
    one, other = generated(parts, ids), generated(bundle, ids)
    assert type(one) is type(other)
    assert torch.equal(one, other) if isinstance(one, Tensor) else one == other
    for rank in range(parts.mesh.world_size):
        ours, theirs = parts.rank(rank), bundle.rank(rank)
        assert ours.graph_module.code == theirs.graph_module.code
        assert str(ours.graph) == str(theirs.graph)
        assert [(w.name, w.dtype, w.local_shape) for w in ours.weights] == [
            (w.name, w.dtype, w.local_shape) for w in theirs.weights
        ]
        assert (ours.inputs, ours.limits, ours.vocabulary) == (theirs.inputs, dict(theirs.limits), theirs.vocabulary)
        if isinstance(one, Tensor):
            assert str(parts.entry("decode", rank).graph) == str(bundle.entry("decode", rank).graph)
            assert parts.entry("decode", rank).states == bundle.entry("decode", rank).states


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in (*NAMES, *RARE)],
)
def test_the_same_before_and_after(name: str, tmp_path: Path) -> None:
    model, ids = zoo.tiny(name)
    parts = partition(model, Plan(tp=2))
    parts.save(tmp_path / "bundle")
    bundle = partitioner.load(tmp_path / "bundle")
    bundle.verify()
    assert bundle.report == str(parts.report)
    assert_same(parts, bundle, ids)


@pytest.mark.parametrize("tp", [1, 3])
def test_uneven_and_alone(tp: int, tmp_path: Path) -> None:
    model, ids = zoo.odd("llama")
    parts = partition(model, Plan(tp=tp))
    parts.save(tmp_path / "bundle")
    assert_same(parts, partitioner.load(tmp_path / "bundle"), ids)


def test_bfloat16(tmp_path: Path) -> None:
    parts = partition(bundles.tiny_model().bfloat16(), Plan(tp=2))
    parts.save(tmp_path / "bundle")
    assert_same(parts, partitioner.load(tmp_path / "bundle"), bundles.IDS)


def test_one_rank_by_itself(tmp_path: Path) -> None:
    bundles.save_tiny(tmp_path / "bundle")
    for path in (tmp_path / "bundle/weights").glob("rank0-*"):
        path.unlink()  # what another rank holds is not read
    program = partitioner.load(tmp_path / "bundle", rank=1)
    assert program.coordinates["tp"] == 1
    assert program.graph_module.code


@pytest.mark.parametrize(
    ("name", "tp"),
    [
        ("llama", 3), *(pytest.param(*case, marks=pytest.mark.slow) for case in (("llama", 1), ("gpt2", 2))),
        *(pytest.param(name, 3, marks=pytest.mark.slow) for name in NAMES if name != "llama"),
    ],
)  # fmt: skip
def test_split_anew(name: str, tp: int, tmp_path: Path) -> None:
    model, ids = zoo.tiny(name)
    partition(model, Plan(tp=2)).save(tmp_path / "bundle")
    expected, found = partition(model, Plan(tp=tp)), partition(tmp_path / "bundle", Plan(tp=tp))
    assert same(found.simulate(input_ids=ids), expected.simulate(input_ids=ids))
    found.save(tmp_path / "again")
    assert_same(expected, partitioner.load(tmp_path / "again"), ids)


def test_a_bundle_is_not_cast(tmp_path: Path) -> None:
    bundles.save_tiny(tmp_path / "bundle")
    with pytest.raises(CaptureError, match="is a bundle, whose weights have been read and cast already"):
        partition(tmp_path / "bundle", Plan(tp=1), dtype=torch.bfloat16)
    with pytest.raises(CaptureError, match="max_length must be a whole number of tokens, at least 1; got 0"):
        partition(tmp_path / "bundle", Plan(tp=1), max_length=0)


@pytest.mark.parametrize("reference", [False, True], ids=["copied", "referred to"])
def test_from_a_checkpoint_folder(reference: bool, tmp_path: Path) -> None:
    bundles.tiny_model().save_pretrained(tmp_path / "checkpoint")
    parts = partition(tmp_path / "checkpoint", Plan(tp=2))
    parts.save(tmp_path / "bundle", reference=reference)
    bundle = partitioner.load(tmp_path / "bundle", checkpoint=tmp_path / "checkpoint" if reference else None)
    assert_same(parts, bundle, bundles.IDS)


@pytest.mark.parametrize(
    ("checked", "reference"),
    [
        pytest.param(True, False, id="checked-copied"),
        pytest.param(False, True, id="unchecked-referred to"),
        pytest.param(True, True, id="checked-referred to", marks=pytest.mark.slow),
        pytest.param(False, False, id="unchecked-copied", marks=pytest.mark.slow),
    ],
)
def test_used_where_it_lies(reference: bool, checked: bool, tmp_path: Path) -> None:
    bundles.tiny_model().save_pretrained(tmp_path / "checkpoint")
    parts = partition(tmp_path / "checkpoint", Plan(tp=2))
    parts.save(tmp_path / "bundle", reference=reference)
    checkpoint = tmp_path / "checkpoint" if reference else None
    bundle = partitioner.load(tmp_path / "bundle", checkpoint=checkpoint, mapped=True, checked=checked)
    assert_same(parts, bundle, bundles.IDS)
    source = bundle.rank(1).source
    assert isinstance(source, Reader)
    norm = next(weight for weight in bundle.rank(1).weights if weight.name == "model.norm.weight")
    first, second = (source.load([norm], torch.device("cpu"))[0] for _ in range(2))
    assert first.data_ptr() == second.data_ptr(), "no copy"
    if not reference:
        anew = partition(tmp_path / "bundle", Plan(tp=3), mapped=True)
        assert_same(partition(tmp_path / "bundle", Plan(tp=3)), anew, bundles.IDS)


def test_what_is_used_where_it_lies_can_be_written(tmp_path: Path) -> None:
    bundles.tiny_model().save_pretrained(tmp_path / "checkpoint")
    partition(tmp_path / "checkpoint", Plan(tp=2), mapped=True).save(tmp_path / "mapped")
    partition(tmp_path / "checkpoint", Plan(tp=2)).save(tmp_path / "read")
    manifests = [(tmp_path / name / "manifest.sha256").read_bytes() for name in ("mapped", "read")]
    assert manifests[0] == manifests[1]
    partitioner.load(tmp_path / "mapped").verify()


@pytest.mark.parametrize("mapped", [False, True])
def test_who_asks_for_no_check_gets_what_is_there(mapped: bool, tmp_path: Path) -> None:
    bundles.save_tiny(tmp_path / "bundle")
    file = next((tmp_path / "bundle/weights").glob("rank0-*"))
    data = bytearray(file.read_bytes())
    data[-2] ^= 1  # in the weight that lies last
    file.write_bytes(data)
    altered = partitioner.load(tmp_path / "bundle", mapped=mapped, checked=False)
    altered.simulate(input_ids=bundles.IDS)
    with pytest.raises(partitioner.WeightError, match="is damaged or was altered"):
        partitioner.load(tmp_path / "bundle", mapped=mapped).simulate(input_ids=bundles.IDS)
    with pytest.raises(partitioner.WeightError, match="is damaged or was altered"):
        altered.verify()  # which is there to check


def test_a_checkpoint_that_is_not_the_one(tmp_path: Path) -> None:
    model = bundles.tiny_model()
    model.save_pretrained(tmp_path / "checkpoint")
    partition(tmp_path / "checkpoint", Plan(tp=2)).save(tmp_path / "bundle", reference=True)
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(partitioner.WeightError, match=r"'model\.norm\.weight' is damaged or was altered"):
        partitioner.load(tmp_path / "bundle", checkpoint=tmp_path / "other").simulate(input_ids=bundles.IDS)
    with pytest.raises(BundleError, match="are in the checkpoint that it was made from: name its folder"):
        partitioner.load(tmp_path / "bundle").simulate(input_ids=bundles.IDS)


def test_values_that_no_checkpoint_holds_are_stored(tmp_path: Path) -> None:
    parts = partition(bundles.tiny_model(), Plan(tp=2))
    parts.save(tmp_path / "bundle")
    stored = partitioner.load(tmp_path / "bundle").stored(0)
    computed = [each for each in stored if each.shard.source == "computed"]
    assert [each.shard.name for each in computed] == ["model.rotary_emb.inv_freq"]
    assert computed[0].file is not None
    assert computed[0].file.startswith("weights/every-")


def test_why_it_cannot_continue_texts_is_stored(tmp_path: Path) -> None:
    model, _ = zoo.tiny("masked:bert")
    parts = partition(model, Plan(tp=2))
    parts.save(tmp_path / "bundle")
    with pytest.raises(PlanError) as before:
        parts.generate(bundles.IDS, max_new_tokens=2)
    with pytest.raises(PlanError) as after:
        partitioner.load(tmp_path / "bundle").generate(bundles.IDS, max_new_tokens=2)
    assert str(before.value) == str(after.value)


@pytest.mark.parametrize("name", [pytest.param("gpt2", marks=pytest.mark.slow), "mixtral"])
def test_the_text_of_a_graph_is_all_of_it(name: str) -> None:
    """Built and written again it is the same text, byte for byte; for each rank, and for all that share it."""
    parts = partition(zoo.tiny(name)[0], Plan(tp=2))
    programs = [parts.rank(0), parts.rank(1), parts.entry("decode", 0), parts.entry("decode", 1)]
    built = []
    for program, (template, integers) in zip(programs, share([p.graph for p in programs]), strict=True):
        graph = build(
            template.text.encode(), "here", integers=integers,
            inputs=[x.name for x in program.inputs], weights=[w.name for w in program.weights],
        )  # fmt: skip
        assert str(graph) == str(program.graph)
        built.append(graph)
    assert [t.text for t, _ in share(built)] == [t.text for t, _ in share([p.graph for p in programs])]


def test_a_group_of_several_axes_is_stored() -> None:
    graph = fx.Graph()
    graph.output(graph.call_function(all_reduce, (graph.placeholder("x"), ("dp", "tp"))))
    ((template, integers),) = share([graph])
    built = build(template.text.encode(), "here", integers=integers, inputs=["x"], weights=[])
    assert str(built) == str(graph)
    assert named_axes([built]) == (("dp", "tp"),)


def test_ranks_share_graphs_that_differ_in_integers_only(tmp_path: Path) -> None:
    bundles.save_tiny(tmp_path / "bundle")
    assert len(list((tmp_path / "bundle/graphs").iterdir())) == 2  # whole texts, and their continuation


@pytest.mark.parametrize("name", ["a-b", pytest.param("__a", marks=pytest.mark.slow)])
def test_a_weight_whose_name_cannot_be_read_is_not_written(name: str, tmp_path: Path) -> None:
    model = bundles.tiny_model()
    layers = model.model.layers[0].mlp
    layers._modules[name] = layers._modules.pop("down_proj")
    layers.__dict__["down_proj"] = layers._modules[name]
    parts = partition(model, Plan(tp=2))
    assert any(name in weight.name for weight in parts.rank(0).weights)
    with pytest.raises(BundleError, match=f"cannot hold a weight by the name 'model.layers.0.mlp.{name}.weight'"):
        parts.save(tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_where_saving_fails(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32, n_positions=16)).eval()
    parts = partition(model.to("meta"), Plan(tp=2))
    with pytest.raises(partitioner.WeightError, match="has no data"):
        parts.save(tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_something_in_it_is_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(BundleError, match="exists and is not an empty folder"):
        bundles.save_tiny(tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(BundleError, match="link exists and is not an empty folder"):
        bundles.save_tiny(tmp_path / "link")
    with pytest.raises(BundleError, match=r"cannot write the bundle .*File name too long"):
        bundles.save_tiny(tmp_path / ("a" * 300))
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


def test_a_disk_that_is_full_is_named(tmp_path: Path) -> None:
    parts = partition(bundles.tiny_model(), Plan(tp=2))
    before, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, most))
    try:
        with pytest.raises(BundleError, match=r"cannot write the bundle .*File too large"):
            parts.save(tmp_path / "bundle")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, most))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_a_tokenizer_is_not_copied_from(tmp_path: Path) -> None:
    parts = partition(bundles.tiny_model(), Plan())
    with pytest.raises(BundleError, match=r"holds no tokenizer, none of tokenizer\.json, "):
        parts.save(tmp_path / "bundle", tokenizer=tmp_path)


def test_a_checkpoint_that_is_another_is_named(tmp_path: Path) -> None:
    model = bundles.tiny_model()
    model.save_pretrained(tmp_path / "checkpoint")
    partition(tmp_path / "checkpoint", Plan(tp=2)).save(tmp_path / "bundle", reference=True)
    other = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32, n_positions=16))
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(partitioner.WeightError, match=r"/other holds no tensor 'model\."):
        partitioner.load(tmp_path / "bundle", checkpoint=tmp_path / "other").simulate(input_ids=bundles.IDS)
