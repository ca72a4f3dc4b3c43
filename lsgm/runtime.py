"""The machine that a command runs on: its device and its memory. Nothing here changes a result."""

from __future__ import annotations

import ctypes
import sys
from typing import TYPE_CHECKING

from lsgm.errors import LSGMError

if TYPE_CHECKING:
    import torch

# torch takes seconds to import: `lsgm --help` must not wait for it.


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
