"""Kernels for training on CPUs in C, compiled for this processor the first time that they are used.

Without a C compiler, or with `LSGM_KERNELS=0` in the environment, PyTorch's own operations do the same, more slowly.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from lsgm.progress import log

FOLDER = Path(__file__).parent
FLAGS = ["-std=gnu11", "-O3", "-march=native", "-fopenmp", "-fPIC"]
WIDEST = 16  # float32 numbers in the widest vector of a processor
POINTER, SIZE, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
NORM = [*[POINTER] * 4, FLOAT]  # mean, variance, weight, bias, eps
GRADIENT = [*[POINTER] * 9]  # of an operation: its output ... the weight's gradient
ARGUMENTS = {
    "batch_norm_statistics": [POINTER, SIZE, SIZE, POINTER, POINTER],
    "batch_norm_forward": [POINTER, SIZE, SIZE, *NORM, SIZE, POINTER],
    "batch_norm_backward_sums": [POINTER, POINTER, SIZE, SIZE, *NORM, SIZE, *[POINTER] * 2],
    "batch_norm_backward": [POINTER, POINTER, SIZE, SIZE, *[POINTER] * 3, FLOAT, *[POINTER] * 2],
    "track": [POINTER, POINTER, SIZE, FLOAT, FLOAT, POINTER, POINTER],
    "pointwise_forward": [POINTER, *[SIZE] * 4, *NORM, SIZE, *[POINTER] * 4],
    "pointwise_backward": [POINTER, *[SIZE] * 4, *NORM, SIZE, POINTER, *GRADIENT],
    "depthwise_forward": [POINTER, *[SIZE] * 4, *NORM, POINTER, SIZE, *[POINTER] * 3],
    "depthwise_backward": [POINTER, *[SIZE] * 4, *NORM, POINTER, SIZE, *GRADIENT],
    "group_norm_forward": [POINTER, POINTER, *[SIZE] * 4, POINTER, POINTER, FLOAT, SIZE, *[POINTER] * 2],
    "group_norm_backward": [*[POINTER] * 3, *[SIZE] * 4, POINTER, POINTER, SIZE, *[POINTER] * 5],
    "convolution": [POINTER, *[SIZE] * 5, POINTER, POINTER, SIZE, POINTER],
    "convolution_weight_gradient": [POINTER, POINTER, *[SIZE] * 5, POINTER, POINTER],
    "narrow_convolution": [POINTER, *[SIZE] * 5, *[POINTER] * 3],
    "narrow_convolution_weight_gradient": [POINTER, POINTER, *[SIZE] * 5, POINTER, POINTER],
    "gated_sum_forward": [POINTER, POINTER, *[SIZE] * 4, *[POINTER] * 8],
    "gated_sum_backward": [POINTER, POINTER, *[SIZE] * 4, *[POINTER] * 10],
    "power_iteration": [POINTER, POINTER, SIZE, SIZE, *[POINTER] * 3],
    "outer_products": [*[POINTER] * 3, SIZE, POINTER, POINTER],
    "normalize_weights": [*[POINTER] * 3, SIZE, FLOAT, POINTER],
    "normalize_weights_backward": [*[POINTER] * 4, SIZE, FLOAT, POINTER, POINTER],
    "gather": [POINTER, POINTER, *[SIZE] * 6, POINTER],
}
RESULTS = {"gather": SIZE}


def available(x: Tensor) -> bool:
    """Whether the kernels can work on ``x``: float32 numbers in the host's memory, outside of `torch.compile`."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and not torch.compiler.is_compiling()
        and type(x) in (Tensor, torch.nn.Parameter)  # FakeTensor has no memory
        and library() is not None
    )


def fits(x: Tensor, multiple_of: int = 4) -> bool:
    """Whether the kernels accept the feature map ``x`` [B, C, H, W]; C must be a multiple of ``multiple_of``."""
    return (
        available(x)
        and x.shape[1] % multiple_of == 0
        and x.numel() // x.shape[1] % 16 == 0  # pixels
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def call(name: str, *arguments: Tensor | float | None) -> int | None:
    """Call a kernel, tensors by their addresses. Check :func:`available` or :func:`fits` first."""
    loaded = library()
    assert loaded is not None
    result: int | None = getattr(loaded, name)(*(a.data_ptr() if isinstance(a, Tensor) else a for a in arguments))
    return result


def addresses(tensors: Iterable[Tensor]) -> Tensor:
    """Where ``tensors`` are, for kernels that work on many."""
    return torch.tensor([tensor.data_ptr() for tensor in tensors], dtype=torch.int64)


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None if they are switched off or cannot be compiled."""
    if os.environ.get("LSGM_KERNELS") == "0" or sys.platform != "linux":
        return None
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        log.info("no C compiler found (cc): training on this CPU is slower than it could be; install one, such as gcc")
        return None
    try:
        loaded = ctypes.CDLL(str(compiled(compiler)))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = error.stderr.strip().splitlines() if isinstance(error, subprocess.CalledProcessError) else [str(error)]
        log.info(f"the kernels were not compiled ({reason[-1] if reason else error}): training is slower without them")
        return None
    for name, arguments in ARGUMENTS.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = arguments, RESULTS.get(name)
    return loaded


def compiled(compiler: str) -> Path:
    """The shared library, compiled for this processor; from the user's cache if it is there.

    It is linked without an OpenMP runtime: it finds PyTorch's, whose threads it shares.
    """
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    processor = [line for line in lines if line.startswith(("model name", "flags"))][:2]
    texts = [path.read_text() for path in sorted(FOLDER.glob("*.[ch]"))]
    key = hashlib.sha256("\n".join([*texts, compiler, *FLAGS, *processor]).encode()).hexdigest()[:16]
    for root in (os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", tempfile.gettempdir()):
        folder = Path(root) / f"lsgm-{os.getuid()}"
        path = folder / f"kernels-{key}.so"
        if path.exists() and path.stat().st_uid == os.getuid():
            return path
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            part = Path(tempfile.mkdtemp(dir=folder))
        except OSError:  # no home, or one that is read-only
            continue
        try:
            _compile(compiler, part)
            os.replace(part / "kernels.so", path)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        return path
    raise OSError("no folder to write to")


def _compile(compiler: str, folder: Path) -> None:
    """Write kernels.so into ``folder``; several files at a time."""
    run = functools.partial(subprocess.run, check=True, capture_output=True, text=True)
    sources = sorted(FOLDER.glob("*.c"))
    objects = [folder / source.with_suffix(".o").name for source in sources]
    commands = [[compiler, *FLAGS, "-c", a, "-o", b] for a, b in zip(sources, objects, strict=True)]
    with ThreadPoolExecutor() as threads:
        list(threads.map(run, commands))
    run([compiler, "-shared", *objects, "-o", folder / "kernels.so", "-lm"])
