"""Exception types that a caller may want to catch, and the one form of every message."""


class CheckpointError(ValueError):
    """A checkpoint or its config cannot be loaded; the message lists every problem found."""


class NotCapturedError(ValueError):
    """A result needs a field of the residual stream that the forward did not capture."""


def expected(argument: str, must: str, got: object, do: str) -> str:
    """A message in the form of all messages: what was wanted, what came, and the remedy."""
    return f"`{argument}` must be {must}, got {got}; {do}"
