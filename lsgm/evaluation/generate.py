"""`lsgm sample`: draw images from a model and write them, with a grid to look at and how they were drawn."""

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
from lsgm.config import SampleConfig
from lsgm.config.stages import SampleStage
from lsgm.errors import SolverError
from lsgm.evaluation.image_grids import save_grid
from lsgm.evaluation.samples import SamplingFile
from lsgm.files import atomic, seal, sha256, write_json
from lsgm.model import LSGM, SampleInfo
from lsgm.runtime import device_name

GRID = 256  # images in the grid, at most


def generate(stage: SampleStage, folder: Path, out: Path, device: torch.device) -> SamplingFile:
    """Write samples.npy (uint8 [N, C, H, W]), grid.png and sampling.json to ``out``, from the model in ``folder``.

    Where the ODE cannot be solved and ``on_failure`` is `record`, the images are black and sampling.json says why.

    Raises:
        LSGMError: the model is missing or damaged.
        SolverError: the ODE cannot be solved and ``on_failure`` is `error`.
    """
    config = stage.sample
    model = checkpoint.load(folder, device)
    if config.compile:
        model.compile_prior()
    start, failed = time.perf_counter(), None
    shape = (config.count, model.image.channels, model.image.size, model.image.size)
    with atomic(out / "samples.npy") as part, part.open("w+b") as file:
        # Not a memory map: where the disk is full, that kills the process in place of raising.
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        first = file.tell()
        try:
            shown, nfe = _write_batches(model, config, file)
        except SolverError as error:
            if config.on_failure == "error":
                raise
            failed, nfe = str(error), math.nan
            shown = np.zeros((min(GRID, shape[0]), *shape[1:]), np.uint8)
            file.truncate(first)
            file.truncate(first + math.prod(shape))  # black
        file.flush()
        digest = sha256(part)
    seconds = time.perf_counter() - start
    info = SampleInfo.of(config, nfe / math.ceil(config.count / config.batch), seconds)
    save_grid(shown, out / "grid.png")
    facts = {
        **asdict(info),
        "device": device_name(model.device),
        "code": stage.code,
        "model": checkpoint.read_config(folder).sha256,
        "samples_sha256": digest,
    }
    if failed is not None:
        facts["failed"] = failed
    found = SamplingFile.model_validate(facts)
    write_json(out / "sampling.json", seal(found.written()))
    return found


def _write_batches(model: LSGM, config: SampleConfig, file: IO[bytes]) -> tuple[NDArray[np.uint8], float]:
    """Append the pixels of all samples to ``file``; returns the first ``GRID`` images and the NFE of all batches."""
    shown: list[NDArray[np.uint8]] = []
    done, nfe = 0, 0.0
    for images, evaluations in model.sample_batches(config):
        pixels = images.mul(255).round().byte().cpu().contiguous().numpy()
        file.write(pixels.data)
        shown += [pixels[: max(0, GRID - done)]]
        done, nfe = done + len(images), nfe + evaluations
    return np.concatenate(shown), nfe
