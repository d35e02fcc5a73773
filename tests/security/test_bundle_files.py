"""What is in a bundle's folder and not in its manifest, and what a bundle is made of."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

import partitioner
from partitioner import BundleError, Plan, partition
from partitioner.storage.bundle.bundle import Bundle
from partitioner.storage.bundle.save import MODEL_FILES
from partitioner.storage.example import EXAMPLE_MODEL


def link(folder: Path, name: str) -> None:
    outside = folder.parent / "outside"
    outside.write_text("{}")
    (folder / name).symlink_to(outside)


ADDED: list[Callable[[Path], object]] = [
    lambda folder: (folder / "model/chat_template.jinja").write_text("{{ 1 }}"),
    lambda folder: (folder / "model/tokenizer.json").write_text("{}"),
    lambda folder: link(folder, "model/tokenizer_config.json"),
    lambda folder: link(folder, "model/generation_config.json"),
    lambda folder: (folder / "model/additional_chat_templates").mkdir(),
    lambda folder: (folder / "model/.hidden").touch(),
    lambda folder: (folder / "weights/more.safetensors").touch(),
    lambda folder: (folder / "config.json").write_text("{}"),
    lambda folder: (folder / "other").mkdir(),
    lambda folder: os.mkfifo(folder / "model/vocab.json"),
    lambda folder: link(folder, "other"),
]


@pytest.mark.parametrize("add", ADDED, ids=range(len(ADDED)))
def test_what_the_manifest_does_not_list_is_refused(add: Callable[[Path], object], folder: Path) -> None:
    add(folder)
    with pytest.raises(BundleError, match="which its manifest does not list"):
        partitioner.load(folder)


def test_what_is_added_after_it_was_loaded_is_refused_and_not_used(folder: Path) -> None:
    bundle = partitioner.load(folder)
    ADDED[0](folder)
    with bundle.model_folder() as used:
        assert [path.name for path in used.iterdir()] == ["config.json"]
        assert used.stat().st_mode & 0o077 == 0
    with pytest.raises(BundleError, match="which its manifest does not list"):
        bundle.verify()


def test_what_is_checked_is_what_is_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is exchanged between the check and the use."""
    bundle = partitioner.load(folder)
    read = Bundle.read

    def exchange(self: Bundle, name: str) -> bytes:
        content = read(self, name)
        (folder / name).write_text("exchanged")
        return content

    monkeypatch.setattr(Bundle, "read", exchange)
    before = (folder / "model/config.json").read_bytes()
    with bundle.model_folder() as used:
        assert (used / "config.json").read_bytes() == before
    assert not used.exists()


@pytest.mark.parametrize("name", ["weights/every-00000.safetensors", "model/config.json", "ranks/0.json"])
def test_a_listed_file_that_is_a_link_is_refused(name: str, folder: Path) -> None:
    (folder / name).rename(folder.parent / "moved")
    (folder / name).symlink_to(folder.parent / "moved")
    with pytest.raises(BundleError, match="cannot open"):
        partitioner.load(folder).verify()


# -- exporting ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "models--some--model" / "snapshots" / "0123"
    folder.mkdir(parents=True)
    for path in EXAMPLE_MODEL.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def save(checkpoint: Path, out: Path) -> None:
    from partitioner.storage.bundle.save import _Writer

    out.mkdir()
    _Writer(out, reference=False, digests=True).copy_model_files(checkpoint)


@pytest.mark.parametrize("name", [name for name in MODEL_FILES if "token" in name or "template" in name])
def test_a_link_out_of_the_checkpoint_is_not_copied(name: str, checkpoint: Path, tmp_path: Path) -> None:
    private = tmp_path / "private"
    private.write_text("a secret")
    (checkpoint / name).unlink(missing_ok=True)
    (checkpoint / name).symlink_to(private)
    with pytest.raises(BundleError, match="is a link that leads out of its folder"):
        save(checkpoint, tmp_path / "out")
    assert not list((tmp_path / "out").glob(f"model/{name}"))


def test_a_link_over_a_link_is_not_copied(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "private").write_text("a secret")
    (checkpoint / "inner").symlink_to(tmp_path / "private")
    (checkpoint / "chat_template.jinja").symlink_to("inner")
    with pytest.raises(BundleError, match="is a link that leads out of its folder"):
        save(checkpoint, tmp_path / "out")


def test_links_within_the_folder_and_the_hubs_cache_are_copied(checkpoint: Path, tmp_path: Path) -> None:
    blobs = checkpoint.parent.parent / "blobs"
    blobs.mkdir()
    (checkpoint / "tokenizer.json").rename(blobs / "abc")
    (checkpoint / "tokenizer.json").symlink_to("../../blobs/abc")
    (checkpoint / "template").write_text("{{ 1 }}")
    (checkpoint / "chat_template.jinja").symlink_to("template")
    save(checkpoint, tmp_path / "out")
    assert (tmp_path / "out/model/tokenizer.json").read_bytes() == (blobs / "abc").read_bytes()
    assert (tmp_path / "out/model/chat_template.jinja").read_text() == "{{ 1 }}"
    assert not (tmp_path / "out/model/tokenizer.json").is_symlink()


@pytest.mark.slow
def test_the_whole_way(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "private").write_text("a secret")
    (checkpoint / "chat_template.jinja").symlink_to(tmp_path / "private")
    parts = partition(checkpoint, Plan(tp=2))
    with pytest.raises(BundleError, match="is a link that leads out of its folder"):
        parts.save(tmp_path / "out", tokenizer=checkpoint)
    assert not (tmp_path / "out").exists()
