"""The faults, warnings and ends that a user is meant to read: each one line."""


class TokenstepError(Exception):
    """A fault of the call or of a file: one line that names it and the remedy."""


class PictureWarning(UserWarning):
    """A picture was read, but perhaps not as meant: one line that names it and the remedy."""


class Terminated(SystemExit):
    """The process was told to end (SIGTERM): a line to print, and the code of a shell, 143."""

    def __init__(self, message: str) -> None:
        super().__init__(143)
        self.message = message


def is_out_of_memory(error: Exception) -> bool:
    """Whether Python, a GPU or torch's allocator for CPUs had no memory left."""
    # The last has no type of its own, and torch is not imported for its name alone.
    named = type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error)
    return named or isinstance(error, MemoryError)
