"""Errors meant for the person at the keyboard."""


class UserError(ValueError):
    """Something the user gave cannot be used. The message names the thing and the remedy."""
