"""The file format of one part of a NELBO computation: JSON lines with a sha256 each, appended as the job progresses.

The first line is a header that identifies the model, data and settings. Each further line holds the NELBOs of a chunk
of images under one prior, one number per image (null where the ODE could not be solved). Files from older versions
have no hashes.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Annotated, Any

from pydantic import ConfigDict, Field, ValidationError

from lsgm.config import Section
from lsgm.errors import LSGMError
from lsgm.evaluation.records import Number
from lsgm.files import atomic, is_sealed, lock, parse_json, read_text, seal, to_json, write_all
from lsgm.progress import log

FORMAT = 2  # version of the format in which every line has a hash
WAY_OUT = "delete it, and run the workflow or `lsgm nelbo` again"

Natural = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Job = tuple[int, str]  # number of the chunk, name of the prior


class _Part(Section):
    """Base of the records below. Unknown keys are allowed."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=True)


class _Settings(_Part):
    batch: Positive
    iw_samples: Positive


class _Stage(_Part):
    model: str
    nelbo: _Settings
    code: str | None = None


class _Header(_Part):
    stage: _Stage
    model: str
    vae: str
    data: dict[str, str]
    parts: Positive
    part: Natural
    images: Positive
    dimensions: Positive


class Check(_Part):
    """Differences between estimates of log p(z0) in nats; each list has one number per checked image."""

    solver: list[Number]
    noise: list[Number]


class Line(_Part):
    """The NELBOs of one chunk of images in nats; each list has one number per image."""

    chunk: Natural
    prior: str
    nfe: Number
    seconds: Annotated[float, Field(ge=0)]
    nelbo: list[Number]
    reconstruction: list[Number]
    kl: list[Number]
    iw_bound: list[Number]
    check: Check | None = None

    @property
    def job(self) -> Job:
        return self.chunk, self.prior


def read_part(path: Path) -> tuple[dict[str, Any], list[Line]]:
    """Read the header and the lines of a part.

    Raises:
        LSGMError: the file is missing or damaged; the message names the line and says what to do.
    """
    texts = read_text(path, WAY_OUT).splitlines() or [""]
    header = _parse(_Header, texts[0], f"{path}: line 1")
    sealed = "format" in header or "sha256" in header
    images, parts, batch = header["images"], header["parts"], header["stage"]["nelbo"]["batch"]
    if header["part"] >= parts or (sealed and not is_sealed(header)):
        raise LSGMError(f"{path}: line 1: has changed: its sha256 does not match its content; {WAY_OUT}")
    lines: dict[Job, Line] = {}
    for number, text in enumerate(texts[1:], 2):
        where = f"{path}: line {number}"
        raw = _parse(Line, text, where)
        if sealed and not is_sealed(raw):
            raise LSGMError(f"{where}: has changed: its sha256 does not match its content; {WAY_OUT}")
        line = Line.model_validate(raw)
        size = min(batch, images - line.chunk * batch)  # images in the chunk
        lengths = {len(values) for values in (line.nelbo, line.reconstruction, line.kl, line.iw_bound)}
        if line.chunk % parts != header["part"] or lengths != {size} or line.job in lines:
            raise LSGMError(
                f"{where}: is a duplicate, has the wrong number of images, or belongs to another part; {WAY_OUT}"
            )
        lines[line.job] = line
    return header, list(lines.values())


def _parse(kind: type[_Part], text: str, where: str) -> dict[str, Any]:
    """Parse a line and validate it as a ``kind``; raises :class:`LSGMError` if it is not one."""
    raw = parse_json(text, where, WAY_OUT)
    try:
        kind.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "the whole line"
        raise LSGMError(f"{where}: is not a valid line of a NELBO part ({key}: {first['msg']}); {WAY_OUT}") from None
    return dict(raw)


@contextmanager
def locked(path: Path) -> Iterator[IO[bytes]]:
    """Open the state file ``path`` for reading and appending, locked for this process; remove it if it stays empty.

    Raises:
        LSGMError: another process holds the lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with path.open("a+b", buffering=0) as file:  # unbuffered: a full disk fails the write, not the close
            lock(file, f"{path}: another process is computing this part of the NELBO; wait for it, or stop it")
            if not os.fstat(file.fileno()).st_nlink:  # another process removed the file before we locked it
                continue
            try:
                yield file
            finally:
                if not os.fstat(file.fileno()).st_size:
                    path.unlink(missing_ok=True)
            return


class State:
    """The results of a part that are already on disk, to resume from.

    Results from other settings are discarded, and so is everything after a damaged line.

    Args:
        file: an open file from :func:`locked`.
        header: identifies the model, data and settings of the part.
        jobs: all jobs of the part.
    """

    def __init__(self, file: IO[bytes], path: Path, header: dict[str, Any], jobs: Collection[Job]) -> None:
        self._file, self._path, self._jobs = file, path, set(jobs)
        self._header = seal(header)
        file.seek(0)
        content = file.read()
        self.done, end = self._whole(content)
        if end:
            log.info(f"{path}: resuming, {len(self.done)} results are done")
        elif content:
            log.info(f"{path}: {self._difference(content)}; starting over")
        file.truncate(end)
        if not end:
            self._write(self._header)

    def add(self, job: Job, numbers: dict[str, Any]) -> None:
        """Append the results of ``job`` to the file."""
        self._write(seal({"chunk": job[0], "prior": job[1], **numbers}))
        self.done.add(job)

    def finish(self, out: Path) -> None:
        """Write the finished part to ``out`` and remove the state file.

        Raises:
            LSGMError: lines are missing or damaged.
        """
        self._file.seek(0)
        content = self._file.read()
        found, end = self._whole(content)
        if found != self._jobs or end != len(content):
            raise LSGMError(
                f"{self._path}: has {len(found)} of {len(self._jobs)} valid lines: it was changed during the run; "
                "run the same command again to resume"
            )
        with atomic(out) as part:
            part.write_bytes(content)
        self._path.unlink(missing_ok=True)

    def _whole(self, content: bytes) -> tuple[set[Job], int]:
        """The jobs before the first incomplete or damaged line, and the offset where they end (0: invalid header)."""
        found: set[Job] = set()
        end = 0
        for number, text in enumerate(content.splitlines(keepends=True)):
            try:
                raw = dict(parse_json(text.decode(), ""))
                if number == 0:
                    good = raw == self._header
                else:
                    job = Line.model_validate(raw).job
                    good = job in self._jobs - found and is_sealed(raw)
            except (LSGMError, ValueError, TypeError):
                good = False
            if not (good and text.endswith(b"\n")):  # killed while writing this line, or the line is damaged
                break
            end += len(text)
            found |= {job} if number else set()
        return found, end

    def _difference(self, content: bytes) -> str:
        try:
            header = dict(parse_json(content.splitlines()[0].decode(), ""))
        except (LSGMError, ValueError, TypeError):
            return "is damaged"
        keys = sorted(key for key in self._header if key != "sha256" and self._header[key] != header.get(key))
        return f"was computed with a different {' and '.join(keys)}" if keys else "is damaged"

    def _write(self, line: dict[str, Any]) -> None:
        write_all(self._file, f"{to_json(line)}\n".encode(), self._path)
