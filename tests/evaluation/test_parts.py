"""The files of the NELBO's parts: damage is named or computed again, and no two processes write one."""

from __future__ import annotations

import json
import math
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lsgm.errors import LSGMError
from lsgm.evaluation.nelbo_results import read_parts
from lsgm.evaluation.parts import FORMAT, State, locked, read_part

HEADER: dict[str, Any] = {
    "format": FORMAT,
    "stage": {"model": "tiny", "code": None, "nelbo": {"batch": 4, "iw_samples": 1, "extra_estimators": []}},
    "model": "a", "vae": "b", "data": {}, "parts": 1, "part": 0, "images": 6, "dimensions": 784,
}  # fmt: skip
JOBS = [(chunk, prior) for chunk in (0, 1) for prior in ("vae", "lsgm", "lsgm_with_normal_prior")]


def numbers(chunk: int, value: float = 1.5) -> dict[str, Any]:
    values = [value] * (4, 2)[chunk]
    return {"nfe": 8.0, "seconds": 0.5} | dict.fromkeys(("nelbo", "reconstruction", "kl", "iw_bound"), values)


def write(path: Path, value: float = 1.5) -> Path:
    with locked(path.with_suffix(".state")) as file:
        state = State(file, path.with_suffix(".state"), HEADER, JOBS)
        for job in JOBS:
            state.add(job, numbers(job[0], value))
        state.finish(path)
    return path


def old(path: Path) -> Path:
    """As written before lines had hashes."""
    lines = [{k: v for k, v in HEADER.items() if k != "format"}]
    lines += [{"chunk": chunk, "prior": prior, **numbers(chunk, math.nan)} for chunk, prior in JOBS]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_nan_is_null_in_the_file_and_nan_again(tmp_path: Path) -> None:
    path = write(tmp_path / "part", math.nan)
    assert "NaN" not in path.read_text()
    for file in (path, old(tmp_path / "old")):
        header, found = read_parts([file])
        assert header["images"] == 6 and found["lsgm"].nelbo.isnan().sum() == 6
        assert math.isnan(found["lsgm"].summary()["nelbo"]) and found["lsgm"].nfe == 8


def change(line: int, **changes: Any) -> Callable[[Path], object]:
    def spoil(path: Path) -> None:
        lines = path.read_text().splitlines()
        lines[line] = json.dumps(json.loads(lines[line]) | changes)
        path.write_text("\n".join(lines) + "\n")

    return spoil


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (change(0, images=5), 1),
        (change(3, nelbo=[1.0] * 4), 4),
        (change(3, seconds=0.25), 4),
        (lambda path: path.write_text(path.read_text().replace('"format"', '"fOrmat"')), 1),
        (lambda path: path.write_text(path.read_text().replace("1.5", "1.6", 1)), 2),
    ],
)
def test_a_changed_line_is_named(tmp_path: Path, spoil: Callable[[Path], object], line: int) -> None:
    path = write(tmp_path / "part")
    spoil(path)
    with pytest.raises(LSGMError, match=rf"part: line {line}: has changed: .*; delete it, and run"):
        read_part(path)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (change(0, part="0"), "line 1: is not a valid line of a NELBO part .part: "),
        (change(0, stage=[]), "line 1: is not a valid line of a NELBO part .stage: "),
        (change(0, images=-6), "line 1: is not a valid line of a NELBO part .images: "),
        (change(2, nelbo="high"), "line 3: is not a valid line of a NELBO part .nelbo: "),
        (change(2, kl=[1.0, "2.0", 3.0, 4.0]), "line 3: is not a valid line of a NELBO part .kl.1: "),
        (change(2, kl=[1.0, 2.0]), "line 3: is a duplicate, has the wrong number of images, or belongs"),
        (change(2, chunk=7), "line 3: is a duplicate, has the wrong number of images, or belongs"),
        (change(2, chunk=-1), "line 3: is not a valid line of a NELBO part .chunk: "),
        (change(2, prior="vae"), "line 3: is a duplicate, has the wrong number of images, or belongs"),
        (change(2, nfe=None, seconds=-1.0), "line 3: is not a valid line of a NELBO part .seconds: "),
        (
            lambda path: path.write_text(path.read_text().replace('"kl"', '"KL"', 1)),
            "line 2: is not a valid line of a NELBO part .kl: ",
        ),
        (lambda path: path.write_text(""), "line 1: is not valid JSON"),
        (lambda path: path.write_text("[1]\n"), "line 1: is not a valid line of a NELBO part .the whole line: "),
        (lambda path: path.write_bytes(path.read_bytes()[:-40] + b"\xff"), "is not a UTF-8 text file"),
        (lambda path: path.write_text("[" * 100_000), "line 1: is not valid JSON"),
    ],
)
def test_what_is_no_part_is_named(tmp_path: Path, spoil: Callable[[Path], object], says: str) -> None:
    path = old(tmp_path / "part")
    read_part(path)
    spoil(path)
    with pytest.raises(LSGMError, match=rf"part: {says}.*; delete it, and run") as caught:
        read_part(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("prior", ["vae", "lsgm", "lsgm_with_normal_prior"])
def test_a_prior_without_lines_is_named(tmp_path: Path, prior: str) -> None:
    path = write(tmp_path / "part")
    path.write_text("".join(line for line in path.read_text().splitlines(True) if f'"prior": "{prior}"' not in line))
    with pytest.raises(LSGMError, match=rf"NELBO of tiny: 0 of 6 images \({prior}\) in .*part; delete"):
        read_parts([path])


@pytest.mark.parametrize("damage", ["digit", "binary", "deep", "twice", "cut"])
def test_a_state_goes_on_before_its_damaged_line(tmp_path: Path, damage: str) -> None:
    lines = write(tmp_path / "whole").read_bytes().splitlines(keepends=True)
    spoilt = {"digit": lines[3].replace(b"1.5", b"1.6", 1), "binary": b"\xff\n", "deep": b"[" * 100_000 + b"\n",
              "twice": lines[2], "cut": lines[3][:-1]}[damage]  # fmt: skip
    path = tmp_path / "state"
    path.write_bytes(b"".join([*lines[:3], spoilt, *([] if damage == "cut" else lines[4:])]))
    with locked(path) as file:
        state = State(file, path, HEADER, JOBS)
        assert state.done == set(JOBS[:2])
        with pytest.raises(LSGMError, match="state: has 2 of 6 valid lines"):
            state.finish(tmp_path / "early")
        for job in JOBS[2:]:
            state.add(job, numbers(job[0]))
        state.finish(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == b"".join(lines)
    assert not path.exists() and not (tmp_path / "early").exists()


def test_one_process_writes_a_part(tmp_path: Path) -> None:
    path = tmp_path / "state"
    with locked(path) as file:
        State(file, path, HEADER, JOBS).add(JOBS[0], numbers(0))
        with pytest.raises(LSGMError, match="state: another process is computing this part"), locked(path):
            pass
    with locked(path) as file:
        assert State(file, path, HEADER, JOBS).done == {JOBS[0]}
    with pytest.raises(LSGMError, match="no data"), locked(tmp_path / "empty"):
        raise LSGMError("no data")
    assert not (tmp_path / "empty").exists()


def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "state"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.raises(OSError, match="File too large: '.*state'"), locked(path) as file:
        state = State(file, path, HEADER, JOBS)
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 100, limits[1]))
        try:
            state.add(JOBS[0], numbers(0))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with locked(path) as file:
        assert State(file, path, HEADER, JOBS).done == set()
