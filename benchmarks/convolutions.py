"""Single convolutions in PyTorch's default layout and channels-last: which shapes want which, and what is slow.

    python benchmarks/convolutions.py

Forward (no graph), and forward with backward. The depthwise ones are those of the VAE's decoder.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from machine import machine, median_seconds, table

from lsgm.cli import keep_freed_memory

SHAPES = [  # batch, channels in, channels out, size, kernel, groups
    (16, 256, 256, 8, 3, 1),
    (16, 256, 256, 4, 3, 1),
    (16, 512, 256, 4, 3, 1),
    (64, 64, 64, 8, 3, 1),
    (8, 128, 128, 16, 3, 1),
    (32, 16, 16, 32, 3, 1),
    (32, 96, 96, 32, 5, 96),
    (32, 96, 96, 16, 5, 96),
]


def main() -> None:
    cpu = torch.device("cpu")
    keep_freed_memory()
    print(machine(cpu))
    rows = []
    for batch, c_in, c_out, size, k, groups in SHAPES:
        row = [f"{batch} x {c_in} x {size} x {size}, {'depthwise' if groups > 1 else f'to {c_out},'} {k}x{k}"]
        for layout in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(batch, c_in, size, size).to(memory_format=layout).requires_grad_()
            w = torch.randn(c_out, c_in // groups, k, k).to(memory_format=layout).requires_grad_()
            gradient = torch.randn(batch, c_out, size, size).to(memory_format=layout)

            def forward(x: torch.Tensor = x, w: torch.Tensor = w, k: int = k, groups: int = groups) -> torch.Tensor:
                return F.conv2d(x, w, padding=k // 2, groups=groups)

            with torch.no_grad():
                row.append(f"{1e3 * median_seconds(forward, cpu, 31)[0]:.2f}")
            both = median_seconds(lambda f=forward, g=gradient: f().backward(g), cpu, 31)[0]  # type: ignore[misc]
            row.append(f"{1e3 * both:.2f}")
        rows.append(row)
    print(table(["ms", "forward, default", "both, default", "forward, channels-last", "both, channels-last"], rows))


if __name__ == "__main__":
    main()
