"""The array store: written whole or not at all, and every kind of damage noticed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lsgm.config import DatasetConfig
from lsgm.config.stages import PrepareStage
from lsgm.data.originals import read_source
from lsgm.data.prepare import build, prepare
from lsgm.data.registry import Dataset
from lsgm.data.store import ImageStore
from lsgm.errors import LSGMError
from lsgm.files import is_sealed, seal


@pytest.fixture
def source(originals: dict[str, bytes], tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    for name, content in originals.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def out(small: Dataset, source: Path, tmp_path: Path) -> Path:
    """A good store."""
    build(small, tmp_path / "data" / "small", path=source)
    return tmp_path / "data" / "small"


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_round_trip(originals: dict[str, bytes], small: Dataset, source: Path, tmp_path: Path) -> None:
    manifest = build(small, tmp_path / "new" / "small", path=source)
    store = ImageStore(tmp_path / "new" / "small")
    store.verify()
    assert store.manifest == manifest
    assert store.name == "small"
    assert store.image == small.image
    assert store.splits == {"train": 20, "test": 10}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images, labels = store.images(split), store.labels(split)
        assert images.dtype == labels.dtype == np.uint8
        assert images.shape == (len(labels), 1, 28, 28)
        assert images.tobytes() == originals[f"{prefix}-images-idx3-ubyte"][16:]
        assert labels.tobytes() == originals[f"{prefix}-labels-idx1-ubyte"][8:]
    with pytest.raises(LSGMError, match="no split 'valid'; the splits are train, test"):
        store.images("valid")


def test_manifest(small: Dataset, source: Path, out: Path) -> None:
    manifest = json.loads((out / "manifest.json").read_text())
    found = read_source(out)
    assert (found["kind"], found["origin"]) == ("local", str(source))
    assert manifest["source"]["sha256"] == {file.name: file.sha256 for file in small.downloads}
    assert manifest["licence"] == small.licence
    for name, facts in manifest["files"].items():
        content = (out / name).read_bytes()
        assert facts["bytes"] == len(content)
        assert facts["sha256"] == hashlib.sha256(content).hexdigest()


def test_nothing_but_the_store_is_left(out: Path) -> None:
    assert os.listdir(out.parent) == ["small"]
    names = {f"{split}_{kind}.npy" for split in ("train", "test") for kind in ("images", "labels")}
    assert set(os.listdir(out)) == names | {"manifest.json", "source.json"}


def test_a_second_run_gives_the_same_bytes(small: Dataset, source: Path, out: Path) -> None:
    before = contents(out)
    (out / "train_labels.npy").write_bytes(b"damaged")
    build(small, out, path=source)
    assert contents(out) == before
    assert os.listdir(out.parent) == ["small"]


def test_a_failed_run_leaves_the_store_of_before(small: Dataset, source: Path, out: Path) -> None:
    before = contents(out)
    (source / "t10k-labels-idx1-ubyte").write_bytes(b"no IDX")
    with pytest.raises(LSGMError, match="t10k-labels-idx1-ubyte: is not an IDX file"):
        build(small, out, path=source)
    assert contents(out) == before
    assert os.listdir(out.parent) == ["small"]


def test_a_failed_first_run_leaves_nothing(small: Dataset, source: Path, tmp_path: Path) -> None:
    (source / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(LSGMError, match="has no file t10k-labels-idx1-ubyte"):
        build(small, tmp_path / "data" / "small", path=source)
    assert not (tmp_path / "data").exists()


def test_prepare_reads_the_path_of_the_stage(tmp_path: Path) -> None:
    stage = PrepareStage(dataset="mnist", source=DatasetConfig(path=str(tmp_path / "nowhere")))
    with pytest.raises(LSGMError, match="nowhere: is neither a folder nor a file"):
        prepare(stage, tmp_path / "out")
    assert os.listdir(tmp_path) == []


def swap_shape(path: Path) -> None:
    np.save(path, np.load(path).reshape(20, 28, 1, 28))


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("train_images.npy", Path.unlink, "cannot be read"),
        ("train_images.npy", lambda p: p.write_bytes(p.read_bytes()[:-1]), "has 15807 bytes, expected 15808"),
        ("train_images.npy", lambda p: p.write_bytes(bytes(p.stat().st_size)), "is not a .npy file"),
        ("train_images.npy", swap_shape, r"holds uint8 \[20, 28, 1, 28\], expected uint8 \[20, 1, 28, 28\]"),
        ("manifest.json", Path.unlink, "cannot be read"),
        ("manifest.json", lambda p: p.write_text("{"), "is not valid JSON"),
        ("manifest.json", lambda p: p.write_text("[]"), "is damaged"),
        ("manifest.json", lambda p: p.write_text("{}"), "is damaged"),
        ("manifest.json", lambda p: p.write_text(p.read_text().replace('"bytes"', '"size"')), "has changed"),
    ],
    ids=["gone", "short", "zeros", "shape", "no-manifest", "cut-manifest", "list", "empty", "key"],
)
def test_damage_is_noticed_at_opening(out: Path, name: str, damage: Callable[[Path], object], message: str) -> None:
    damage(out / name)
    with pytest.raises(LSGMError, match=f"{out / name}: {message}.*`lsgm prepare`"):
        ImageStore(out)


def test_a_flipped_bit_is_noticed_by_verify(out: Path) -> None:
    """By that of its own split: a training does not read what only an evaluation uses."""
    content = bytearray((out / "test_images.npy").read_bytes())
    content[-1] ^= 1
    (out / "test_images.npy").write_bytes(content)
    store = ImageStore(out)
    store.verify("train")
    for splits in ((), ("test",), ("train", "test")):
        with pytest.raises(LSGMError, match="test_images.npy: has changed"):
            store.verify(*splits)
    with pytest.raises(LSGMError, match="no split 'valid'"):
        store.verify("valid")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["image"].update(binary=False), "has changed: its sha256 does not match its content"),
        (lambda m: m["image"].update(padded_size=30), "has changed"),
        (lambda m: m.update(licence="mine"), "has changed"),
    ],
)
def test_a_sealed_manifest_cannot_be_changed(
    out: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    path = out / "manifest.json"
    manifest = seal(json.loads(path.read_text()))
    path.write_text(json.dumps(manifest, indent=2))
    assert is_sealed(ImageStore(out).manifest)
    change(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(LSGMError, match=f"manifest.json: {message}.*`lsgm prepare`"):
        ImageStore(out)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["files"].update({"../train_images.npy": m["files"]["train_images.npy"]}), "is not a file of the"),
        (lambda m: m["splits"].update(train=-20), "splits.train"),
        (
            lambda m: m["splits"].update(train=21),
            r"files.train_images.npy.shape: \[20, 1, 28, 28\] is not \[21, 1, 28,",
        ),
        (lambda m: m["splits"].update(valid=3), "valid_images.npy is missing"),
        (lambda m: m["splits"].update(train="20"), "splits.train"),
        (lambda m: m["image"].update(size=27), "shape"),
        (lambda m: m["image"].update(padded_size=20), "padded_size: 20 is less than"),
        (lambda m: m["files"]["train_labels.npy"].update(shape=[]), "files.train_labels.npy.shape"),
        (lambda m: m["files"]["train_labels.npy"].update(sha256=None), "files.train_labels.npy.sha256"),
        (lambda m: m.update(files=[]), "files"),
        (lambda m: m.update(dataset=3), "dataset"),
        (lambda m: m.pop("version"), "version"),
    ],
)
def test_a_damaged_manifest_without_a_hash_is_named(
    out: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    """One of before; what has no hash is held against itself and the files."""
    path = out / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest.pop("sha256", None)
    path.write_text(json.dumps(manifest))
    ImageStore(out).verify()
    change(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(LSGMError, match=message) as caught:
        ImageStore(out)
    assert str(caught.value).startswith(f"{path}: ") and str(caught.value).count("\n") == 0


@pytest.mark.parametrize("content", [b"\xff\xfe{}", b"[" * 100_000, b'{"version": 2, "version": 1}', b"null"])
def test_what_is_no_manifest_is_named(out: Path, content: bytes) -> None:
    (out / "manifest.json").write_bytes(content)
    with pytest.raises(LSGMError, match=r"manifest.json: .*`lsgm prepare`"):
        ImageStore(out)


def test_a_store_of_another_version_is_refused(out: Path) -> None:
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps({**manifest, "version": 0}))
    with pytest.raises(LSGMError, match="has version 0"):
        ImageStore(out)


def test_a_store_of_another_dataset_is_refused(out: Path) -> None:
    assert ImageStore(out, "small").name == "small"
    with pytest.raises(LSGMError, match="small: holds the dataset small, expected mnist"):
        ImageStore(out, "mnist")


def test_the_real_mnist(mnist_store: ImageStore) -> None:
    mnist_store.verify()
    assert mnist_store.name == "mnist"
    assert mnist_store.image.padded_size == 32
    train, test = mnist_store.images("train"), mnist_store.images("test")
    assert train.shape == (60000, 1, 28, 28)
    assert test.shape == (10000, 1, 28, 28)
    pixels = np.bincount(train.reshape(-1), minlength=256) / train.size
    values = np.arange(256) / 255
    mean = float(pixels @ values)
    assert mean == pytest.approx(0.1307, abs=5e-5)  # the published statistics
    assert float(pixels @ (values - mean) ** 2) ** 0.5 == pytest.approx(0.3081, abs=5e-5)
    counts = np.bincount(mnist_store.labels("train"))
    assert counts.tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    counts = np.bincount(mnist_store.labels("test"))
    assert counts.tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
