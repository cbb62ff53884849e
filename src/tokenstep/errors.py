"""The error and the warning that a user is meant to read."""


class TokenstepError(Exception):
    """A fault of the call or of a file: one line that names it and the remedy."""


class PictureWarning(UserWarning):
    """A picture was read, but perhaps not as meant: one line that names it and the remedy."""
