"""The base of every error that the user can fix; the CLI prints it as one line, no traceback."""

from __future__ import annotations

# EX_TEMPFAIL: not an error, run the same command again to continue
EXIT_STOPPED = 75


class UserError(Exception):
    """Something outside the code is wrong; the message names the file or key and the remedy.

    Attributes:
        exit_code: exit code of the process; 2 means that the same command fails again.
        agreed: every rank raises it at the same step, so it need not be sent to the others.
    """

    exit_code: int = 2
    agreed: bool = False


class ConfigError(UserError, ValueError):
    """A config that cannot be used; the message names the file or key and the remedy."""
