"""What values in a pickle are, apart from tensors: containers, modules, numbers, and objects known by name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, Literal

from checkpointer.formats.inspection.numpy_scalars import scalar_of
from checkpointer.formats.inspection.pickle import Call, Global

__all__ = [
    "args_of",
    "as_data",
    "children_of",
    "is_container_call",
    "is_module",
    "kind_of",
    "pairs_of",
    "sequence_of",
    "shown",
    "state_children",
    "versions_of",
]

_MAPPINGS: Final = {("collections", "OrderedDict"), ("collections", "Counter"), ("collections", "defaultdict")}
_SEQUENCES: Final = {("builtins", "set"), ("builtins", "frozenset"), ("builtins", "list"), ("torch", "Size")}
_PLAIN: Final = _MAPPINGS | _SEQUENCES | {("builtins", "complex"), ("torch", "device"), ("_codecs", "encode")}
_MODULE: Final = ("_parameters", "_buffers", "_modules")
_NUMPY_SCALAR: Final = {("numpy.core.multiarray", "scalar"), ("numpy._core.multiarray", "scalar")}
_ABSENT: Final = object()


def is_container_call(found: Global) -> bool:
    """Return whether a container or a plain value is made by it."""
    return (found.module, found.name) in _PLAIN


def args_of(call: Call) -> tuple[Any, ...]:
    """Return the arguments of a call; none if they are not a tuple."""
    return call.args if isinstance(call.args, tuple) else ()


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
    for arg in args_of(value):
        # Python 2 gives the items of an OrderedDict to its constructor.
        pairs += arg.items() if isinstance(arg, dict) else arg if isinstance(arg, list) else ()
    return [(pair[0], pair[1]) for pair in (*pairs, *value.items) if isinstance(pair, (tuple, list)) and len(pair) == 2]


def sequence_of(value: Any) -> list[Any] | None:
    """Return the items of a list, tuple or set; None for anything else."""
    if isinstance(value, (list, tuple, set)):
        return list(value)
    if kind_of(value) not in _SEQUENCES:
        return None
    items: list[Any] = [item for arg in args_of(value) if isinstance(arg, (list, tuple, set)) for item in arg]
    return items + list(value.items)


def children_of(
    value: Any,
) -> tuple[Literal["mapping", "other"], Mapping[str, Any], Iterator[tuple[str, Any]]] | None:
    """Return a container's kind, its versions and what it holds; None for what is none, or holds numbers alone."""
    pairs = pairs_of(value)
    if pairs is not None:
        return ("mapping", versions_of(value), ((_key(key), child) for key, child in pairs)) if pairs else None
    if isinstance(value, (list, tuple)):
        # A list of ten thousand numbers is one thing.
        return None if all(_is_plain(item) for item in value) else ("other", {}, _numbered(value))
    if not isinstance(value, Call) or not isinstance(value.what, Global) or kind_of(value) in _NUMPY_SCALAR:
        return None
    inside = [*_parts("args", value.args), *_parts("state", value.state), *(enumerate(value.items))]
    # What an object is made of is shown if there is a tensor in it.
    found = [(_key(key), part) for key, part in inside if not _is_plain(part)]
    return ("other", {}, iter(found)) if found else None


def _numbered(values: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    return ((str(number), value) for number, value in enumerate(values))


def versions_of(value: Any) -> Mapping[str, Any]:
    """Return the ``_metadata`` of a ``state_dict``."""
    state = value.state if isinstance(value, Call) else None
    data = as_data(state.get("_metadata")) if isinstance(state, dict) else None
    return data if isinstance(data, dict) else {}


def _key(key: Any) -> str:
    return (
        key if isinstance(key, str) else str(key) if isinstance(key, (int, float, bool)) else f"<{type(key).__name__}>"
    )


def _parts(name: str, value: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(value, dict):
        return value.items()
    return enumerate(value) if isinstance(value, tuple) and name == "args" else [(name, value)] if value else []


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (str, int, float, bool, bytes, Global))


# Modules that were pickled as they are


def is_module(call: Call) -> bool:
    """Return whether it makes a `torch.nn.Module`."""
    return isinstance(call.state, dict) and all(key in call.state for key in _MODULE)


def state_children(call: Call) -> Iterator[tuple[str, Any, bool]]:
    """Yield what a module holds: first what its ``state_dict`` has, then what else may have a tensor in it."""
    parameters, buffers, modules = ([*(pairs_of(call.state[key]) or ())] for key in _MODULE)
    not_saved = set(filter(_is_text, sequence_of(call.state.get("_non_persistent_buffers_set")) or ()))
    yield from ((_key(key), child, True) for key, child in parameters if child is not None)
    yield from ((_key(key), child, key not in not_saved) for key, child in buffers if child is not None)
    yield from ((_key(key), child, True) for key, child in modules if child is not None)
    for key, child in call.state.items():
        # What begins with an underscore is torch's own: hooks, and the names of buffers.
        if not str(key).startswith("_") and not _is_plain(child):
            yield _key(key), child, False


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


# Values


def as_data(value: Any) -> Any:
    """Return a value that holds nothing but plain data as Python has it; None if it holds anything else.

    Example:
        >>> as_data({"a": [1, 2.5], "b": ("x", None)})
        {'a': [1, 2.5], 'b': ('x', None)}
    """
    try:
        found = _as_data(value, 20)
    except RecursionError:
        return None
    return None if found is _ABSENT else found


def _as_data(value: Any, levels: int) -> Any:
    if value is None or isinstance(value, (str, int, float, bool, bytes)):
        return value
    pairs, sequence = pairs_of(value), sequence_of(value)
    if not levels or (pairs is None and sequence is None):
        return _number(value)
    if pairs is not None:
        items = {key: _as_data(child, levels - 1) for key, child in pairs if _is_plain(key)}
        return _ABSENT if _ABSENT in items.values() else items
    found = [_as_data(child, levels - 1) for child in sequence or ()]
    if any(item is _ABSENT for item in found):
        return _ABSENT
    return tuple(found) if isinstance(value, tuple) else found


def _number(value: Any) -> Any:
    """Return the number that a numpy scalar is."""
    number = scalar_of(value)
    return _ABSENT if number is None else number


def shown(value: Any) -> Any:
    """Return a leaf as it may be shown."""
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    if isinstance(value, bytes):
        return f"<{len(value)} bytes>"
    if isinstance(value, Call):
        number = _number(value)
        what = value.what if isinstance(value.what, Global) else "a call"
        return f"<object by {what}>" if number is _ABSENT else number
    if isinstance(value, (list, tuple)) and len(value) <= 8 and all(_is_plain(item) for item in value):
        return [shown(item) for item in value]
    if isinstance(value, (list, tuple, dict, set)):
        return f"<{type(value).__name__} of {len(value)}>"
    return f"<{value}>" if isinstance(value, Global) else f"<{type(value).__name__}>"
