"""The machine that a command runs on: its device and its memory. Nothing here changes a result."""

from __future__ import annotations

import ctypes
import os
import sys
from typing import TYPE_CHECKING

from lsgm.errors import LSGMError

if TYPE_CHECKING:
    import torch

# torch takes seconds to import: `lsgm --help` must not wait for it.

# How long a thread of each OpenMP runtime waits in a loop before it sleeps: GNU's in turns of the loop (300,000 by
# default), LLVM's and Intel's in milliseconds (200 by default).
SPINNING = {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "0"}


def limit_spinning() -> None:
    """Let idle OpenMP threads sleep soon. Call it before PyTorch is imported, which is when these runtimes read it.

    A training step has a thousand short parallel regions. After each, threads wait in a loop for the next one. On a
    busy machine such a loop uses up the turn that the system gave to the thread, which then has to wait for another
    one while the rest of the team waits for it. benchmarks/contention.py measures the effect. Variables that the user
    set stay, and with ``OMP_WAIT_POLICY`` set nothing is changed.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        for name, value in SPINNING.items():
            os.environ.setdefault(name, value)


def device(name: str) -> torch.device:
    """The device called ``name`` (`auto`, `cpu` or `cuda`); `auto` is the GPU if there is one.

    Raises:
        LSGMError: `cuda` was asked for and PyTorch finds no GPU.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise LSGMError("--device cuda: PyTorch finds no GPU here; use --device cpu")
    return torch.device(name)


def keep_freed_memory() -> None:
    """Let the C library's allocator keep freed memory for later.

    Every training step allocates and frees the same feature maps; asking the system for them each time is slow, because
    it fills fresh pages with zeros.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        m_trim_threshold, m_mmap_threshold, unlimited = -1, -3, 2**31 - 1
        libc.mallopt(m_mmap_threshold, 1 << 30)
        libc.mallopt(m_trim_threshold, unlimited)
    except OSError:  # another C library: nothing to tune
        pass


def usage(name: str) -> str:
    """The device (if PyTorch was used) and the peak memory of this process, as the end of a log line."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    memory = f"peak memory {peak / 2**30:.1f} GB"
    if "torch" not in sys.modules:
        return f"; {memory}"
    import torch

    where = device(name)
    if where.type == "cuda":
        memory += f", on the GPU {torch.cuda.max_memory_allocated(where) / 2**30:.1f} GB"
    return f" on {device_name(where)}; {memory}"


def device_name(device: torch.device) -> str:
    """A name for tables: the GPU's, or `cpu` and the number of threads."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type
