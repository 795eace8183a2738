"""Reads a numpy scalar out of what a pickle says, without numpy and without unpickling."""

from __future__ import annotations

import struct
from typing import Any, Final

from checkpointer.formats.inspection.pickle import Call, Global

__all__ = ["bytes_of", "scalar_of"]

_TYPES: Final = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")
_CODES: Final = dict(zip(_TYPES, "?bhiqBHIQefd", strict=True))
"""What `struct` calls each of numpy's dtypes."""


def scalar_of(value: Any) -> bool | int | float | None:
    """Return the number that a numpy scalar is; None for anything else.

    Example:
        >>> import io, pickle, numpy
        >>> from checkpointer.formats.inspection.pickle import read_pickle
        >>> scalar_of(read_pickle(io.BytesIO(pickle.dumps(numpy.float32(0.5)))))
        0.5
    """
    args = _args_of(value, "scalar")
    if args is None or len(args) != 2 or not isinstance(args[0], Call):
        return None
    dtype, data = _args_of(args[0], "dtype"), bytes_of(args[1])
    code = _CODES.get(str(dtype[0])) if dtype else None
    if code is None or data is None or struct.calcsize(code) != len(data):
        return None
    # The state of a dtype is (version, byte order, ...).
    state = args[0].state
    order = state[1] if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">") else "="
    number: bool | int | float = struct.unpack(order + code, data)[0]
    return number


def _args_of(value: Any, name: str) -> tuple[Any, ...] | None:
    if not isinstance(value, Call) or not isinstance(value.what, Global) or not isinstance(value.args, tuple):
        return None
    is_it = value.what.module.partition(".")[0] == "numpy" and value.what.name == name
    return value.args if is_it else None


def bytes_of(value: Any) -> bytes | None:
    """Return bytes; an old pickle holds them as text and an encoding."""
    if isinstance(value, bytes):
        return value
    match value:
        case Call(what=Global(module="_codecs", name="encode"), args=(str() as text, "latin1")):
            try:
                return text.encode("latin1")
            except UnicodeEncodeError:
                return None
        case _:
            return None
