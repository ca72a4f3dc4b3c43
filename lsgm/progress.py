"""Logging and progress of long jobs: a bar on a terminal, plain lines elsewhere, and always lines in the log file."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

log = logging.getLogger("lsgm")


class _TerminalHandler(logging.Handler):
    """Write lines to stderr without breaking a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        _to_stderr(self.format(record))


class _FileHandler(logging.FileHandler):
    """Write lines to a file; where that fails, on a full disk for one, say so once on stderr and continue."""

    _failed = False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._failed:
            self._failed = True
            text = f"{self.baseFilename}: the log file cannot be written ({error.strerror}); the job continues"
            _to_stderr(self.format(logging.makeLogRecord({"msg": text})))

    def close(self) -> None:
        with suppress(OSError):  # from lines that could not be written
            super().close()


def _to_stderr(text: str) -> None:
    """Write a line above the progress bars; do nothing if stderr is closed or its pipe is broken."""
    stream = sys.stderr
    if stream is not None:
        encoding = getattr(stream, "encoding", None) or "utf-8"  # file names may not be encodable
        with suppress(OSError, ValueError):
            tqdm.write(text.encode(encoding, "backslashreplace").decode(encoding), file=stream)


def _on_terminal() -> bool:
    with suppress(AttributeError, ValueError):  # stderr is missing or closed
        return sys.stderr.isatty()
    return False


def set_up_logging(log_file: str | Path | None = None, quiet: bool = False, goes_on: bool = False) -> None:
    """Send the `lsgm` logger to stderr and, if given, to a file; if ``quiet``, send only errors to stderr.

    The file is overwritten, unless ``goes_on``: a job that resumes appends to it.
    """
    for handler in [*log.handlers]:
        log.removeHandler(handler)
        handler.close()
    log.setLevel(logging.ERROR if quiet else logging.INFO)
    log.propagate = False
    handlers: list[logging.Handler] = [_TerminalHandler()]
    if log_file is not None and not quiet:
        Path(log_file).parent.mkdir(parents=True, exist_ok=True)
        mode = "a" if goes_on else "w"
        handlers.append(_FileHandler(log_file, mode, encoding="utf-8", errors="backslashreplace"))
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
        log.addHandler(handler)


class Progress:
    """Progress of ``total`` steps, each of ``unit_size`` units.

    Shows a bar with rate and remaining time on a terminal. Writes a plain line every ``every`` seconds to the log file,
    and to stderr if that is not a terminal. It is silent if :func:`set_up_logging` was not called (such as in a
    notebook) or was called with ``quiet``.

    Args:
        what: name of the task, at the beginning of each line.
        total: number of steps.
        unit: name of the unit, such as `img`.
        unit_size: units per step.
        done: number of steps that are already done.
    """

    def __init__(
        self, what: str, total: int, unit: str = "it", unit_size: int = 1, every: float = 10.0, done: int = 0
    ) -> None:
        self.what, self.total, self.unit, self.unit_size, self.every = what, total, unit, unit_size, every
        self.done = self._before = done
        self.start = self._last = time.monotonic()
        self.silent = not (
            log.handlers and log.isEnabledFor(logging.INFO)
        )  # in a notebook, or not the first of several processes
        self.on_terminal = not self.silent and _on_terminal()
        self._bar = tqdm(
            total=total * unit_size, initial=done * unit_size, unit=unit, desc=what, disable=not self.on_terminal,
            leave=False,
        )  # fmt: skip

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def step(self, note: Callable[[], str] | str = "") -> None:
        """Advance by one step; ``note`` (text, or a function that is called only when needed) is shown with it."""
        self.to(self.done + 1, note)

    def to(self, done: int, note: Callable[[], str] | str = "") -> None:
        """Set the number of steps done, which may be fewer than before; ``note`` as in :meth:`step`."""
        self._bar.update((done - self.done) * self.unit_size)
        now = time.monotonic()
        if done <= self._before:  # back to an earlier step: restart the measurement of the rate
            self._before, self.start = done, now
        self.done = done
        if self.silent or (now - self._last < self.every and self.done < self.total):
            return
        self._last = now
        text = note if isinstance(note, str) else note()
        self._bar.set_postfix_str(text, refresh=False)
        rate = self.rate()
        left = (self.total - self.done) * self.unit_size / max(rate, 1e-9)
        line = f"{self.what}: {self.done}/{self.total}, {rate:.0f} {self.unit}/s, {clock(left)} left"
        record = log.makeRecord(log.name, logging.INFO, "", 0, f"{line}, {text}" if text else line, (), None)
        for handler in log.handlers:
            if not (self.on_terminal and isinstance(handler, _TerminalHandler)):
                handler.handle(record)

    def rate(self) -> float:
        """Units per second so far."""
        return (self.done - self._before) * self.unit_size / max(time.monotonic() - self.start, 1e-9)


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
