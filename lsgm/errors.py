"""The one exception that reaches a user: the command line prints its message and no traceback."""

from __future__ import annotations

from collections.abc import Sequence


class LSGMError(Exception):
    """Something the user can mend. The message names the key or the file, what was expected and the way out."""


class SolverError(LSGMError):
    """An ODE could not be solved, or what came of it is not finite: the model's fault, if it diverged."""


class Stopped(Exception):
    """A training was told to stop, and can go on: exit code 75 (EX_TEMPFAIL)."""


def check_choice(name: str, value: object, allowed: Sequence[object]) -> None:
    """Raise :class:`LSGMError` unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise LSGMError(f"{name}: expected one of {', '.join(map(str, allowed))}, found {value!r}")
