"""Which files of a folder belong to a set."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

from lsgm.data.walk import KINDS, children, hidden, printable, told, walk


def write(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    return root


def found(root: Path, left_out: Counter[str] | None = None) -> list[str]:
    return [file.relative_to(root).as_posix() for file in walk(root, left_out)]


@pytest.mark.parametrize(
    "name",
    [
        ".0.png", ".ipynb_checkpoints/0-checkpoint.png", "a/.git/0.png", "a/.b/c/0.png", "__MACOSX/a/._0.png",
        "._0.png", ".DS_Store", "Thumbs.db", "THUMBS.DB", "desktop.ini", "@eaDir/0.png/SYNOPHOTO_THUMB_M.png",
        "lost+found/0.png", "$RECYCLE.BIN/S-1-5/0.png", "System Volume Information/0.png", ".Trash-1000/files/0.png",
        "lock.mdb",
    ],
)  # fmt: skip
def test_what_is_hidden_is_no_data(tmp_path: Path, name: str) -> None:
    assert hidden(name)
    assert found(write(tmp_path / ".cache" / "set", name, "a/0.png", "a.b/0.png")) == ["a/0.png", "a.b/0.png"]


@pytest.mark.parametrize(
    "name", ["0.png", "a/b.c/0.png", "../0.png", "./0.png", "/a/0.png", "my__MACOSX.png", "lost/0"]
)
def test_what_is_not_hidden(name: str) -> None:
    assert not hidden(name)


def test_windows_archives_have_backslashes() -> None:
    assert hidden("a\\.ipynb_checkpoints\\0.png") and not hidden("a\\b\\0.png")


def test_the_order_is_that_of_paths(tmp_path: Path) -> None:
    names = ["a.png", "a/0.png", "a/b/0.png", "a-b/0.png", "B.png", "10.png", "9.png"]
    assert walk(write(tmp_path, *names)) == sorted(tmp_path / name for name in names)
    assert walk(tmp_path / "a.png") == [tmp_path / "a.png"]
    assert [child.name for child in children(write(tmp_path, ".x"))] == [
        "10.png",
        "9.png",
        "B.png",
        "a",
        "a-b",
        "a.png",
    ]


def test_links_are_followed_and_each_folder_is_read_once(tmp_path: Path) -> None:
    """In the set itself under its own name, whatever the names of the links; a linked file is a file."""
    root = write(tmp_path / "set", "z/0.png")
    write(tmp_path / "elsewhere", "1.png", "deep/2.png")
    (root / "a").symlink_to(root / "z")
    (root / "b").symlink_to(tmp_path / "elsewhere")
    (root / "c").symlink_to(tmp_path / "elsewhere")
    (root / "d.png").symlink_to(root / "z" / "0.png")
    left_out: Counter[str] = Counter()
    assert found(root, left_out) == ["b/1.png", "b/deep/2.png", "d.png", "z/0.png"]
    assert left_out == {"links to folders that were already read": 2}
    (tmp_path / "link").symlink_to(root)
    assert found(tmp_path / "link") == found(root)


def test_loops_end(tmp_path: Path) -> None:
    """Also where a dozen folders link to each other, through which there are millions of ways."""
    root = tmp_path / "set"
    for i in range(12):
        write(root, f"{i}/x.png")
        for j in range(12):
            (root / f"{i}" / f"to{j}").symlink_to(root / f"{j}")
    (root / "self").symlink_to(root)
    (root / "0" / "up").symlink_to("../..")
    write(tmp_path, "another set/0.png")
    assert found(root) == sorted(f"{i}/x.png" for i in range(12))


def test_what_cannot_be_read_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "0.png", "shut/1.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "itself.png").symlink_to("itself.png")
    os.mkfifo(tmp_path / "pipe.png")
    scandir = os.scandir

    def refusing(path: Path) -> object:
        if Path(path).name == "shut":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)  # root may read everything
    left_out: Counter[str] = Counter()
    assert found(tmp_path, left_out) == ["0.png"]
    assert left_out == {"dangling links": 2, "special files": 1, "unreadable folders": 1}
    with pytest.raises(PermissionError):
        walk(tmp_path / "shut")


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    assert found(write(tmp_path, name)) == [name]
    assert printable(name) == r"caf\xe9.png"
    assert printable("café\n\x1b[2J\ud800") == r"café\n\x1b[2J\ud800"


def test_the_kinds_that_were_left_out_are_told_in_one_line() -> None:
    assert told(Counter({".txt": 2, "dangling links": 12, ".a\n": 1})) == r"12 dangling links, 2 .txt, 1 .a\n"
    many = Counter({f".{i:02}": 100 - i for i in range(KINDS + 3)})
    assert told(many).endswith(f", {100 - KINDS + 1} .{KINDS - 1:02}, {3 * (100 - KINDS) - 3} of other kinds")
