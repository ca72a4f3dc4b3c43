"""Reads the history of a training: a CSV with a row of numbers every few steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from lsgm.errors import LSGMError


def read_history(path: Path, way_out: str, columns: Sequence[str] = ("step", "epoch", "nelbo")) -> pd.DataFrame:
    """Read the history of one training stage and require ``columns``; empty fields become NaN.

    Raises:
        LSGMError: the file is invalid; the message names the file and the column, and ends with ``way_out``.
    """
    try:
        frame = pd.read_csv(path, encoding="utf-8")
    except (OSError, ValueError, OverflowError) as error:  # pandas' own errors are ValueErrors
        reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())[:200]
        raise LSGMError(f"{path}: cannot be read ({reason}); {way_out}") from None
    if not isinstance(frame.index, pd.RangeIndex):
        raise LSGMError(f"{path}: has rows with more fields than its {len(frame.columns)} columns; {way_out}")
    missing = [name for name in columns if name not in frame.columns]
    if missing or frame.empty:
        what = f"has no column {', '.join(missing)}" if missing else "has no rows"
        raise LSGMError(
            f"{path}: {what}; a training history has the columns {', '.join(columns)} and others; {way_out}"
        )
    for name in frame.columns:
        if frame[name].dtype.kind not in "iuf":
            raise LSGMError(f"{path}: the column {name!r:.100} has values that are not numbers; {way_out}")
    for name in {"step", "epoch"} & {*frame.columns}:
        values = frame[name].to_numpy(dtype=float)
        if not (
            np.isfinite(values).all() and (values >= 0).all() and (values < 1e15).all() and (np.diff(values) >= 0).all()
        ):
            raise LSGMError(f"{path}: the column {name} is not finite, nonnegative and nondecreasing; {way_out}")
    return frame
