"""Values in the words of an error."""

from typing import Any


def shortened(value: Any) -> str:
    """A value as a message shows it: of a long list or text only the beginning."""
    told = repr(value)
    return told if len(told) <= 80 else f"{told[:77]}..."
