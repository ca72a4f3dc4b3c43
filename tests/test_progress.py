"""Log lines: where they cannot be written, or hold what is not text, the job goes on without a traceback."""

import errno
import io
import sys

import pytest

from lsgm.progress import Progress, log, set_up_logging

NAME = "caf\udce9.png"  # the name of a file whose bytes are not UTF-8


@pytest.fixture(autouse=True)
def logging_as_before():
    yield
    set_up_logging(quiet=True)
    log.handlers.clear()


def say():
    for i in range(3):
        log.info(f"line {i}: {NAME}")
    with Progress("sampling", 2) as bar:
        for _ in range(2):
            bar.step(NAME)


def test_a_full_disk_under_the_log_file_is_said_once(capfd):
    set_up_logging("/dev/full")
    say()
    set_up_logging()  # closes it
    lines = capfd.readouterr().err.splitlines()
    assert sum("/dev/full: the log file cannot be written (No space left on device)" in line for line in lines) == 1
    assert len(lines) == 5 and not any("Traceback" in line or "Error" in line for line in lines)


def test_names_that_are_no_text(tmp_path, capfd, monkeypatch):
    """In the file, and on a terminal that knows ASCII alone."""
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict"))
    set_up_logging(tmp_path / "log")
    say()
    log.info("größer")
    sys.stderr.flush()
    said = sys.stderr.buffer.getvalue().decode("ascii")
    written = (tmp_path / "log").read_text(encoding="utf-8")
    for text in (said, written):
        assert text.count(r"caf\udce9.png") == 4
    assert r"gr\xf6\xdfer" in said and "größer" in written


def closed():
    stream = io.StringIO()
    stream.close()
    return stream


class Gone(io.StringIO):
    def write(self, text):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")


@pytest.mark.parametrize("stderr", [lambda: None, closed, Gone])
def test_a_terminal_that_is_gone(tmp_path, monkeypatch, stderr):
    monkeypatch.setattr(sys, "stderr", stderr())
    set_up_logging(tmp_path / "log")
    say()
    lines = (tmp_path / "log").read_text().splitlines()
    assert len(lines) == 4 and "sampling: 2/2" in lines[-1]
