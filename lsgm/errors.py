"""The one exception that reaches a user: the command line prints its message and no traceback."""

from __future__ import annotations


class LSGMError(Exception):
    """Something the user can mend. The message names the key or the file, what was expected and the way out."""


class SolverError(LSGMError):
    """An ODE could not be solved, or what came of it is not finite: the model's fault, if it diverged."""


class Stopped(Exception):
    """A training was told to stop and can be resumed: exit code 75 (EX_TEMPFAIL)."""
