"""What an error of another library says, short enough for a message of our own."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """Return what an error of another library says, in one line; its kind where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # A line that announces the next one says nothing alone.
    announced = lines[1:2] if lines and lines[0].endswith(":") else []
    return " ".join([*lines[:1], *announced]) or type(error).__name__
