"""The file of a part of the NELBO: JSON lines, each with its own sha256, that grow while a job works on it.

The first line says what the part is of, each further one holds the NELBOs of a chunk of images under one of the priors
that are compared, a number for every image (null where the ODE could not be solved). Files of before have no hashes.
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

FORMAT = 2  # of files whose lines have hashes
WAY_OUT = "delete it, and run the workflow or `lsgm nelbo` again"

Natural = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Job = tuple[int, str]  # a chunk, by its number, and a prior


class _Part(Section):
    """Other keys may be there."""

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
    """Differences of estimates of log p(z0), nats; lists of one number for each image that was checked."""

    solver: list[Number]
    noise: list[Number]


class Line(_Part):
    """The NELBOs of the images of a chunk, nats; lists of one number for each image."""

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
    """The header of a part and its lines; raises :class:`LSGMError` that names the file, the line and the way out."""
    texts = read_text(path, WAY_OUT).splitlines() or [""]
    header = _parse(_Header, texts[0], f"{path}: line 1")
    sealed = "format" in header or "sha256" in header
    images, parts, batch = header["images"], header["parts"], header["stage"]["nelbo"]["batch"]
    if header["part"] >= parts or (sealed and not is_sealed(header)):
        raise LSGMError(f"{path}: line 1: has changed, its sha256 is not that of its content; {WAY_OUT}")
    lines: dict[Job, Line] = {}
    for number, text in enumerate(texts[1:], 2):
        where = f"{path}: line {number}"
        raw = _parse(Line, text, where)
        if sealed and not is_sealed(raw):
            raise LSGMError(f"{where}: has changed, its sha256 is not that of its content; {WAY_OUT}")
        line = Line.model_validate(raw)
        size = min(batch, images - line.chunk * batch)  # of the chunk
        lengths = {len(values) for values in (line.nelbo, line.reconstruction, line.kl, line.iw_bound)}
        if line.chunk % parts != header["part"] or lengths != {size} or line.job in lines:
            raise LSGMError(f"{where}: is not of a chunk of this part, of all its images and once; {WAY_OUT}")
        lines[line.job] = line
    return header, list(lines.values())


def _parse(kind: type[_Part], text: str, where: str) -> dict[str, Any]:
    """The JSON object in a line, if it is a ``kind``; raises :class:`LSGMError`."""
    raw = parse_json(text, where, WAY_OUT)
    try:
        kind.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "the whole line"
        raise LSGMError(f"{where}: no part of a NELBO ({key}: {first['msg']}); {WAY_OUT}") from None
    return dict(raw)


@contextmanager
def locked(path: Path) -> Iterator[IO[bytes]]:
    """Open the state file ``path`` for reading and adding to it, for this process alone; removed if it stays empty.

    Raises:
        LSGMError: another process has it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with path.open("a+b", buffering=0) as file:  # a full disk is told by the write, not by closing the file
            lock(file, f"{path}: another process is computing this part of the NELBO; wait for it, or stop it")
            if not os.fstat(file.fileno()).st_nlink:  # that process was done, and removed it, before it was locked
                continue
            try:
                yield file
            finally:
                if not os.fstat(file.fileno()).st_size:
                    path.unlink(missing_ok=True)
            return


class State:
    """The lines of a part that are on the disk; those of other settings, and those behind a damaged one, are forgotten.

    Args:
        file: of :func:`locked`.
        header: what the part is of.
        jobs: all that the part consists of.
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
        """Put what was computed on the disk."""
        self._write(seal({"chunk": job[0], "prior": job[1], **numbers}))
        self.done.add(job)

    def finish(self, out: Path) -> None:
        """Write the part to ``out``, if all its lines are on the disk as they were written, and remove the state."""
        self._file.seek(0)
        content = self._file.read()
        found, end = self._whole(content)
        if found != self._jobs or end != len(content):
            raise LSGMError(
                f"{self._path}: has {len(found)} of {len(self._jobs)} lines, it was changed while it was written; "
                "the same command resumes from there"
            )
        with atomic(out) as part:
            part.write_bytes(content)
        self._path.unlink(missing_ok=True)

    def _whole(self, content: bytes) -> tuple[set[Job], int]:
        """The jobs whose lines are whole, up to the first that is not, and where they end; 0 without the header."""
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
            if not (good and text.endswith(b"\n")):  # the job was killed while it wrote this one, or it is damaged
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
        return f"is of another {' and '.join(keys)}" if keys else "is damaged"

    def _write(self, line: dict[str, Any]) -> None:
        write_all(self._file, f"{to_json(line)}\n".encode(), self._path)
