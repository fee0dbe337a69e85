"""The errors that a person can correct. Every room derives its own from `UserError`.

A command prints the text of these (and of OSError, which names the file) without a traceback; whatever else comes up
is a defect, and is shown as one (see entry_point.py).
"""


class UserError(ValueError):
    """Something outside the program is wrong; the text says what, where, found, expected, and what to do."""


class ConfigError(UserError):
    """A configuration file or an override cannot be used."""


class PreemptedError(UserError):
    """A signal ended the work before its end, at a place where it could not go on; the same command continues."""


# What the person at the terminal can act on: no space and no permission among it.
FORESEEN_ERRORS = (UserError, OSError)
