"""Values, and the words of others, in the words of an error."""

from typing import Any

_LONGEST = 1000  # characters of what others say: a page of a terminal


def shortened(value: Any) -> str:
    """A value as a message shows it: of a long list or text only the beginning."""
    text = repr(value).replace("\n", " ")  # a ConfigDict has several lines
    return text if len(text) <= 80 else f"{text[:77]}..."


def beginning(told: object) -> str:
    """What a library, or settings, said is wrong, which may repeat a whole file: on one line, and of a long text only
    its beginning.
    """
    line = " ".join(str(told).split())
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 3]}..."
