"""Schedules over the steps of a stage: learning rates, KL coefficient, rows of the history."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lsgm.config import ScheduleConfig

HISTORY_ROWS = 200  # at most


@dataclass
class Schedule:
    """Linear warm-up, then a cosine from ``lr`` to ``lr_min``.

    With W warm-up epochs of K steps, step i < W K has the learning rate lr * i / (W K). Epoch W keeps the last of these
    values, lr'; n epochs later it is lr_min + (lr' - lr_min) (1 + cos(pi n / T)) / 2 with T = epochs - W - 1. With
    `lr_schedule: iteration`, the cosine advances after every step instead of every epoch.
    """

    config: ScheduleConfig
    steps_per_epoch: int

    @property
    def steps(self) -> int:
        """The total number of training steps."""
        return max(1, round(self.config.epochs * self.steps_per_epoch))

    def learning_rate(self, step: int, lr: float, lr_min: float) -> float:
        """The learning rate of ``step``, between ``lr`` and ``lr_min``."""
        every = self.steps_per_epoch if self.config.lr_schedule == "epoch" else 1
        warmup = round(self.config.warmup_epochs * self.steps_per_epoch)
        if step < warmup:
            return lr * step / warmup
        start = lr * (1 - 1 / warmup) if warmup else lr
        n = (step - warmup) // every
        period = max(1.0, (self.steps - warmup) / every - 1)
        return lr_min + (start - lr_min) * 0.5 * (1 + math.cos(math.pi * min(1.0, n / period)))


def linear_anneal(step: int, total: int, const_portion: float, portion: float, start: float, end: float) -> float:
    """The KL coefficient at ``step`` of ``total``: ``start``, then linearly up to ``end`` over ``portion``."""
    if portion == 0:
        return end
    progress = (step - const_portion * total) / (portion * total)
    return start + (end - start) * min(max(progress, 0.0), 1.0)


def rows_every(config: ScheduleConfig, steps_per_epoch: int) -> int:
    """The number of steps between rows of the history."""
    return max(1, Schedule(config, steps_per_epoch).steps // HISTORY_ROWS)
