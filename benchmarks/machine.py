"""What the figures of a benchmark depend on, and how often each was measured."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from lsgm.runtime import device_name

# Dense peak rates in TFLOP/s by a part of the GPU's name, from NVIDIA's data sheets: half precisions, tf32, float32.
PEAKS = {
    "H100 PCIe": (756, 378, 51), "H100": (989, 494, 67), "H200": (989, 494, 67), "A100": (312, 156, 19.5),
}  # fmt: skip


def machine(device: torch.device) -> str:
    """One line: processor or GPU, what a float32 matrix product and a convolution reach on it just now, versions."""
    rate, convolution = matmul_rate(device), convolution_rate(device)
    name = device_name(device)
    if device.type == "cpu":
        lines = [line for line in cpuinfo() if line.startswith("model name")]
        name = f"{lines[0].split(':')[1].strip() if lines else platform.machine()}, {torch.get_num_threads()} threads"
    rates = f"float32 matmul {rate:.0f}, 3x3 convolution {convolution:.0f} GFLOP/s"
    return f"{name}; {rates}; torch {torch.__version__}, Python {platform.python_version()}"


def matmul_rate(device: torch.device, runs: int = 7) -> float:
    """What a float32 matrix product reaches on ``device`` just now, in GFLOP/s: median of ``runs``."""
    size = 2048 if device.type == "cpu" else 8192
    a = torch.randn(size, size, device=device)
    seconds = median_seconds(lambda: a @ a, device, runs, warm_up=min(2, runs - 1))[0]
    return 2 * size**3 / seconds / 1e9


def convolution_rate(device: torch.device, runs: int = 7) -> float:
    """The same of a float32 3x3 convolution, forward and backward: channels-last [64, 64, 16, 16] to 64 channels."""
    layout = torch.channels_last
    x = torch.randn(64, 64, 16, 16, device=device).to(memory_format=layout).requires_grad_()
    weight = torch.randn(64, 64, 3, 3, device=device).to(memory_format=layout).requires_grad_()
    gradient = torch.randn_like(x)

    def both() -> None:
        torch.nn.functional.conv2d(x, weight, padding=1).backward(gradient)

    seconds = median_seconds(both, device, runs, warm_up=min(2, runs - 1))[0]
    return 3 * 2 * x.numel() * weight[0].numel() / seconds / 1e9


def peak_rate(device: torch.device, precision: str) -> float:
    """The peak rate of ``device`` at a training's precision, in GFLOP/s: of an unknown one, its float32 matmul's."""
    name = device_name(device)
    for part, (half, tf32, single) in PEAKS.items():
        if part in name:
            return 1e3 * {"bf16": half, "fp16": half, "tf32": tf32}.get(precision, single)
    return matmul_rate(device)


def cpuinfo() -> list[str]:
    """Lines of Linux' description of the processor; none elsewhere."""
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def median_seconds(f: Callable[[], object], device: torch.device, runs: int, warm_up: int = 2) -> tuple[float, float]:
    """Median and half the interquartile range of the wall time of ``f``."""
    times = []
    for i in range(warm_up + runs):
        start = time.perf_counter()
        f()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if i >= warm_up:
            times.append(time.perf_counter() - start)
    low, _, high = statistics.quantiles(times, n=4) if len(times) > 1 else (0.0, 0.0, 0.0)
    return statistics.median(times), (high - low) / 2


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, the first column left-aligned, the others right."""
    lines = [" | ".join(header), "|".join(["---"] + ["---:"] * (len(header) - 1)), *(" | ".join(row) for row in rows)]
    return "\n".join(f"| {line} |" if "---" not in line else f"|{line}|" for line in lines)
