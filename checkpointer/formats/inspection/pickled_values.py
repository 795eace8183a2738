"""Reads the values in a pickle that are not tensors: containers, modules, numbers, and objects known by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any, Final

from checkpointer.formats.inspection.pickle import Call, Global
from checkpointer.formats.inspection.tensors import Branch, Entries
from checkpointer.formats.inspection.work_limit import Work

_MODULE: Final = ("_parameters", "_buffers", "_modules")
_COMPILED: Final = Global("torch._dynamo.eval_frame", "OptimizedModule")
"""What ``torch.compile`` makes: a call with the module within, and no state."""
_MAX_LEVELS: Final = 20
"""A value that is nested more deeply is not plain data."""
_DATA: Final = 8
"""Units of work of each entry of plain data."""
_MAX_SHOWN: Final = 8
"""Items of a list that is shown as it is."""


def children_of(value: Any, work: Work) -> tuple[Branch, Entries] | None:
    """Return what a container or an object is and holds; None for anything else, and for numbers alone."""
    work.spend(_size(value))
    if is_module(value):
        return Branch("module"), module_entries(value)
    pairs: Iterable[tuple[Any, Any]]
    if isinstance(value, dict):
        branch, pairs, has_any = Branch("mapping", versions=versions_of(value, work)), value.items(), bool(value)
    elif isinstance(value, Call) and isinstance(value.what, Global):
        state = value.state if isinstance(value.state, dict) else {"state": value.state or None}
        inside = chain(enumerate(value.args), state.items(), enumerate(value.items))
        # The parts of an object are shown if there is a tensor among them.
        pairs = [(key, part) for key, part in inside if not _is_plain(part)]
        branch, has_any = Branch("other"), bool(pairs)
    elif isinstance(value, (list, tuple, set, frozenset)):
        # A list of ten thousand numbers is one thing.
        branch, pairs, has_any = Branch("other"), enumerate(value), not all(map(_is_plain, value))
    else:
        return None
    return (branch, ((_key(key), child, True) for key, child in pairs)) if has_any else None


def _size(value: Any) -> int:
    """Return how many items have to be looked at to know what a value holds."""
    if isinstance(value, Call):
        inside = [value.args, value.items, value.state]
        inside += [value.state.get(kind) for kind in _MODULE] if isinstance(value.state, dict) else []
        return sum(len(part) for part in inside if isinstance(part, (dict, list, tuple)))
    return len(value) if isinstance(value, (dict, list, tuple, set, frozenset)) else 0


def versions_of(mapping: dict[Any, Any], work: Work) -> Mapping[str, Any]:
    """Return the ``_metadata`` of a ``state_dict``."""
    data = as_data(getattr(mapping, "_metadata", None), work)
    return data if isinstance(data, dict) else {}


def _key(key: Any) -> str:
    return str(key) if isinstance(key, (str, int, float, bool)) else f"<{type(key).__name__}>"


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (str, int, float, bool, bytes, Global))


def is_module(value: Any) -> bool:
    """Return whether it makes a `torch.nn.Module`."""
    return isinstance(value, Call) and (_is_compiled(value) or _has_state(value))


def _is_compiled(call: Call) -> bool:
    return call.what == _COMPILED and bool(call.args) and isinstance(call.args[0], Call) and _has_state(call.args[0])


def _has_state(call: Call) -> bool:
    return isinstance(call.state, dict) and all(key in call.state for key in _MODULE)


def module_entries(call: Call) -> Entries:
    """Yield what a module holds: first what its ``state_dict`` has, then what else may have a tensor in it."""
    if _is_compiled(call):
        yield "_orig_mod", call.args[0], True
        return
    found = call.state.get("_non_persistent_buffers_set")
    not_saved = found if isinstance(found, (set, frozenset)) else ()
    for kind in _MODULE:
        inside = call.state[kind]
        for key, child in inside.items() if isinstance(inside, dict) else ():
            if child is not None:
                yield _key(key), child, kind != "_buffers" or key not in not_saved
    for key, child in call.state.items():
        # Names with an underscore are torch's own: hooks, and the names of buffers.
        if not _key(key).startswith("_") and not _is_plain(child):
            yield _key(key), child, False


def as_data(value: Any, work: Work) -> Any:
    """Return a value that holds nothing but plain data as Python has it; None if it holds anything else."""
    try:
        return _as_data(value, _MAX_LEVELS, work)
    except _NotDataError:
        return None


class _NotDataError(Exception):
    pass


def _as_data(value: Any, levels: int, work: Work) -> Any:
    work.spend(_DATA)
    if not levels:
        raise _NotDataError
    if value is None or isinstance(value, (str, int, float, bool, bytes)):
        return value
    if isinstance(value, dict):
        return {key: _as_data(child, levels - 1, work) for key, child in value.items() if _is_plain(key)}
    if isinstance(value, (list, tuple, set, frozenset)):
        found = [_as_data(child, levels - 1, work) for child in value]
        return tuple(found) if isinstance(value, tuple) else found
    raise _NotDataError


def shown(value: Any, work: Work) -> Any:
    """Return a leaf as it may be shown."""
    if isinstance(value, str):
        work.spend(len(value))
        return value
    if value is None or isinstance(value, (int, float, bool)):
        return value
    if isinstance(value, (list, tuple, set, frozenset)) and len(value) <= _MAX_SHOWN and all(map(_is_plain, value)):
        items = [shown(item, work) for item in value]
        return items if isinstance(value, (list, tuple)) else sorted(items, key=repr)
    return shown(_named(value), work)


def _named(value: Any) -> str:
    if isinstance(value, Call):
        return f"<object by {value.what if isinstance(value.what, Global) else 'a call'}>"
    if isinstance(value, bytes):
        return f"<{len(value)} bytes>"
    if isinstance(value, (list, tuple, dict, set, frozenset)):
        return f"<{type(value).__name__} of {len(value)}>"
    return f"<{value}>" if isinstance(value, Global) else f"<{type(value).__name__}>"
