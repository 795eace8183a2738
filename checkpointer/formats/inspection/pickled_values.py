"""Reads the values in a pickle that are not tensors: containers, modules, numbers, and objects known by name."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any, Final

from checkpointer.formats.inspection.pickle import Call, Global
from checkpointer.formats.inspection.tensors import Branch, Entries

__all__ = [
    "as_data",
    "bytes_of",
    "children_of",
    "is_container_call",
    "is_module",
    "kind_of",
    "module_entries",
    "pairs_of",
    "scalar_of",
    "sequence_of",
    "shown",
    "versions_of",
]

_MAPPINGS: Final = {("collections", "OrderedDict"), ("collections", "Counter"), ("collections", "defaultdict")}
_SEQUENCES: Final = {("builtins", "set"), ("builtins", "frozenset"), ("builtins", "list"), ("torch", "Size")}
_PLAIN: Final = _MAPPINGS | _SEQUENCES | {("builtins", "complex"), ("torch", "device"), ("_codecs", "encode")}
_MODULE: Final = ("_parameters", "_buffers", "_modules")
_NUMPY_SCALAR: Final = {("numpy.core.multiarray", "scalar"), ("numpy._core.multiarray", "scalar")}
_TYPES: Final = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")
_CODES: Final = dict(zip(_TYPES, "?bhiqBHIQefd", strict=True))
"""The code in `struct` of each numpy dtype."""


def is_container_call(found: Global) -> bool:
    """Return whether a container or a plain value is made by it."""
    return (found.module, found.name) in _PLAIN


def kind_of(value: Any) -> tuple[str, str] | None:
    """Return the module and name of what a call would have called; None for anything else."""
    if isinstance(value, Call) and isinstance(value.what, Global):
        return value.what.module, value.what.name
    return None


def pairs_of(value: Any) -> list[tuple[Any, Any]] | None:
    """Return the items of a mapping; None for anything else."""
    if isinstance(value, dict):
        return list(value.items())
    if kind_of(value) not in _MAPPINGS:
        return None
    pairs: list[Any] = []
    for arg in value.args:
        # Python 2 gives the items of an OrderedDict to its constructor.
        pairs += arg.items() if isinstance(arg, dict) else arg if isinstance(arg, list) else ()
    return [(pair[0], pair[1]) for pair in (*pairs, *value.items) if isinstance(pair, (tuple, list)) and len(pair) == 2]


def sequence_of(value: Any) -> list[Any] | None:
    """Return the items of a list, tuple or set; None for anything else."""
    if isinstance(value, (list, tuple, set)):
        return list(value)
    if kind_of(value) not in _SEQUENCES:
        return None
    items: list[Any] = [item for arg in value.args if isinstance(arg, (list, tuple, set)) for item in arg]
    return items + list(value.items)


def children_of(value: Any) -> tuple[Branch, Entries] | None:
    """Return what a container or an object is and holds; None for anything else, and for numbers alone."""
    if is_module(value):
        return Branch("module"), module_entries(value)
    pairs: Any = pairs_of(value)
    branch = Branch("other" if pairs is None else "mapping", versions=versions_of(value))
    if isinstance(value, (list, tuple)):
        # A list of ten thousand numbers is one thing.
        pairs = None if all(map(_is_plain, value)) else enumerate(value)
    elif pairs is None and kind_of(value) not in (None, *_NUMPY_SCALAR):
        state = value.state if isinstance(value.state, dict) else {"state": value.state or None}
        inside = [*enumerate(value.args), *state.items(), *enumerate(value.items)]
        # The parts of an object are shown if there is a tensor among them.
        pairs = [(key, part) for key, part in inside if not _is_plain(part)]
    return (branch, ((_key(key), child, True) for key, child in pairs)) if pairs else None


def versions_of(value: Any) -> Mapping[str, Any]:
    """Return the ``_metadata`` of a ``state_dict``."""
    state = value.state if isinstance(value, Call) else None
    data = as_data(state.get("_metadata")) if isinstance(state, dict) else None
    return data if isinstance(data, dict) else {}


def _key(key: Any) -> str:
    return str(key) if isinstance(key, (str, int, float, bool)) else f"<{type(key).__name__}>"


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (str, int, float, bool, bytes, Global))


# Modules that were pickled as they are


def is_module(value: Any) -> bool:
    """Return whether it makes a `torch.nn.Module`."""
    return isinstance(value, Call) and isinstance(value.state, dict) and all(key in value.state for key in _MODULE)


def module_entries(call: Call) -> Entries:
    """Yield what a module holds: first what its ``state_dict`` has, then what else may have a tensor in it."""
    names = sequence_of(call.state.get("_non_persistent_buffers_set")) or ()
    for kind in _MODULE:
        for key, child in pairs_of(call.state[kind]) or ():
            if child is not None:
                yield _key(key), child, kind != "_buffers" or key not in names
    for key, child in call.state.items():
        # Names with an underscore are torch's own: hooks, and the names of buffers.
        if not str(key).startswith("_") and not _is_plain(child):
            yield _key(key), child, False


# Values


def scalar_of(value: Any) -> bool | int | float | None:
    """Return the number that a numpy scalar is; None for anything else.

    Neither numpy nor unpickling is needed for it.
    """
    args = _numpy_args(value, "scalar")
    if args is None or len(args) != 2 or not isinstance(args[0], Call):
        return None
    dtype, data = _numpy_args(args[0], "dtype"), bytes_of(args[1])
    code = _CODES.get(str(dtype[0])) if dtype else None
    if code is None or data is None or struct.calcsize(code) != len(data):
        return None
    # The state of a dtype is (version, byte order, ...).
    state = args[0].state
    order = state[1] if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">") else "="
    number: bool | int | float = struct.unpack(order + code, data)[0]
    return number


def _numpy_args(value: Any, name: str) -> tuple[Any, ...] | None:
    module, found = kind_of(value) or ("", "")
    return value.args if module.partition(".")[0] == "numpy" and found == name else None


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


def as_data(value: Any) -> Any:
    """Return a value that holds nothing but plain data as Python has it; None if it holds anything else."""
    try:
        return _as_data(value, 20)
    except _NotDataError:
        return None


class _NotDataError(Exception):
    pass


def _as_data(value: Any, levels: int) -> Any:
    if value is None or isinstance(value, (str, int, float, bool, bytes)):
        return value
    pairs, sequence, number = pairs_of(value), sequence_of(value), scalar_of(value)
    if levels and pairs is not None:
        return {key: _as_data(child, levels - 1) for key, child in pairs if _is_plain(key)}
    if levels and sequence is not None:
        found = [_as_data(child, levels - 1) for child in sequence]
        return tuple(found) if isinstance(value, tuple) else found
    if number is None:
        raise _NotDataError
    return number


def shown(value: Any) -> Any:
    """Return a leaf as it may be shown."""
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    if isinstance(value, bytes):
        return f"<{len(value)} bytes>"
    if isinstance(value, Call):
        number = scalar_of(value)
        what = value.what if isinstance(value.what, Global) else "a call"
        return f"<object by {what}>" if number is None else number
    if isinstance(value, (list, tuple)) and len(value) <= 8 and all(_is_plain(item) for item in value):
        return [shown(item) for item in value]
    if isinstance(value, (list, tuple, dict, set)):
        return f"<{type(value).__name__} of {len(value)}>"
    return f"<{value}>" if isinstance(value, Global) else f"<{type(value).__name__}>"
