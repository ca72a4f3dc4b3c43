"""Training batches alone: how many images a second come out of `lsgm.data.batches`.

    python benchmarks/data.py [--images 8192] [--batch 64]

The demo's MNIST, which lives on the device and is binarized there; and random bytes of 256x256 in color that stream
from a memory-mapped file, once from the system's cache and once with the file dropped from it (then it is the disk that
is measured). Beside it the fastest training step that uses such images: for MNIST the demo's pretraining, measured
here; for 256x256 the first stage of celebahq256_qualitative_joint, three times its 266 GFLOP an image (`lsgm
describe`), as if all of them ran at the rate of a 3x3 convolution: a bound that no step reaches. Run it where nothing
else runs.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import convolution_rate, machine, median_seconds, table
from training import build, configs

from lsgm.data.batches import Batches
from lsgm.data.store import ImageStore
from lsgm.runtime import device, keep_freed_memory

GFLOP_256 = 3 * 266.2  # an image


def rate(batches: Batches, seconds: float) -> tuple[float, float]:
    """Images a second over so many seconds, and the standard deviation between tenths of them."""
    for number in range(8):  # the stream has filled
        batches.batch_at(*divmod(number, len(batches)))
    rates = []
    for _ in range(10):
        start, done = time.perf_counter(), 0
        while time.perf_counter() - start < seconds / 10:
            number += 1
            batches.batch_at(*divmod(number, len(batches)))
            done += batches.batch
        if batches.device.type == "cuda":
            torch.cuda.synchronize()
        rates.append(done / (time.perf_counter() - start))
    return statistics.mean(rates), statistics.stdev(rates)


def demo_step(data: Path, where: torch.device) -> float:
    """Images a second of the demo's pretraining."""
    engine = build(*configs("demo", "pretraining", {}), data, where)
    return engine.batches.batch / median_seconds(engine.one_step, where, runs=20)[0]


def drop_from_cache(path: Path) -> None:
    """The system forgets what it holds of the file in memory."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/mnist"))
    parser.add_argument("--images", type=int, default=8192, help="of 256x256; 8192 are 1.6 GB")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=10.0, help="for each row")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    where = device(args.device)
    keep_freed_memory()
    print(machine(where), flush=True)
    rows = []

    def measure(what: str, images: np.ndarray, stream: bool, step: float, **kind: Any) -> None:
        batches = Batches(images, args.batch, where, seed=1, stream=stream, **kind)
        mean, spread = rate(batches, args.seconds)
        megabytes = mean * images[:1].nbytes / 1e6
        rows.append([what, f"{mean:.0f} ± {spread:.0f}", f"{megabytes:.0f}", f"{step:.3g}", f"{mean / step:.0f}"])
        print(" | ".join(rows[-1]), flush=True)

    mnist = ImageStore(args.data).images("train")
    step = demo_step(args.data, where)
    measure("MNIST, on the device", mnist, False, step)
    measure("MNIST, streamed", mnist, True, step)
    with tempfile.TemporaryDirectory(dir=".") as folder:  # beside the data: /tmp may be memory
        path = Path(folder) / "images.npy"
        shape = (args.images, 3, 256, 256)
        array = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
        rng = np.random.default_rng(0)
        for i in range(args.images):
            array[i] = rng.integers(0, 256, shape[1:], dtype=np.uint8)
        array.flush()
        del array
        images = np.load(path, mmap_mode="r")
        kind = {"step": convolution_rate(where) / GFLOP_256, "pad_to": 256, "binarize": False}
        measure("256x256, on the device", images[: args.images // 4], False, **kind)
        measure("256x256, streamed from the cache", images, True, **kind)
        del images  # what is mapped cannot be dropped
        gc.collect()
        drop_from_cache(path)
        measure("256x256, streamed from the disk", np.load(path, mmap_mode="r"), True, **kind)
    print(table([f"batches of {args.batch}", "images/s", "MB/s", "fastest step, images/s", "ratio"], rows))


if __name__ == "__main__":
    main()
