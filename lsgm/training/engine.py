"""The loop that both training stages share: steps, learning rates, history, progress."""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lsgm.config import ScheduleConfig
from lsgm.data.batches import Batches
from lsgm.errors import LSGMError
from lsgm.files import atomic
from lsgm.progress import Progress, log

ROWS = 200  # of a history, at most


@dataclass
class Schedule:
    """Linear warm-up, then a cosine from ``lr`` to ``lr_min``.

    With W warm-up epochs of K steps: step i < W K has lr * i / (W K); epoch W keeps the last of these; n epochs later
    lr_min + (lr' - lr_min) (1 + cos(pi n / T)) / 2 with lr' that last value and T = epochs - W - 1. With
    `lr_schedule: iteration` one step takes the place of an epoch after the warm-up.
    """

    config: ScheduleConfig
    steps_per_epoch: int

    @property
    def steps(self) -> int:
        """Steps of the whole training."""
        return max(1, round(self.config.epochs * self.steps_per_epoch))

    def learning_rate(self, step: int, lr: float, lr_min: float) -> float:
        every = self.steps_per_epoch if self.config.lr_schedule == "epoch" else 1
        warmup = round(self.config.warmup_epochs * self.steps_per_epoch)
        if step < warmup:
            return lr * step / warmup
        start = lr * (1 - 1 / warmup) if warmup else lr
        n = (step - warmup) // every
        period = max(1.0, (self.steps - warmup) / every - 1)
        return lr_min + (start - lr_min) * 0.5 * (1 + math.cos(math.pi * min(1.0, n / period)))


@dataclass
class Optimised:
    """An optimiser and the range of its learning rate."""

    name: str
    optimiser: torch.optim.Optimizer
    lr: float
    lr_min: float


@dataclass
class History:
    """What a training run recorded: a CSV row every few steps, means since the row before, and TensorBoard events."""

    every: int
    tensorboard: Path | None = None
    rows: list[dict[str, float]] = field(default_factory=list)
    _sums: dict[str, Tensor] = field(default_factory=dict)
    _count: int = 0
    _writer: Any = None

    def __post_init__(self) -> None:
        if self.tensorboard is None:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            log.info("no TensorBoard events: the package tensorboard is not installed")
            return
        self._writer = SummaryWriter(str(self.tensorboard))

    def add(self, terms: dict[str, Tensor]) -> None:
        """Sum on the device; nothing waits for it."""
        for name, value in terms.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._count += 1

    def record(self, step: int, facts: dict[str, float]) -> dict[str, float]:
        """Close a row: the means of what was added since the last, and ``facts`` as they are."""
        names = list(self._sums)
        means = (torch.stack([self._sums[name] for name in names]) / self._count).tolist()
        row = {"step": step, **facts, **dict(zip(names, means, strict=True))}
        self._sums, self._count = {}, 0
        self.rows.append(row)
        if self._writer is not None:
            for name, value in row.items():
                self._writer.add_scalar(name, value, step)
        return row

    def write(self, path: Path) -> None:
        """The rows as CSV."""
        with atomic(path) as part, open(part, "w", newline="") as file:
            writer = csv.DictWriter(file, list(self.rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows({k: v if isinstance(v, int) else f"{v:.6g}" for k, v in row.items()} for row in self.rows)
        if self._writer is not None:
            self._writer.close()


@dataclass
class Summary:
    """What a training stage took."""

    steps: int
    images_per_second: float
    seconds: float


def fit(
    what: str,
    batches: Batches,
    schedule: Schedule,
    optimised: list[Optimised],
    update: Callable[[Tensor, int, int], dict[str, Tensor]],
    history: History,
) -> Summary:
    """Run a training stage.

    Args:
        what: its name in the log.
        update: does one step (batch, step, steps) -> terms to record, scalars on the device; ``loss`` among them.
    Raises:
        LSGMError: the loss is not finite.
    """
    start = time.perf_counter()
    steps = schedule.steps
    with Progress(what, steps, "img", batches.batch) as bar:
        for step in range(steps):
            for item in optimised:
                for group in item.optimiser.param_groups:
                    group["lr"] = schedule.learning_rate(step, item.lr, item.lr_min)
            x = batches.batch_at(*divmod(step, len(batches)))
            history.add(update(x, step, steps))
            if (step + 1) % history.every == 0 or step + 1 == steps:
                facts = {"epoch": (step + 1) / len(batches), "images_per_second": bar.rate()}
                facts |= {f"lr_{item.name}": item.optimiser.param_groups[0]["lr"] for item in optimised}
                row = history.record(step + 1, facts)
                if not math.isfinite(row["loss"]):
                    bad = ", ".join(name for name, value in row.items() if not math.isfinite(value))
                    raise LSGMError(
                        f"{what}: diverged before step {step + 1} (not finite: {bad}); a lower learning rate, a longer "
                        "warm-up or a larger spectral_reg is the way out"
                    )
            bar.step(lambda: f"NELBO {history.rows[-1]['nelbo']:.1f} nats" if history.rows else "")
        seconds = time.perf_counter() - start
        return Summary(steps, steps * batches.batch / seconds, seconds)
