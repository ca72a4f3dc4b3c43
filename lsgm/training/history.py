"""The history of a training run: rows of means for history.csv, also written as TensorBoard events."""

from __future__ import annotations

import csv
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lsgm.files import atomic, named
from lsgm.progress import log


@dataclass
class History:
    """Collects a row every ``every`` steps, with means since the previous row, and writes TensorBoard events."""

    every: int
    tensorboard: Path | None = None
    rows: list[dict[str, float]] = field(default_factory=list)
    _sums: dict[str, Tensor] = field(default_factory=dict)
    _count: int = 0
    _writer: Any = None

    def begin(self, step: int) -> None:
        """Start recording after ``step``; TensorBoard discards later events of an earlier run."""
        if self.tensorboard is None:
            return
        self.flush()
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            log.info("no TensorBoard events: the package tensorboard is not installed")
            return
        threading.excepthook = _without_tensorboard
        with self._folder_named():
            self._writer = SummaryWriter(str(self.tensorboard), purge_step=step + 1)

    def flush(self) -> None:
        """Write pending TensorBoard events to disk."""
        if self._writer is not None:
            with self._folder_named():
                self._writer.flush()

    def _folder_named(self) -> AbstractContextManager[None]:
        """Add the folder's name to errors of TensorBoard's thread, such as a full disk, which lack a file name."""
        return named(self.tensorboard or "")

    def add(self, terms: dict[str, Tensor]) -> None:
        """Add terms (scalars or vectors) to the running sums, on the device and without synchronization."""
        for name, value in terms.items():
            self._sums[name] = self._sums[name].to(value.device) + value if name in self._sums else value
        self._count += 1

    def close_row(self) -> tuple[dict[str, float], dict[str, list[float]]]:
        """The means of the terms added since the last row: (scalars, vectors)."""
        sizes = [value.numel() for value in self._sums.values()]
        flat = torch.cat([value.reshape(-1) for value in self._sums.values()]) / self._count
        means = dict(zip(self._sums, flat.cpu().split(sizes), strict=True))
        vectors = {name: means.pop(name).tolist() for name, value in self._sums.items() if value.dim()}
        self._sums, self._count = {}, 0
        return {name: mean.item() for name, mean in means.items()}, vectors

    def add_row(self, row: dict[str, float]) -> None:
        """Append a row, which must have the key `step`."""
        self.rows.append(row)
        if self._writer is not None:
            with self._folder_named():
                for name, value in row.items():
                    self._writer.add_scalar(name, value, row["step"])

    def add_images(self, name: str, images: Tensor, step: int) -> None:
        """Write images [N, C, H, W] in [0, 1] to TensorBoard as a grid."""
        if self._writer is not None:
            with self._folder_named():
                self._writer.add_images(name, images, step)

    @property
    def empty(self) -> bool:
        """Whether no terms were added since the last row."""
        return self._count == 0

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "sums": self._sums, "count": self._count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows, self._sums, self._count = list(state["rows"]), dict(state["sums"]), int(state["count"])

    def write(self, path: Path) -> None:
        """Write the rows to a CSV file."""
        with atomic(path) as part, open(part, "w", newline="") as file:
            columns = list(dict.fromkeys(name for row in self.rows for name in row))
            writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows({k: v if isinstance(v, int) else f"{v:.6g}" for k, v in row.items()} for row in self.rows)
        if self._writer is not None:
            with self._folder_named():
                self._writer.close()


def _without_tensorboard(
    args: threading.ExceptHookArgs, others: Callable[[threading.ExceptHookArgs], Any] = threading.excepthook
) -> None:
    """Suppress tracebacks of TensorBoard's thread, because the next call of its writer raises the same error."""
    if not (isinstance(args.exc_value, OSError) and type(args.thread).__module__.startswith("tensorboard.")):
        others(args)
