"""Exceptions. The command line prints the message of an :class:`LSGMError` without a traceback."""

from __future__ import annotations


class LSGMError(Exception):
    """An error that the user can fix. The message names the key or file, what was expected and what to do."""


class SolverError(LSGMError):
    """The solver failed or produced non-finite values, usually because training diverged."""


class Stopped(Exception):
    """A training was told to stop and can be resumed: exit code 75 (EX_TEMPFAIL)."""
