"""State files: whole or not there, the last two kept, a damaged one passed over, a foreign one refused."""

import os
from pathlib import Path

import pytest
import torch

from lsgm.errors import LSGMError
from lsgm.files import sha256
from lsgm.training import state
from lsgm.training.state import States

STATE = {"parts": {"w": torch.arange(5.0)}, "count": 3, "rows": [{"step": 1, "loss": 0.5}]}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_last_two_are_kept_and_the_newest_is_read(tmp_path):
    states = States(tmp_path / "state", {"lr": 1.0})
    assert states.load() is None
    for step in (0, 7, 12):
        states.save(step, {**STATE, "count": step})
    assert names(tmp_path / "state") == [
        "step-000000007.pt", "step-000000007.sha256", "step-000000012.pt", "step-000000012.sha256"
    ]  # fmt: skip
    step, found = states.load()
    assert step == 12 and found["count"] == 12 and torch.equal(found["parts"]["w"], STATE["parts"]["w"])
    states.clear()
    assert not (tmp_path / "resume").exists() and states.load() is None


@pytest.mark.parametrize(
    "damage", ["cut", "flipped", "no checksum", "empty", "binary checksum", "folder", "checksum is a folder"]
)
def test_a_damaged_file_is_passed_over(tmp_path, damage):
    states = States(tmp_path, {})
    states.save(1, STATE)
    states.save(2, STATE)
    newest = tmp_path / "step-000000002.pt"
    content = bytearray(newest.read_bytes())
    if damage == "cut":
        newest.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        content[len(content) // 2] ^= 1
        newest.write_bytes(content)
    elif damage == "empty":
        newest.write_bytes(b"")
    elif damage == "binary checksum":
        newest.with_suffix(".sha256").write_bytes(b"\xff\xfe\0")
    elif damage in ("folder", "checksum is a folder"):
        path = newest if damage == "folder" else newest.with_suffix(".sha256")
        path.unlink()
        path.mkdir()
    else:
        newest.with_suffix(".sha256").unlink()
    assert states.load()[0] == 1


@pytest.mark.parametrize(
    "content",
    [
        [1, 2],
        {"step": 1, "identity": {}, "state": {}},
        {"step": 2, "state": {}},
        {"step": 2, "identity": [], "state": {}},
        {"step": 2, "identity": {}, "state": 3},
    ],
    ids=["list", "step", "no identity", "identity", "state"],
)
def test_what_is_no_state_is_passed_over(tmp_path, content):
    states = States(tmp_path, {})
    states.save(1, STATE)
    states.save(2, STATE)
    path = tmp_path / "step-000000002.pt"
    torch.save(content, path)
    path.with_suffix(".sha256").write_text(sha256(path) + "\n")
    assert states.load()[0] == 1


def test_a_part_that_a_state_lacks_is_named(tmp_path):
    states = States(tmp_path, {})
    states.save(1, STATE)
    _, found = states.load()
    assert "w" in found["parts"]
    for look_up in (lambda: found["scaler"], lambda: found["parts"]["ema"]):
        with pytest.raises(LSGMError, match=r"step-000000001.pt: has no (scaler|parts.ema), .*to start over"):
            look_up()


def test_a_state_of_other_settings_is_refused(tmp_path):
    States(tmp_path, {"lr": 1.0, "batch": 8}).save(5, STATE)
    with pytest.raises(LSGMError, match=r"other settings \(lr\); put them back to resume, or remove"):
        States(tmp_path, {"lr": 2.0, "batch": 8}).load()
    assert States(tmp_path, {"lr": 1.0, "batch": 8}).load()[0] == 5


def test_a_full_disk_leaves_the_last_state(tmp_path, monkeypatch):
    states = States(tmp_path, {})
    states.save(1, STATE)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(state.os, "fsync", full)
    with pytest.raises(LSGMError, match="cannot be written .No space left on device.; make room"):
        states.save(2, STATE)
    monkeypatch.undo()
    assert states.load()[0] == 1 and len(names(tmp_path)) == 2


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="needs a folder that nobody can write to, as Linux has")
def test_a_read_only_folder_is_named():
    with pytest.raises(LSGMError, match=r"/sys/lsgm/.*cannot be written \((Oper|Perm|Read).*; make room"):
        States(Path("/sys/lsgm"), {}).save(1, STATE)


def test_nothing_in_a_state_is_executed(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, ("touch evil",)

    states = States(tmp_path, {})
    states.save(1, STATE)
    states.save(2, {"x": Evil()})
    assert states.load()[0] == 1


def test_without_a_whole_state_nothing_is_begun_anew(tmp_path):
    """It would replace what someone may want to restore."""
    states = States(tmp_path, {})
    for step in (1, 2):
        states.save(step, STATE)
        (tmp_path / f"step-{step:09}.pt").write_bytes(b"not this")
    with pytest.raises(LSGMError, match="no state in it is whole; restore one, or remove the folder"):
        states.load()
    states.save(1, STATE)  # the damaged one of later steps goes
    assert states.load()[0] == 1 and len(names(tmp_path)) == 2


def test_states_before_a_step(tmp_path):
    states = States(tmp_path, {})
    for step in (3, 5):
        states.save(step, STATE)
    assert states.load(below=5)[0] == 3 and states.load(below=3) is None
