"""Small files in the true formats, made here, and what becomes of them in a store."""

from __future__ import annotations

import dataclasses
import io
import os
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import crc32c as slow_crc32c

from lsgm.config import DatasetConfig, ImagesConfig
from lsgm.data import registry, tfrecord
from lsgm.data.images import Images
from lsgm.data.originals import read_source
from lsgm.data.pickles import load_batch
from lsgm.data.prepare import build
from lsgm.data.registry import Dataset
from lsgm.data.store import ImageStore
from lsgm.errors import LSGMError

RNG = np.random.default_rng(0)


def colors(count: int, size: int) -> np.ndarray:
    """Images [N, size, size, 3]."""
    return RNG.integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def numbered(count: int, size: int = 8) -> list[np.ndarray]:
    """One image of each gray level: what a resized or compressed one can still be told by."""
    return [np.full((size, size, 3), 5 * i, np.uint8) for i in range(count)]


def levels(store: ImageStore, split: str) -> list[int]:
    return [round(image.mean() / 5) for image in store.images(split)]


def any_number(name: str, **changes: Any) -> Dataset:
    """The entry ``name``, which takes any number of images."""
    return dataclasses.replace(registry.dataset(name), counts={}, **changes)


def prepared(dataset: Dataset, path: Path, out: Path) -> ImageStore:
    build(dataset, out / dataset.name, path)
    store = ImageStore(out / dataset.name, dataset.name)
    store.verify()
    return store


def encoded(image: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind)
    return buffer.getvalue()


# -- OMNIGLOT


def write_mat(path: Path, **matrices: np.ndarray) -> Path:
    from scipy.io import savemat

    savemat(path, matrices)
    return path


def test_omniglot(tmp_path: Path) -> None:
    """Columns of MATLAB's order: the pixel in row r and column c of an image is the element 28 c + r of its column."""
    images = RNG.random((6, 28, 28))
    columns = images.swapaxes(1, 2).reshape(6, 784).T
    path = write_mat(tmp_path / "chardata.mat", data=columns[:, :4], testdata=columns[:, 4:], target=np.eye(5))
    for place in (path, tmp_path):
        store = prepared(any_number("omniglot"), place, tmp_path / "out")
        assert np.array_equal(store.images("train")[:, 0], np.rint(255 * images[:4]))
        assert np.array_equal(store.images("test")[:, 0], np.rint(255 * images[4:]))
        assert store.image.binary and store.image.padded_size == 32
    assert len(store.manifest["source"]["sha256"]["chardata.mat"]) == 64  # what was found


@pytest.mark.parametrize(
    ("matrices", "message"),
    [
        ({"data": np.zeros((784, 3))}, "has no matrix 'testdata'"),
        ({"data": np.zeros((784, 3)), "testdata": np.full((784, 3), 2.0)}, "expected intensities from 0 to 1, found 2"),
        ({"data": np.zeros((783, 3)), "testdata": np.zeros((783, 3))}, r"found the shape \(783, 3\)"),
    ],
)
def test_another_mat_file(tmp_path: Path, matrices: dict[str, np.ndarray], message: str) -> None:
    path = write_mat(tmp_path / "chardata.mat", **matrices)
    with pytest.raises(LSGMError, match=f"chardata.mat: .*{message}"):
        build(any_number("omniglot"), tmp_path / "out", path)


def test_a_cut_mat_file_and_one_with_too_few_images(tmp_path: Path) -> None:
    path = write_mat(tmp_path / "chardata.mat", data=np.zeros((784, 3)), testdata=np.zeros((784, 3)))
    with pytest.raises(LSGMError, match="expected 24345 images in the split train of omniglot, found 3"):
        build(registry.OMNIGLOT, tmp_path / "out", path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(LSGMError, match="cannot be read as a MATLAB file"):
        build(registry.OMNIGLOT, tmp_path / "out", path)


# -- pickles


class Python2Pickler(pickle._Pickler):  # type: ignore[name-defined, misc]
    """Writes bytes as the strings of Python 2, in which CIFAR-10 is pickled."""

    def save_string(self, obj: bytes) -> None:
        self.write(b"U" + bytes([len(obj)]) + obj if len(obj) < 256 else b"T" + struct.pack("<i", len(obj)) + obj)
        self.memoize(obj)

    dispatch = {**pickle._Pickler.dispatch, bytes: save_string}  # type: ignore[attr-defined]  # noqa: RUF012


def python2_pickle(batch: dict[bytes, Any]) -> bytes:
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(batch)
    return file.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def cifar_files() -> tuple[dict[str, bytes], np.ndarray, list[int]]:
    images = RNG.integers(0, 256, (12, 3072), dtype=np.uint8)
    labels = RNG.integers(0, 10, 12).tolist()
    files = {}
    for i, name in enumerate([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]):
        rows = slice(2 * i, 2 * i + 2)
        batch = {b"batch_label": b"a batch", b"labels": labels[rows], b"data": images[rows], b"filenames": [b"a", b"b"]}
        files[name] = python2_pickle(batch)
    return files, images.reshape(-1, 3, 32, 32), labels


def write_tar(path: Path, files: dict[str, bytes], folder: str = "cifar-10-batches-py") -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in sorted(files.items(), reverse=True):  # not in the order that they are read in
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


@pytest.mark.parametrize("where", ["archive", "folder of the archive", "unpacked"])
def test_cifar10(tmp_path: Path, where: str) -> None:
    files, images, labels = cifar_files()
    path = tmp_path / "originals"
    path.mkdir()
    if where == "unpacked":
        for name, content in files.items():
            (path / name).write_bytes(content)
    else:
        archive = write_tar(path / "cifar-10-python.tar.gz", {**files, "batches.meta": b"", "readme.html": b""})
        path = archive if where == "archive" else path
    store = prepared(any_number("cifar10"), path, tmp_path)
    assert np.array_equal(store.images("train"), images[:10]) and store.labels("train").tolist() == labels[:10]
    assert np.array_equal(store.images("test"), images[10:]) and store.labels("test").tolist() == labels[10:]
    assert set(store.manifest["source"]["sha256"]) == set(files)


def test_cifar10_from_a_server(tmp_path: Path, server: Any) -> None:
    files, images, _ = cifar_files()
    archive = write_tar(tmp_path / "cifar-10-python.tar.gz", files).read_bytes()
    server.files["cifar-10-python.tar.gz"] = archive
    dataset = any_number("cifar10", downloads=(registry.Download("cifar-10-python.tar.gz", None, len(archive)),))
    dataset = dataclasses.replace(dataset, mirrors=(f"{server.url}/missing", f"{server.url}/plain"))
    build(dataset, tmp_path / "out")
    store = ImageStore(tmp_path / "out")
    assert np.array_equal(store.images("train"), images[:10])
    assert read_source(store.path)["origin"] == f"{server.url}/plain"
    wrong = dataclasses.replace(dataset.downloads[0], sha256="0" * 64)
    with pytest.raises(LSGMError, match="wrong content .sha256"):
        build(dataclasses.replace(dataset, downloads=(wrong,)), tmp_path / "other")


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch executed",)


def test_a_pickle_that_wants_to_run_something(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files, _, _ = cifar_files()
    files["data_batch_3"] = pickle.dumps({b"data": Malicious(), b"labels": []}, protocol=2)
    write_tar(tmp_path / "cifar-10-python.tar.gz", files)
    with pytest.raises(LSGMError, match=r"data_batch_3: .*it asks for posix.system, which no batch of images needs"):
        build(any_number("cifar10"), tmp_path / "out", tmp_path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("kind", ["O", "V8"])
def test_a_pickle_of_pointers(kind: str) -> None:
    """An array of objects made from bytes would take these for addresses."""
    made = pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": np.zeros(1, kind)}, protocol=2)
    with pytest.raises(LSGMError, match="batch: cannot be read as a batch of images .*array of"):
        load_batch(made, "batch", 32)
    forged = b"cnumpy\nndarray\n((I1\ntcnumpy\ndtype\n(S'O8'\ntRS'AAAAAAAA'\ntR."
    with pytest.raises(LSGMError, match="batch: cannot be read"):
        load_batch(forged, "batch", 32)


def test_imagenet32(tmp_path: Path) -> None:
    """Pickles of Python 3; as many files as the set has, of different lengths."""
    images = RNG.integers(0, 256, (25, 3072), dtype=np.uint8)
    start = 0
    for i in range(1, 12):
        name, count = (f"train_data_batch_{i}", 2 + (i == 10)) if i < 11 else ("val_data", 4)
        rows = slice(start, start + count)
        batch = {"data": images[rows], "labels": [999] * count, "mean": np.zeros(3072)}
        (tmp_path / name).write_bytes(pickle.dumps(batch, protocol=4))
        start += count
    store = prepared(any_number("imagenet32"), tmp_path, tmp_path / "out")
    assert np.array_equal(store.images("train").reshape(-1, 3072), images[:21])
    assert np.array_equal(store.images("test").reshape(-1, 3072), images[21:])
    with pytest.raises(LSGMError, match="no split"):
        store.labels("valid")
    (tmp_path / "val_data").write_bytes(pickle.dumps({"data": images[:, :100], "labels": [0] * 25}))
    with pytest.raises(LSGMError, match=r"val_data: expected `data` as uint8 \[N, 3072\], found uint8 \[25, 100\]"):
        build(any_number("imagenet32"), tmp_path / "again", tmp_path)


# -- images


def write_images(folder: Path, images: Iterable[np.ndarray], name: str = "{:d}.png", start: int = 0) -> Path:
    for i, image in enumerate(images, start):
        file = folder / name.format(i)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(image, {".jpg": "JPEG", ".png": "PNG"}[file.suffix]))
    return folder


def hq(name: str = "celebahq256", size: int = 8, test: int = 3) -> Dataset:
    """The entry, for smaller images and fewer of them."""
    image = registry.dataset(name).image.model_copy(update={"size": size, "padded_size": size})
    return any_number(name, image=image, format=Images(size, test=test))


def test_images_of_the_right_size_are_stored_as_they_are(tmp_path: Path) -> None:
    images = colors(12, 8)
    store = prepared(hq(), write_images(tmp_path / "in", images), tmp_path)
    assert np.array_equal(store.images("train"), images[:9].transpose(0, 3, 1, 2))  # 2.png before 10.png
    assert np.array_equal(store.images("test"), images[9:].transpose(0, 3, 1, 2))
    assert store.splits == {"train": 9, "test": 3}
    assert "the largest central square, resized to 8 x 8 (bilinear)" in store.manifest["source"]["preprocessing"]


def test_images_are_not_taken_for_what_they_are_not(tmp_path: Path) -> None:
    """A file that is as long as its pixels are many; 16 bits; what is transparent; originals that were replaced."""
    fit = Images(8, channels=1, test=1).fit
    ramp = (np.arange(64, dtype=np.uint16) * 1000).reshape(8, 8)
    assert np.array_equal(fit(Image.fromarray(ramp), "x")[0], ramp // 257)
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert (Images(8, test=1).fit(clear, "x") == 255).all()
    with pytest.raises(LSGMError, match="x: has F pixels"):
        fit(Image.fromarray(ramp.astype(np.float32)), "x")

    flat = np.repeat(np.arange(12, dtype=np.uint8), 192).reshape(12, 8, 8, 3)  # compresses to fewer bytes than pixels
    folder = write_images(tmp_path / "in", flat)
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes().ljust(192, b"\0"))
    assert {path.stat().st_size for path in folder.iterdir()} == {192}
    store = prepared(hq(), folder, tmp_path)
    assert np.array_equal(store.images("train"), flat[:9].transpose(0, 3, 1, 2))


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_zip_of_images(tmp_path: Path, wrapped: bool) -> None:
    images = colors(12, 8)
    folder = tmp_path / "in"
    folder.mkdir()
    with zipfile.ZipFile(folder / "data.zip", "w") as archive:
        for i, image in enumerate(images):
            archive.writestr(f"a/{i:05}.png", encoded(image))
            archive.writestr(f"__MACOSX/a/._{i:05}.png", b"not the image")
        archive.writestr("a/readme.txt", "images")
    store = prepared(hq(), folder if wrapped else folder / "data.zip", tmp_path)
    assert np.array_equal(store.images("train"), images[:9].transpose(0, 3, 1, 2))


@pytest.mark.parametrize("shape", [(12, 10), (10, 12), (24, 24)])
def test_the_square_in_the_middle_is_resized(tmp_path: Path, shape: tuple[int, int]) -> None:
    """To half of it (bilinear, as much of the image as a pixel covers): what Pillow makes of the square alone."""
    image = RNG.integers(0, 256, (*shape, 3), dtype=np.uint8)
    write_images(tmp_path / "in", [image] * 3)
    store = prepared(hq(size=5, test=1), tmp_path / "in", tmp_path)
    side = min(shape)
    top, left = (shape[0] - side) // 2, (shape[1] - side) // 2
    square = Image.fromarray(image[top : top + side, left : left + side])
    expected = np.asarray(square.resize((5, 5), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    assert np.array_equal(store.images("train")[0], expected)


def write_celeba(folder: Path, count: int = 8) -> tuple[Path, np.ndarray]:
    """Images of 178 x 218 pixels, gray in the square of 140 pixels and white around it; the partition file."""
    gray = np.arange(count) * 20
    images = np.full((count, 218, 178, 3), 255, np.uint8)
    images[:, 39:179, 19:159] = gray[:, None, None, None]
    write_images(folder / "img_align_celeba", images, "{:06d}.jpg", start=1)
    lines = [f"{i + 1:06}.jpg {0 if i < 5 else 1 if i < 7 else 2}" for i in range(count)]
    (folder / "Eval").mkdir()
    (folder / "Eval" / "list_eval_partition.txt").write_text("\n".join(lines) + "\n")
    return folder, gray


@pytest.mark.parametrize("zipped", [False, True])
def test_celeba(tmp_path: Path, zipped: bool) -> None:
    folder, gray = write_celeba(tmp_path / "in")
    if zipped:
        with zipfile.ZipFile(folder / "img_align_celeba.zip", "w") as archive:
            for file in sorted((folder / "img_align_celeba").iterdir()):
                archive.write(file, f"img_align_celeba/{file.name}")
                file.unlink()
    store = prepared(any_number("celeba64"), folder, tmp_path)
    assert store.splits == {"train": 5, "valid": 2, "test": 1}
    found = np.concatenate([store.images(split) for split in store.splits])
    assert found.shape == (8, 3, 64, 64)
    # The square and nothing around it, but for the corners' JPEG ringing.
    assert np.abs(found[:, :, 4:-4, 4:-4].astype(int) - gray[:, None, None, None]).max() <= 3
    (folder / "Eval" / "list_eval_partition.txt").write_text("000001.jpg 0\n000099.jpg 2\n")
    with pytest.raises(LSGMError, match="has no 000099.jpg .1 of 2 images are missing"):
        build(any_number("celeba64"), tmp_path / "again", folder)
    (folder / "Eval" / "list_eval_partition.txt").unlink()
    with pytest.raises(LSGMError, match="has no list_eval_partition.txt"):
        build(any_number("celeba64"), tmp_path / "again", folder)


def test_a_damaged_image_is_named_and_a_repaired_one_goes_on(tmp_path: Path) -> None:
    images = numbered(12)
    folder = write_images(tmp_path / "in", images)
    whole = (folder / "7.png").read_bytes()
    for damaged, message in ((b"<html>", "7.png: is not a readable image"), (whole[:-30], "7.png: is a damaged")):
        (folder / "7.png").write_bytes(damaged)
        with pytest.raises(LSGMError, match=f"{message}(.|\n)*datasets.celebahq256.path = "):
            build(hq(), tmp_path / "celebahq256", folder, shard_bytes=3 * 192)
    (folder / "7.png").write_bytes(whole)
    store = prepared(hq(), folder, tmp_path)
    assert levels(store, "train") == list(range(9))


def test_what_is_no_set_of_images(tmp_path: Path) -> None:
    with pytest.raises(LSGMError, match="nowhere: does not exist"):
        build(hq(), tmp_path / "out", tmp_path / "nowhere")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "notes.txt").write_text("no image")
    with pytest.raises(LSGMError, match="in: has no images; expected a folder or zip with files"):
        build(hq(), tmp_path / "out", tmp_path / "in")
    with pytest.raises(LSGMError, match="celebahq256: cannot be downloaded: set datasets.celebahq256.path"):
        build(hq(), tmp_path / "out")
    with pytest.raises(LSGMError, match="has 2 images, too few for a test set of 3"):
        build(hq(), tmp_path / "out", write_images(tmp_path / "few", numbered(2)))
    write_images(tmp_path / "hq", numbered(12))
    few = dataclasses.replace(hq(), counts={"train": 27000, "test": 3})
    with pytest.raises(LSGMError, match="expected 27000 images in the split train of celebahq256, found 9"):
        build(few, tmp_path / "out", tmp_path / "hq")


# -- the user's own


def own(path: Path, **images: Any) -> Dataset:
    return registry.dataset("mine", DatasetConfig(path=str(path), images=ImagesConfig(**images)))


def test_a_folder_of_the_users_own(tmp_path: Path) -> None:
    """Any depth, format and size; the test set is drawn, the same for the same seed."""
    write_images(tmp_path / "in" / "a", [np.full((20 + i, 30, 3), 5 * i, np.uint8) for i in range(25)], "{}.jpg")
    write_images(tmp_path / "in" / "test", numbered(15, 40), start=25)
    for i, image in enumerate(numbered(15, 40)):
        (tmp_path / "in" / "test" / f"{i + 25}.png").write_bytes(encoded(image + 125))
    found = {}
    for seed in (0, 0, 1):
        store = prepared(own(tmp_path / "in", size=16, split=0.25, seed=seed), tmp_path / "in", tmp_path / f"o{seed}")
        assert store.splits == {"train": 30, "test": 10} and store.images("train").shape == (30, 3, 16, 16)
        assert sorted(levels(store, "train") + levels(store, "test")) == list(range(40))
        assert found.setdefault(seed, levels(store, "test")) == levels(store, "test")
    assert found[0] != found[1] and found[0] != list(range(30, 40))
    assert store.name == "mine" and store.image.padded_size == 16 and not store.image.binary


def test_train_and_test_folders_of_the_users_own(tmp_path: Path) -> None:
    write_images(tmp_path / "in" / "train", numbered(6))
    write_images(tmp_path / "in" / "Test", numbered(3), "deep/{}.png")
    dataset = own(tmp_path, size=8, split=None, channels=1, binary=True)
    store = prepared(dataset, tmp_path / "in", tmp_path)
    assert levels(store, "train") == list(range(6)) and levels(store, "test") == list(range(3))
    assert store.images("train").shape == (6, 1, 8, 8) and store.image.binary
    with pytest.raises(LSGMError, match="expected a folder that contains train and test"):
        build(dataset, tmp_path / "out", tmp_path / "in" / "train")


def test_a_crop_of_the_users_own(tmp_path: Path) -> None:
    images = colors(3, 10)
    write_images(tmp_path / "in", images)
    store = prepared(own(tmp_path, size=6, crop=6, split=0.4), tmp_path / "in", tmp_path)
    found = np.concatenate([store.images(split) for split in ("train", "test")])
    expected = images[:, 2:8, 2:8].transpose(0, 3, 1, 2)
    assert {image.tobytes() for image in found} == {image.tobytes() for image in expected}
    with pytest.raises(LSGMError, match=r"\d.png: has 10 x 10 pixels, too few for a crop of side 11"):
        build(own(tmp_path, size=6, crop=11, split=0.4), tmp_path / "out", tmp_path / "in")


# -- LMDB


def write_lmdb(path: Path, entries: dict[str, bytes]) -> Path:
    lmdb = pytest.importorskip("lmdb", reason="the package lmdb is not installed")
    with lmdb.open(str(path), map_size=1 << 24) as database, database.begin(write=True) as transaction:
        for key, value in entries.items():
            transaction.put(key.encode(), value)
    return path


def test_lsun(tmp_path: Path) -> None:
    """The two LMDBs of a category, beside those of others; JPEGs whose shorter side is 256."""
    for name, start, count in (("church_outdoor_train", 0, 4), ("church_outdoor_val", 4, 2), ("bedroom_train", 9, 3)):
        images = [np.full((256, 300, 3), 5 * i, np.uint8) for i in range(start, start + count)]
        write_lmdb(tmp_path / f"{name}_lmdb", {f"{hash(i)}{i:02}": encoded(x, "JPEG") for i, x in enumerate(images)})
    store = prepared(any_number("lsun_church"), tmp_path, tmp_path / "out")
    assert store.images("train").shape == (4, 3, 256, 256) and store.images("test").shape == (2, 3, 256, 256)
    assert levels(store, "train") == [0, 1, 2, 3] and levels(store, "test") == [4, 5]
    with pytest.raises(LSGMError, match="expected a folder that contains bedroom_train_lmdb and bedroom_val_lmdb"):
        build(any_number("lsun_bedroom"), tmp_path / "again", tmp_path)


@pytest.mark.parametrize("kind", ["encoded", "bytes", "several resolutions"])
def test_databases_of_faces(tmp_path: Path, kind: str) -> None:
    images = colors(12, 8)
    if kind == "bytes":
        entries = {str(i): image.tobytes() for i, image in enumerate(images)}
    elif kind == "encoded":
        entries = {str(i): encoded(image) for i, image in enumerate(images)}
    else:
        entries = {f"{size}-{i:05}": encoded(image[:size, :size]) for i, image in enumerate(images) for size in (4, 8)}
        entries["length"] = b"12"
    path = write_lmdb(tmp_path / "in", entries)
    store = prepared(hq("ffhq256"), path, tmp_path)
    assert np.array_equal(store.images("train"), images[:9].transpose(0, 3, 1, 2))
    assert np.array_equal(store.images("test"), images[9:].transpose(0, 3, 1, 2))


def test_without_the_package_the_way_out_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lmdb", None)
    (tmp_path / "data.mdb").write_bytes(b"")
    with pytest.raises(LSGMError, match="is an LMDB database, .*: pip install lmdb"):
        build(hq(), tmp_path / "out", tmp_path)


# -- TFRecord


def varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)


def message(*fields: tuple[int, bytes]) -> bytes:
    return b"".join(varint(number << 3 | 2) + varint(len(content)) + content for number, content in fields)


def example(data: bytes, shape: tuple[int, ...], packed: bool = True) -> bytes:
    """A serialized tf.train.Example with `shape`, `data` and a label."""
    integers = b"".join(map(varint, shape))
    shapes = message((1, integers)) if packed else b"".join(b"\x08" + varint(value) for value in shape)
    entries = {"data": message((1, message((1, data)))), "shape": message((3, shapes)),
               "label": message((3, message((1, b"\x07"))))}  # fmt: skip
    return message((1, message(*((1, message((1, key.encode()), (2, entry))) for key, entry in entries.items()))))


def masked(data: bytes) -> bytes:
    crc = slow_crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def write_records(path: Path, payloads: Iterable[bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        for payload in payloads:
            length = struct.pack("<Q", len(payload))
            file.write(length + masked(length) + payload + masked(payload))
    return path


@pytest.mark.parametrize("length", [0, 1, 3, 4, 5, 63, 64, 65, 127, 128, 1000, 5555])
def test_the_checksum_is_that_of_tensorboard(length: int) -> None:
    data = RNG.bytes(length)
    assert struct.pack("<I", tfrecord.masked_crc32c(data)) == masked(data)


@pytest.mark.parametrize("packed", [True, False])
def test_records_of_several_resolutions(tmp_path: Path, packed: bool) -> None:
    """As CelebA-HQ's authors write them: channels first, a file for each resolution."""
    images = colors(12, 8).transpose(0, 3, 1, 2)
    for size in (4, 8):
        payloads = [example(image[:, :size, :size].tobytes(), (3, size, size), packed) for image in images]
        write_records(tmp_path / "in" / f"celeba-hq-r{size:02}.tfrecords", payloads)
    store = prepared(hq(), tmp_path / "in", tmp_path)
    assert np.array_equal(store.images("train"), images[:9]) and np.array_equal(store.images("test"), images[9:])


def test_records_in_parts(tmp_path: Path) -> None:
    """Channels last, folders train and validation, several files in each."""
    images = colors(8, 8)
    for i, image in enumerate(images):
        part = "train" if i < 6 else "validation"
        write_records(tmp_path / "in" / part / f"{part}-r08-s-{i:04}.tfrecords", [example(image.tobytes(), (8, 8, 3))])
    store = prepared(hq(), tmp_path / "in", tmp_path)
    assert np.array_equal(store.images("train"), images[:6].transpose(0, 3, 1, 2))
    assert np.array_equal(store.images("test"), images[6:].transpose(0, 3, 1, 2))


def edited(at: int) -> Callable[[bytes], bytes]:
    return lambda content: content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (edited(0), "is not a TFRecord file, or is damaged at byte 0"),
        (edited(100), "the record at byte 12 is damaged"),
        (edited(300), "the record at byte 2.. is damaged|damaged at byte"),
        (lambda content: content[:-1], "is cut short"),
        (lambda content: content[:-190], "is cut short"),
        (lambda content: b"<html>" * 100, "is not a TFRecord file"),
    ],
)
def test_damaged_records_are_noticed(tmp_path: Path, damage: Callable[[bytes], bytes], text: str) -> None:
    path = write_records(tmp_path / "a.tfrecords", [example(image.tobytes(), (8, 8, 3)) for image in colors(6, 8)])
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(LSGMError, match=f"a.tfrecords: .*({text})"):
        build(hq(), tmp_path / "out", path)


@pytest.mark.parametrize("payload", [b"", b"\xff" * 40, example(b"abc", (8, 8, 3)), example(bytes(64), (8, 8))])
def test_records_of_something_else(tmp_path: Path, payload: bytes) -> None:
    path = write_records(tmp_path / "a.tfrecords", [payload] * 4)
    with pytest.raises(LSGMError, match="the record at byte 12 holds no image"):
        build(hq(), tmp_path / "out", path)
