"""Small files that others may replace while they are read: a record is, whenever a metric is attached."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import BinaryIO, Final

__all__ = ["read_whole"]

_TIMES: Final = 5
"""A small file that is replaced under this many readings in a row is an error."""


def read_whole(open: Callable[[], BinaryIO], limit: int) -> bytes:
    """Read a file from its beginning, up to ``limit`` bytes; anew if it is replaced meanwhile (``ESTALE``).

    Example:
        >>> import io
        >>> read_whole(lambda: io.BytesIO(b"abc"), 2)
        b'ab'
    """
    for left in reversed(range(_TIMES)):
        try:
            with open() as stream:
                return stream.read(limit)
        except OSError as error:
            if error.errno != errno.ESTALE or not left:
                raise
    raise AssertionError
