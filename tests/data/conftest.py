"""A small dataset in the true IDX format, and an HTTP server that serves it well or badly."""

from __future__ import annotations

import gzip
import hashlib
import struct
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from lsgm.data.idx import IDXFile, IDXFiles
from lsgm.data.registry import DIGITS, Dataset, idx_downloads


def idx_bytes(array: np.ndarray) -> bytes:
    """`array` as an IDX file."""
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture(scope="session")
def originals() -> dict[str, bytes]:
    """The four files of a dataset of 20 + 10 images, unpacked, under MNIST's names."""
    rng = np.random.default_rng(1)
    files = {}
    for prefix, count in (("train", 20), ("t10k", 10)):
        files[f"{prefix}-images-idx3-ubyte"] = idx_bytes(rng.integers(0, 256, (count, 28, 28), dtype=np.uint8))
        files[f"{prefix}-labels-idx1-ubyte"] = idx_bytes(rng.integers(0, 10, (count,), dtype=np.uint8))
    return files


@pytest.fixture
def small(originals: dict[str, bytes]) -> Dataset:
    """The registry entry of `originals`; it has no mirrors and no npm package."""
    files = IDXFiles(
        tuple(
            IDXFile(
                name=name,
                split="train" if name.startswith("train") else "test",
                kind="images" if "images" in name else "labels",
                shape=struct.unpack(f">{content[3]}I", content[4 : 4 + 4 * content[3]]),
                sha256=hashlib.sha256(content).hexdigest(),
            )
            for name, content in originals.items()
        )
    )
    return Dataset("small", DIGITS, "none needed", files, downloads=idx_downloads(files))


class Server:
    """HTTP on loopback: `/WAY/NAME.gz` answers with the file NAME in the way WAY; counts the requests."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = dict(files)
        self.requests: list[str] = []
        self.sent = 0  # bytes, by the way `resumable`
        self.stop = threading.Event()
        served, ways = self, self._ways()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                served.requests.append(self.path)
                _, way, name = self.path.split("/")
                content = served.files[name if name in served.files else name.removesuffix(".gz")]
                ways[way](self, gzip.compress(content, mtime=0))

            def log_message(self, *_: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self) -> None:
        self.stop.set()
        self._http.shutdown()
        self._http.server_close()

    def _ways(self) -> dict[str, Callable[[BaseHTTPRequestHandler, bytes], None]]:
        def send(to: BaseHTTPRequestHandler, body: bytes, announced: int | None = None) -> None:
            to.send_response(200)
            to.send_header("Content-Length", str(len(body) if announced is None else announced))
            to.end_headers()
            to.wfile.write(body)

        def slow(to: BaseHTTPRequestHandler, body: bytes) -> None:
            send(to, body[:10], len(body))
            self.stop.wait(5)

        def silent(to: BaseHTTPRequestHandler, body: bytes) -> None:
            self.stop.wait(5)

        def held(to: BaseHTTPRequestHandler, body: bytes) -> None:
            send(to, body)
            self.stop.wait(5)  # the connection stays open

        def trickle(to: BaseHTTPRequestHandler, body: bytes) -> None:
            send(to, b"", len(body))
            for byte in body:
                if self.stop.wait(0.05):
                    return
                try:
                    to.wfile.write(bytes([byte]))
                except OSError:  # the client has gone
                    return

        def resumable(to: BaseHTTPRequestHandler, body: bytes) -> None:
            """Ends every connection after a third of the file, and goes on where it is asked to."""
            asked = to.headers.get("Range") if to.headers.get("If-Range") == '"v1"' else None
            start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
            to.send_response(206 if asked else 200)
            to.send_header("ETag", '"v1"')
            if asked:
                to.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
            to.send_header("Content-Length", str(len(body) - start))
            to.end_headers()
            to.wfile.write(body[start : start + len(body) // 3 + 1])
            self.sent += min(len(body) // 3 + 1, len(body) - start)

        def flaky(to: BaseHTTPRequestHandler, body: bytes) -> None:
            first = self.requests.count(to.path) == 1
            send(to, body[: len(body) // 2] if first else body, len(body))

        return {
            "good": send,
            "plain": lambda to, body: send(to, gzip.decompress(body)),
            "wrong": lambda to, body: send(to, gzip.compress(bytes(len(gzip.decompress(body))))),
            "long": lambda to, body: send(to, gzip.compress(gzip.decompress(body) + b"more")),
            "html": lambda to, body: send(to, b"<html>log in to this network</html>"),
            "short": lambda to, body: send(to, body[: len(body) // 2]),
            "cut": lambda to, body: send(to, body[: len(body) // 2], len(body)),
            "missing": lambda to, body: to.send_error(404),
            "broken": lambda to, body: to.send_error(503),
            "silent": silent,
            "held": held,
            "slow": slow,
            "trickle": trickle,
            "flaky": flaky,
            "resumable": resumable,
        }


@pytest.fixture
def server(originals: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    running = Server(originals)
    yield running
    running.close()
