"""The folder of samples that `lsgm sample` writes: samples.npy (the images) and sampling.json (how they were drawn)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from lsgm.config import ConfigError, ImageConfig
from lsgm.config.mistakes import parse
from lsgm.errors import LSGMError
from lsgm.evaluation.records import Number, OptionalNumber, Record
from lsgm.files import is_sealed, read_json, sha256

DRAW_AGAIN = "run `lsgm sample` again"


class Sampling(Record):
    """How samples were drawn and what it cost; the first six fields match :class:`lsgm.model.SampleInfo`."""

    images: Annotated[int, Field(ge=0)]
    solver: str | None = None
    tol: OptionalNumber = None  # tolerance of rk45
    nfe: Number  # score network evaluations per batch, averaged over batches
    temperature: Number = 1.0
    seconds: Number
    device: str | None = None
    failed: str | None = None  # why sampling failed; None: it succeeded

    @property
    def seconds_per_1000(self) -> float:
        """Seconds per 1000 images; NaN if there are no images."""
        return 1000 * self.seconds / self.images if self.images else math.nan


class SamplingFile(Sampling):
    """The schema of sampling.json. Files from older versions have no hashes."""

    code: str | None = None  # fingerprint of the stage's code
    model: str | None = None  # sha256 of the model's weights
    samples_sha256: str | None = None  # of samples.npy
    sha256: str | None = None  # of this file

    @property
    def sampling(self) -> Sampling:
        """The fields that metrics.json copies from this file."""
        return Sampling.model_validate({k: v for k, v in self.written().items() if k in Sampling.model_fields})


def read_sampling(folder: Path) -> SamplingFile:
    """Read sampling.json in ``folder`` and verify its hash; raises :class:`LSGMError` that names the file and key."""
    path = folder / "sampling.json"
    facts = read_json(path, DRAW_AGAIN)
    try:
        found = parse(SamplingFile, facts, path)
    except ConfigError as error:
        raise LSGMError(f"{str(error).splitlines()[0]}; {DRAW_AGAIN}") from None
    if facts.keys() & {"sha256", "samples_sha256"} and not is_sealed(facts):
        raise LSGMError(f"{path}: has changed: its sha256 does not match its content; {DRAW_AGAIN}")
    return found


def read_samples(folder: Path) -> NDArray[np.uint8]:
    """Memory-map the images in ``folder``, uint8 [N, C, H, W]; raises :class:`LSGMError` if they are unreadable."""
    path = folder / "samples.npy"
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise LSGMError(f"{path}: cannot be read ({error.strerror}); {DRAW_AGAIN}") from None
    except Exception as error:  # NumPy raises many kinds of errors on an invalid header
        raise LSGMError(f"{path}: is not an array of samples ({error}); {DRAW_AGAIN}") from None
    if not isinstance(array, np.ndarray) or array.dtype != np.uint8 or array.ndim != 4:
        found = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else "an archive"
        raise LSGMError(f"{path}: expected images, uint8 [N, C, H, W], found {found}; {DRAW_AGAIN}")
    return array


def check_samples(folder: Path, facts: SamplingFile, image: ImageConfig) -> None:
    """Raise :class:`LSGMError` unless samples.npy matches sampling.json and the image format ``image``."""
    path, found = folder / "samples.npy", read_samples(folder)
    expected = (facts.images, image.channels, image.size, image.size)
    if found.shape != expected:
        raise LSGMError(
            f"{path}: expected {list(expected)} from the model and sampling.json, found {list(found.shape)}; "
            f"{DRAW_AGAIN}"
        )
    if facts.samples_sha256 not in (None, sha256(path)):
        raise LSGMError(f"{path}: has changed: its sha256 does not match sampling.json; {DRAW_AGAIN}")
