"""The error that reports a problem to the user."""


class UserError(ValueError):
    """A value, file or environment from the user cannot be used. The message names it and the remedy."""
