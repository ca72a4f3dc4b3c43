"""Single convolutions in PyTorch's default layout, channels-last, and by our Winograd kernels: what is slow.

    python benchmarks/convolutions.py

Forward (no graph), and forward with backward. The depthwise ones are those of the VAE's decoder, whose cells fuse them
with what stands beside them (lsgm/networks/mbconv.py); those of width 3 are for comparison.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from machine import machine, median_seconds, table

from lsgm.networks import winograd
from lsgm.runtime import keep_freed_memory

SHAPES = [  # batch, channels in, channels out, size, kernel's width (depthwise ones are 5 high), groups
    (16, 256, 256, 8, 3, 1),
    (16, 256, 256, 4, 3, 1),
    (16, 512, 256, 4, 3, 1),
    (64, 64, 64, 8, 3, 1),
    (8, 128, 128, 16, 3, 1),
    (32, 16, 16, 32, 3, 1),
    (32, 96, 96, 32, 5, 96),
    (32, 96, 96, 16, 5, 96),
    (32, 96, 96, 32, 3, 96),
    (32, 96, 96, 16, 3, 96),
]

HOW = ["default layout", "channels-last", "ours"]
CPU = torch.device("cpu")


def measured(forward: Callable[[], torch.Tensor], gradient: torch.Tensor) -> list[str]:
    """Milliseconds forward, and forward with backward."""
    with torch.no_grad():
        alone = median_seconds(forward, CPU, 31)[0]
    return [f"{1e3 * alone:.2f}", f"{1e3 * median_seconds(lambda: forward().backward(gradient), CPU, 31)[0]:.2f}"]


def main() -> None:
    keep_freed_memory()
    print(machine(CPU))
    rows = []
    for batch, c_in, c_out, size, k, groups in SHAPES:
        high = k if groups == 1 else 5
        row = [f"{batch} x {c_in} x {size} x {size}, {'depthwise' if groups > 1 else f'to {c_out},'} {high}x{k}"]
        for layout in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(batch, c_in, size, size).to(memory_format=layout).requires_grad_()
            w = torch.randn(c_out, c_in // groups, high, k).to(memory_format=layout).requires_grad_()
            gradient = torch.randn(batch, c_out, size, size).to(memory_format=layout)

            padding = (high // 2, k // 2)
            forward = partial(F.conv2d, x, w, padding=padding, groups=groups)

            row += measured(forward, gradient)
        row += measured(partial(winograd.convolve, x, w, None), gradient) if groups == 1 else ["", ""]
        rows.append(row)
    print(table(["ms", *(f"{what}, {how}" for how in HOW for what in ("forward", "both"))], rows))


if __name__ == "__main__":
    main()
