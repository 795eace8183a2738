"""Reads the values in a pickle that are not tensors: containers, modules, numbers, and objects known by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from checkpointer.formats.inspection.pickle import Call, Global
from checkpointer.formats.inspection.tensors import Branch, Entries

_MODULE: Final = ("_parameters", "_buffers", "_modules")
_MAX_DATA: Final = 1_000_000
"""A value of more entries is not plain data: a pickle of a kilobyte can name a list very often."""


def children_of(value: Any) -> tuple[Branch, Entries] | None:
    """Return what a container or an object is and holds; None for anything else, and for numbers alone."""
    if is_module(value):
        return Branch("module"), module_entries(value)
    if isinstance(value, dict):
        branch, pairs = Branch("mapping", versions=versions_of(value)), [*value.items()]
    elif isinstance(value, Call) and isinstance(value.what, Global):
        state = value.state if isinstance(value.state, dict) else {"state": value.state or None}
        inside = [*enumerate(value.args), *state.items(), *enumerate(value.items)]
        # The parts of an object are shown if there is a tensor among them.
        branch, pairs = Branch("other"), [(key, part) for key, part in inside if not _is_plain(part)]
    elif isinstance(value, (list, tuple, set, frozenset)):
        # A list of ten thousand numbers is one thing.
        branch, pairs = Branch("other"), [] if all(map(_is_plain, value)) else [*enumerate(value)]
    else:
        return None
    return (branch, ((_key(key), child, True) for key, child in pairs)) if pairs else None


def versions_of(mapping: dict[Any, Any]) -> Mapping[str, Any]:
    """Return the ``_metadata`` of a ``state_dict``."""
    data = as_data(getattr(mapping, "_metadata", None))
    return data if isinstance(data, dict) else {}


def _key(key: Any) -> str:
    return str(key) if isinstance(key, (str, int, float, bool)) else f"<{type(key).__name__}>"


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (str, int, float, bool, bytes, Global))


def is_module(value: Any) -> bool:
    """Return whether it makes a `torch.nn.Module`."""
    return isinstance(value, Call) and isinstance(value.state, dict) and all(key in value.state for key in _MODULE)


def module_entries(call: Call) -> Entries:
    """Yield what a module holds: first what its ``state_dict`` has, then what else may have a tensor in it."""
    not_saved = call.state.get("_non_persistent_buffers_set") or ()
    for kind in _MODULE:
        found = call.state[kind]
        for key, child in found.items() if isinstance(found, dict) else ():
            if child is not None:
                yield _key(key), child, kind != "_buffers" or key not in not_saved
    for key, child in call.state.items():
        # Names with an underscore are torch's own: hooks, and the names of buffers.
        if not str(key).startswith("_") and not _is_plain(child):
            yield _key(key), child, False


def as_data(value: Any) -> Any:
    """Return a value that holds nothing but plain data as Python has it; None if it holds anything else."""
    try:
        return _as_data(value, 20, iter(range(_MAX_DATA)))
    except _NotDataError:
        return None


class _NotDataError(Exception):
    pass


def _as_data(value: Any, levels: int, entries: Iterator[int]) -> Any:
    if not levels or next(entries, None) is None:
        raise _NotDataError
    if value is None or isinstance(value, (str, int, float, bool, bytes)):
        return value
    if isinstance(value, dict):
        return {key: _as_data(child, levels - 1, entries) for key, child in value.items() if _is_plain(key)}
    if isinstance(value, (list, tuple, set, frozenset)):
        found = [_as_data(child, levels - 1, entries) for child in value]
        return tuple(found) if isinstance(value, tuple) else found
    raise _NotDataError


def shown(value: Any) -> Any:
    """Return a leaf as it may be shown."""
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    if isinstance(value, bytes):
        return f"<{len(value)} bytes>"
    if isinstance(value, Call):
        return f"<object by {value.what if isinstance(value.what, Global) else 'a call'}>"
    if isinstance(value, (list, tuple, set, frozenset)) and len(value) <= 8 and all(map(_is_plain, value)):
        items = [shown(item) for item in value]
        return items if isinstance(value, (list, tuple)) else sorted(items, key=repr)
    if isinstance(value, (list, tuple, dict, set, frozenset)):
        return f"<{type(value).__name__} of {len(value)}>"
    return f"<{value}>" if isinstance(value, Global) else f"<{type(value).__name__}>"
