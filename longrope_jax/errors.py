"""Values and messages, short enough for one line of an error, which names the file that it is about."""

import contextlib
from collections.abc import Iterator
from typing import Any

_MAX_LENGTH = 1000  # characters: a page of a terminal


def shortened(value: Any) -> str:
    """The repr of a value on one line, cut after 80 characters."""
    text = repr(value).replace("\n", " ")  # a ConfigDict has several lines
    return text if len(text) <= 80 else f"{text[:77]}..."


def beginning(message: object) -> str:
    """A message on one line, cut after 1,000 characters: those of libraries may repeat a whole file."""
    line = " ".join(str(message).split())
    return line if len(line) <= _MAX_LENGTH else f"{line[: _MAX_LENGTH - 3]}..."


@contextlib.contextmanager
def naming(path: object) -> Iterator[None]:
    """Turns errors in a file's content into a ValueError of one line that begins with the path."""
    try:
        yield
    except (ValueError, OverflowError, RecursionError) as error:  # ValueError includes JSON and Unicode errors
        message = "nested too deep" if isinstance(error, RecursionError) else beginning(error)
        raise ValueError(message if message.startswith(str(path)) else f"{path}: {message}") from None
