"""What a long job says while it runs: a bar on a terminal, plain lines elsewhere, and always lines in the log file."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

log = logging.getLogger("lsgm")


class _TerminalHandler(logging.Handler):
    """Write lines to stderr without tearing a progress bar apart."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def set_up_logging(log_file: str | Path | None = None, quiet: bool = False, goes_on: bool = False) -> None:
    """Send the `lsgm` logger to stderr and, if given, to a file as well; if ``quiet``, errors to stderr.

    The file is replaced, or added to by a job that ``goes_on`` where an earlier one was stopped.
    """
    log.handlers.clear()
    log.setLevel(logging.ERROR if quiet else logging.INFO)
    log.propagate = False
    handlers: list[logging.Handler] = [_TerminalHandler()]
    if log_file is not None and not quiet:
        Path(log_file).parent.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(log_file, mode="a" if goes_on else "w"))
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
        log.addHandler(handler)


class Progress:
    """Progress of ``total`` steps, each of ``unit_size`` units.

    On a terminal a bar with rate and time left; a plain line every ``every`` seconds in the log file, and on stderr
    where that is no terminal. Where nobody called :func:`set_up_logging` (in a notebook, say), or it was told to be
    quiet, it is silent.

    Args:
        what: what is being done; starts each line.
        total: number of steps.
        unit: what is counted, `img` or the like.
        unit_size: units per step.
        done: steps that were done before.
    """

    def __init__(
        self, what: str, total: int, unit: str = "it", unit_size: int = 1, every: float = 10.0, done: int = 0
    ) -> None:
        self.what, self.total, self.unit, self.unit_size, self.every = what, total, unit, unit_size, every
        self.done = self._before = done
        self.start = self._last = time.monotonic()
        self.silent = not (log.handlers and log.isEnabledFor(logging.INFO))  # a notebook; one of several processes
        self.on_terminal = sys.stderr.isatty() and not self.silent
        self._bar = tqdm(
            total=total * unit_size, initial=done * unit_size, unit=unit, desc=what, disable=not self.on_terminal,
            leave=False,
        )  # fmt: skip

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def step(self, note: Callable[[], str] | str = "") -> None:
        """One more step is done; ``note`` (a text, or a function that is only called when it is shown) goes with it."""
        self.to(self.done + 1, note)

    def to(self, done: int, note: Callable[[], str] | str = "") -> None:
        """So many steps are done, which may be fewer than before; ``note`` as in :meth:`step`."""
        self._bar.update((done - self.done) * self.unit_size)
        now = time.monotonic()
        if done <= self._before:  # back, and from there anew
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
