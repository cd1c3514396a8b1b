"""The base of every error that the user can mend; the CLI prints it as one line, no traceback."""

from __future__ import annotations


class UserError(Exception):
    """Something outside the code is wrong; the message names the file or key and the mend."""
