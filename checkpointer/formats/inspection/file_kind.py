"""Finds the kind of a file from its first bytes, because an extension or a record may be wrong."""

from __future__ import annotations

from typing import BinaryIO, Final, Literal

__all__ = ["START", "Kind", "sniff"]

Kind = Literal["torch", "safetensors"]

START: Final = 16
"""Bytes that `sniff` needs."""
MAX_HEADER_BYTES: Final = 100_000_000
"""A longer safetensors header is refused, as the format itself says."""
_ZIP: Final = b"PK"
_PICKLE: Final = b"\x80"
_MAGIC_AS_TEXT: Final = b"L1195470371460388"
"""How a pickle of protocol 0 begins with the number that torch writes first."""


def sniff(stream: BinaryIO) -> Kind | None:
    """Return the format of a file, or None if it is neither; the stream is at its start again afterwards.

    A zip file and a pickle count as torch files.

    Example:
        >>> import io, torch
        >>> from checkpointer.formats import open_format
        >>> stream = io.BytesIO()
        >>> open_format("safetensors").write({"w": torch.ones(2)}, stream)
        >>> sniff(io.BytesIO(stream.getvalue())), sniff(io.BytesIO(b"plain text"))
        ('safetensors', None)
    """
    stream.seek(0)
    start = stream.read(START)
    stream.seek(0)
    # This comes first because the length of a safetensors header may begin with any byte.
    if start[8:9] == b"{" and 2 <= int.from_bytes(start[:8], "little") <= MAX_HEADER_BYTES:
        return "safetensors"
    return "torch" if start.startswith((_ZIP, _PICKLE, _MAGIC_AS_TEXT[:START])) else None
