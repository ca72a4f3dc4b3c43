"""Files of weights: where they are looked for, how their content is checked, what is said where they cannot be had."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from lsgm.errors import LSGMError
from lsgm.evaluation.pretrained import WeightsFile

CONTENT = bytes(range(256)) * 40
FILE = WeightsFile("net.pth", "", hashlib.sha256(CONTENT).hexdigest(), len(CONTENT))
CACHE = Path("torch/hub/checkpoints")


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without weights, whose torch cache is in tmp_path."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.delenv("LSGM_WEIGHTS", raising=False)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    return tmp_path


@pytest.fixture
def served() -> Iterator[str]:
    """The address of a server on loopback that has the file as /good, cut short as /cut, another one as /wrong."""
    bodies = {"/good": CONTENT, "/cut": CONTENT[:500], "/wrong": CONTENT[::-1]}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(CONTENT)))
            self.end_headers()
            self.wfile.write(bodies[self.path])

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def put(folder: Path, content: bytes = CONTENT) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FILE.name).write_bytes(content)
    return folder / FILE.name


def at(url: str) -> WeightsFile:
    return WeightsFile(FILE.name, url, FILE.sha256, FILE.size)


def test_the_named_folder_comes_before_the_caches(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = WeightsFile(FILE.name, "", FILE.sha256, FILE.size, library_folder=machine / "library")
    own = put(machine / "library")
    assert file.find() == own
    cached = put(machine / CACHE)
    assert file.find() == cached
    monkeypatch.setenv("LSGM_WEIGHTS", str(machine / "mine"))
    assert file.find() == cached
    assert file.find() != put(machine / "mine") == file.find()


@pytest.mark.parametrize("content", [CONTENT[:-1], CONTENT[::-1]])
def test_a_damaged_file_is_not_used(machine: Path, content: bytes) -> None:
    path = put(machine / CACHE, content)
    with pytest.raises(LSGMError, match=f"{path}: is damaged or another file .*expected {FILE.sha256}.; remove it"):
        FILE.find()
    assert path.read_bytes() == content


def test_downloads_to_the_cache_once(machine: Path, served: str) -> None:
    found = at(f"{served}/good").find()
    assert found == machine / CACHE / FILE.name
    assert found.read_bytes() == CONTENT
    assert at("http://127.0.0.1:1/nobody").find() == found


@pytest.mark.parametrize("way", ["cut", "wrong", "closed"])
def test_without_a_good_download_it_says_where_to_put_the_file(machine: Path, served: str, way: str) -> None:
    url = "http://127.0.0.1:1/closed" if way == "closed" else f"{served}/{way}"
    place = machine / CACHE / FILE.name
    with pytest.raises(LSGMError) as caught:
        at(url).find()
    assert re.search(rf"{place}: .*get {url} \(0.0 MB, sha256 {FILE.sha256}\) and put it there", str(caught.value))
    assert "LSGM_WEIGHTS" in str(caught.value)
    assert not place.exists() and not list(place.parent.glob(".*"))
