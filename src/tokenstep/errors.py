"""The one error that a user is meant to read."""


class TokenstepError(Exception):
    """A fault of the call or of a file: one line that names it and the remedy."""
