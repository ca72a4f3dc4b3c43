"""`lsgm sample`: draw images from a model and write them, with an image grid and the facts of how they were drawn.

Batch by batch, into a file each (:mod:`lsgm.evaluation.sample_chunks`). Several jobs can share the batches: job p of P
draws the batches p, p + P, p + 2 P ... The images are the same for any P.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import IO

import numpy as np
import torch
from numpy.typing import NDArray

from lsgm import checkpoint
from lsgm.config.stages import SampleStage
from lsgm.errors import LSGMError, SolverError
from lsgm.evaluation.image_grids import save_grid
from lsgm.evaluation.sample_chunks import Chunk, Chunks
from lsgm.evaluation.samples import SamplingFile
from lsgm.files import atomic, seal, sha256, write_json
from lsgm.model import SampleInfo
from lsgm.progress import log
from lsgm.runtime import device_name

GRID = 256  # images in the grid, at most


def generate(
    stage: SampleStage, folder: Path, out: Path, device: torch.device, resume: Path | None = None
) -> SamplingFile:
    """Write samples.npy (uint8 [N, C, H, W]), grid.png and sampling.json to ``out``, from the model in ``folder``.

    Where the ODE cannot be solved and ``on_failure`` is `record`, the images are black and sampling.json says why.

    Args:
        resume: folder of the batches that are drawn already, by an interrupted job or by those that share the images;
            OUT/resume if None. Removed in the end.
    Raises:
        LSGMError: the model is missing or damaged.
        SolverError: the ODE cannot be solved and ``on_failure`` is `error`.
    """
    config = stage.sample
    chunks = draw_part(stage, folder, resume or out / "resume", device)
    with atomic(out / "samples.npy") as part, part.open("w+b") as file:
        shape = (config.count, *chunks.image_shape)
        # Not a memory map: where the disk is full, that kills the process in place of raising.
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        found, shown = _join(chunks, file)
        file.flush()
        digest = sha256(part)
    nfe = math.nan if found.failed else found.nfe
    facts = {
        **asdict(SampleInfo.of(config, nfe, found.seconds)),
        "device": device_name(device),
        "code": stage.code,
        "model": checkpoint.read_config(folder).sha256,
        "samples_sha256": digest,
        **({"failed": found.failed} if found.failed else {}),
    }
    save_grid(shown, out / "grid.png")
    written = SamplingFile.model_validate(facts)
    write_json(out / "sampling.json", seal(written.written()))
    chunks.remove()
    return written


def draw_part(
    stage: SampleStage, folder: Path, resume: Path, device: torch.device, part: int = 0, parts: int = 1
) -> Chunks:
    """Draw those batches of part ``part`` of ``parts`` that are not in the folder ``resume`` yet.

    Raises:
        LSGMError, SolverError: as :func:`generate`; or there is no such part.
    """
    if parts < 1:
        raise LSGMError(f"--parts: expected at least 1, found {parts}")
    if not 0 <= part < parts:
        raise LSGMError(f"--part: expected 0 to {parts - 1}, found {part}")
    config, saved = stage.sample, checkpoint.verify(folder)
    image = saved.image
    sizes = [min(config.batch, config.count - first) for first in range(0, config.count, config.batch)]
    identity = f"{saved.sha256 or sha256(folder / 'model.safetensors')} {stage.model_dump_json()}"
    chunks = Chunks(resume, identity, sizes, (image.channels, image.size, image.size))
    own = range(part, len(sizes), parts)
    missing = chunks.missing(own)
    if len(missing) < len(own):
        log.info(f"sampling: {len(own) - len(missing)} of {len(own)} batches are there already")
    if missing and not chunks.failed():
        with chunks.held():
            _draw(stage, folder, device, chunks, missing)
    return chunks


def _draw(stage: SampleStage, folder: Path, device: torch.device, chunks: Chunks, missing: list[int]) -> None:
    """Draw the ``missing`` batches in order; if failures are recorded, up to the first that fails."""
    config, model = stage.sample, checkpoint.load(folder, device)
    if config.compile:
        model.compile_prior()
    start, left = time.perf_counter(), list(missing)
    try:
        for number, (images, nfe) in zip(missing, model.sample_batches(config, missing), strict=True):
            pixels = images.mul(255).round().byte().cpu().contiguous().numpy()
            now = time.perf_counter()
            chunks.write(number, Chunk(pixels, nfe, now - start))
            left.remove(number)
            start = now
    except SolverError as error:
        if config.on_failure == "error":
            raise
        nothing = np.zeros((0, *chunks.image_shape), np.uint8)
        chunks.write(left[0], Chunk(nothing, math.nan, time.perf_counter() - start, str(error)))


def _join(chunks: Chunks, file: IO[bytes]) -> tuple[Chunk, NDArray[np.uint8]]:
    """Append the pixels of all chunks to ``file``: what they took together, and the first ``GRID`` images."""
    first, total = file.tell(), Chunk(np.zeros((0, *chunks.image_shape), np.uint8), 0.0, 0.0)
    shown: list[NDArray[np.uint8]] = []
    failed = chunks.failed()
    for number in range(len(chunks.sizes)):
        chunk = chunks.read(number)
        if chunk is None and failed:  # it comes after the one that failed
            continue
        if chunk is None:
            raise LSGMError(f"{chunks.folder}: batch {number} has disappeared; run the same command again")
        total.failed = total.failed or chunk.failed
        total.seconds += chunk.seconds
        total.nfe += chunk.nfe / len(chunks.sizes)
        file.write(chunk.images.data)
        shown += [chunk.images[: max(0, GRID - sum(map(len, shown)))]]
    images = np.concatenate(shown)
    if total.failed:
        count = sum(chunks.sizes)
        images = np.zeros((min(GRID, count), *chunks.image_shape), np.uint8)
        file.truncate(first)
        file.truncate(first + count * math.prod(chunks.image_shape))  # black
    return total, images
