"""A store is written in shards: what an interruption leaves is verified and kept; what was written is read again."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lsgm.config import ImageConfig
from lsgm.data import prepare as module
from lsgm.data.formats import Contents
from lsgm.data.prepare import JOURNAL, build
from lsgm.data.registry import Dataset
from lsgm.data.store import ImageStore
from lsgm.errors import LSGMError

IMAGES = np.random.default_rng(0).integers(0, 256, (23, 3, 8, 8), dtype=np.uint8)
SHARD = 4 * 3 * 8 * 8  # bytes: four images


class Counted:
    """Rows that remember what was read of them, and fail when they are told to."""

    def __init__(self, images: np.ndarray) -> None:
        self.images, self.shape = images, images.shape
        self.read: list[int] = []
        self.fails_at: int | None = None

    def __getitem__(self, rows: slice) -> np.ndarray:
        if rows.start == self.fails_at:
            raise LSGMError("image 8: is damaged")
        self.read.append(rows.start)
        return self.images[rows]


class Source:
    """A format whose images are in memory."""

    def __init__(self, facts: dict[str, str] | None = None) -> None:
        self.train, self.test, self.facts = Counted(IMAGES), Counted(IMAGES[:5]), facts or {}

    def open(self, path: Path, stack: object) -> Contents:
        return Contents({"train_images": self.train, "test_images": self.test}, self.facts)


def made(source: Source, out: Path, image_size: int = 8) -> dict:
    image = ImageConfig(channels=3, size=image_size, padded_size=8, binary=False)
    return build(Dataset("small", image, "", source), out, out.parent, shard_bytes=SHARD)


def test_shards_make_the_file_that_numpy_writes(tmp_path: Path) -> None:
    source = Source()
    made(source, tmp_path / "out")
    assert source.train.read == [0, 4, 8, 12, 16, 20] and source.test.read == [0, 4]
    np.save(tmp_path / "numpy.npy", IMAGES)
    assert (tmp_path / "out" / "train_images.npy").read_bytes() == (tmp_path / "numpy.npy").read_bytes()
    store = ImageStore(tmp_path / "out")
    store.verify()
    assert np.array_equal(store.images("train"), IMAGES) and isinstance(store.images("train"), np.memmap)
    assert sorted(os.listdir(tmp_path)) == ["numpy.npy", "out"]


def interrupted(out: Path, at: int = 8) -> None:
    source = Source()
    source.train.fails_at = at
    with pytest.raises(LSGMError, match="image 8: is damaged"):
        made(source, out)
    assert not out.exists()


def test_shards_that_are_there_are_kept(tmp_path: Path) -> None:
    interrupted(tmp_path / "out")
    again = Source()
    made(again, tmp_path / "out")
    assert again.train.read == [8, 12, 16, 20]
    ImageStore(tmp_path / "out").verify()
    assert np.array_equal(ImageStore(tmp_path / "out").images("train"), IMAGES)
    assert os.listdir(tmp_path) == ["out"]


def flip(path: Path) -> None:
    content = bytearray((path / "train_images.npy").read_bytes())
    content[128 + SHARD + 5] ^= 1
    (path / "train_images.npy").write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "read"),
    [
        (flip, [4, 8, 12, 16, 20]),
        (lambda path: (path / "train_images.npy").unlink(), [0, 4, 8, 12, 16, 20]),
        (lambda path: os.truncate(path / "train_images.npy", 200), [0, 4, 8, 12, 16, 20]),
        (lambda path: os.truncate(path / JOURNAL, (path / JOURNAL).stat().st_size - 9), [4, 8, 12, 16, 20]),
        (lambda path: (path / JOURNAL).write_text(""), [0, 4, 8, 12, 16, 20]),
    ],
    ids=["flipped bit", "gone", "cut", "cut journal", "no journal"],
)
def test_what_is_kept_was_verified(tmp_path: Path, damage: Callable[[Path], object], read: list[int]) -> None:
    interrupted(tmp_path / "out")
    damage(tmp_path / ".out.part")
    again = Source()
    made(again, tmp_path / "out")
    assert again.train.read == read
    assert np.array_equal(ImageStore(tmp_path / "out").images("train"), IMAGES)


def test_shards_of_other_originals_are_made_again(tmp_path: Path) -> None:
    interrupted(tmp_path / "out")
    again = Source({"sha256": "other"})
    manifest = made(again, tmp_path / "out")
    assert again.train.read == [0, 4, 8, 12, 16, 20]
    assert manifest["source"]["sha256"] == "other"


def test_a_process_that_is_killed_loses_one_shard(tmp_path: Path) -> None:
    """SIGKILL in the middle; the next call makes what a whole one makes."""
    script = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_prepare as t
class Slow(t.Counted):
    def __getitem__(self, rows):
        time.sleep(60 if rows.start == 12 else 0)
        return super().__getitem__(rows)
source = t.Source()
source.train = Slow(t.IMAGES)
t.made(source, t.Path({str(tmp_path / "out")!r}))
"""
    process = subprocess.Popen([sys.executable, "-c", script])
    journal = tmp_path / ".out.part" / JOURNAL
    for _ in range(600):
        if journal.exists() and len(journal.read_text().splitlines()) == 4:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    again = Source()
    made(again, tmp_path / "out")
    assert again.train.read == [12, 16, 20]
    assert np.array_equal(ImageStore(tmp_path / "out").images("train"), IMAGES)


def test_what_the_disk_gives_back_is_held_against_what_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = module.write_array

    def written_and_changed(path: Path, *arguments: object) -> None:
        write(path, *arguments)
        flip(path.parent)

    monkeypatch.setattr(module, "write_array", written_and_changed)
    with pytest.raises(LSGMError, match=r"train_images.npy: rows from 4 on differ from what was written"):
        made(Source(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_keeps_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(LSGMError, match="written .No space left on device.; what is in .*resumes"):
            made(Source(), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    made(Source(), tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]


def test_one_process_at_a_time(tmp_path: Path) -> None:
    part = tmp_path / ".out.part"
    part.mkdir()
    with (part / JOURNAL).open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(LSGMError, match="another process is preparing this dataset"):
            made(Source(), tmp_path / "out")
    made(Source(), tmp_path / "out")


def test_images_of_another_shape_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LSGMError, match=r"found images of shape \[3, 8, 8\], expected \[3, 4, 4\]"):
        made(Source(), tmp_path / "out", image_size=4)


def test_the_manifest_says_how_a_model_sees_the_images(tmp_path: Path) -> None:
    made(Source(), tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["image"] == {"channels": 3, "size": 8, "padded_size": 8, "binary": False}
    assert ImageStore(tmp_path / "out").image == ImageConfig(channels=3, size=8, padded_size=8, binary=False)
