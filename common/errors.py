"""The errors that a person can correct. The command prints their text without a traceback."""


class UserError(ValueError):
    """Something outside the program is wrong; the text says what, where, found, expected, and what to do."""


class ConfigError(UserError):
    """A configuration file or an override cannot be used."""
