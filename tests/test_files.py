"""Files that are whole or not there; text that is damaged."""

from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lsgm.errors import LSGMError
from lsgm.files import atomic, is_sealed, lock, parse_json, read_json, read_text, seal, write_json


def test_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    with atomic(tmp_path / "a/b") as part:
        part.write_text("whole")
        assert not (tmp_path / "a/b").exists()
    with pytest.raises(ValueError, match="no"), atomic(tmp_path / "a/b") as part:
        part.write_text("half")
        raise ValueError("no")
    assert [(path.name, path.read_text()) for path in (tmp_path / "a").iterdir()] == [("b", "whole")]


def test_an_error_without_a_name_gets_one(tmp_path: Path) -> None:
    with pytest.raises(OSError) as caught, atomic(tmp_path / "a"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "a"))
    with pytest.raises(FileNotFoundError) as caught, atomic(tmp_path / "a"):
        (tmp_path / "other").read_text()
    assert caught.value.filename == str(tmp_path / "other")


def test_abandoned_files_are_removed_and_those_in_use_stay(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys; from lsgm.files import atomic\n"
        "with atomic(sys.argv[1]): os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", script, tmp_path / "killed"], check=False)
    (abandoned,) = tmp_path.iterdir()
    assert abandoned.name.startswith(".killed.")
    (tmp_path / ".mine.part").write_text("no process is in the name")
    with atomic(tmp_path / "first") as first:
        assert not abandoned.exists()
        with atomic(tmp_path / "second") as second:
            assert first.exists()
            second.write_text("2")
        first.write_text("1")
    assert {path.name for path in tmp_path.iterdir()} == {".mine.part", "first", "second"}


def test_json_is_strict(tmp_path: Path) -> None:
    write_json(tmp_path / "a", {"a": [math.nan, 1.5, (math.inf,)], "b": {"c": -math.inf}})
    assert json.loads((tmp_path / "a").read_text(), parse_constant=pytest.fail) == {
        "a": [None, 1.5, [None]],
        "b": {"c": None},
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not valid JSON"),
        (b'{"a": 1, "a": 2}', "the key 'a' appears twice"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": "\xff"}', "is not a UTF-8 text file .byte 7 is 0xff"),
        (b"\xff\xfe{\x00}\x00", "is not a UTF-8 text file"),
    ],
)
def test_damaged_text_is_told_in_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(LSGMError, match=rf"a\.json: .*{message}.*; write it again$") as caught:
        read_json(tmp_path / "a.json", "write it again")
    assert "\n" not in str(caught.value)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(LSGMError, match=r"none: cannot be read \(No such file"):
        read_text(tmp_path / "none")
    with pytest.raises(LSGMError, match=r"cannot be read \(Is a directory"):
        read_text(tmp_path)


def test_a_seal_covers_all_keys() -> None:
    sealed = seal({"a": 1, "b": [0.1, None]})
    assert is_sealed(sealed)
    assert is_sealed(parse_json(json.dumps(sealed), "x"))
    for change in ({"a": 2}, {"b": [0.1]}, {"c": 0}, {"sha256": "0" * 64}):
        assert not is_sealed(sealed | change)
    assert not is_sealed({"a": 1})


def test_a_lock_is_for_one(tmp_path: Path) -> None:
    with open(tmp_path / "a", "w") as one, open(tmp_path / "a", "w") as other:
        lock(one, "busy")
        with pytest.raises(LSGMError, match="busy"):
            lock(other, "busy")
    with open(tmp_path / "a", "w") as third:
        lock(third, "busy")
    assert os.listdir(tmp_path) == ["a"]
