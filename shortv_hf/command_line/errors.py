"""Errors in one line."""


def one_line(error: Exception) -> str:
    """What the command says of an error."""
    kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
    lines = str(error).splitlines() or [type(error).__name__]
    return f"shortv: {kind}{lines[0]}"
