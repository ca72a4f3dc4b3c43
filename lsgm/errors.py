"""The one exception that reaches a user: the command line prints its message and no traceback."""


class LSGMError(Exception):
    """Something the user can mend. The message names the key or the file, what was expected and the way out."""
