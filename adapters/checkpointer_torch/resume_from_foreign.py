"""Reads the file of another program as a Loop's checkpoint, so that its training can be continued."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, Final

from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from checkpointer._display import some_of
from checkpointer._validation import brief
from checkpointer.errors import MismatchError, PolicyError, UnsafePayloadError
from checkpointer.formats.inspection.find_weights import unwrapped
from checkpointer.formats.inspection.rebuild import unread_in
from checkpointer.records.codec import as_number

StateMap = Mapping[str, str | Callable[[Any], Any]]
"""For each object the key of its state in the file, or a function that makes the state from the file's content."""
_COUNTS: Final = ("epoch", "step")
"""Names in a map for the loop itself: the next epoch (0-based), and how many steps are finished."""
_DDP: Final = "module."
"""What DDP puts before every name of a module."""


def picked(
    content: Any, names: StateMap, source: str, counts: Mapping[str, int]
) -> tuple[dict[str, Any], dict[str, int], list[str]]:
    """Return the values that the map finds in a file's content; a key may be deeper in it (``"state.model.0"``).

    Returns:
        The objects' states by their names in the loop; the ``counts``, with those that the map has; and the keys of
        the file that the map does not name.

    Raises:
        MismatchError: If the file has no such key.
        UnsafePayloadError: If the map names a value with an object that was not unpickled.
        PolicyError: If a count is not a whole number, or a value of the map is neither a key nor a function.
    """
    for name, key in names.items():
        if not callable(key) and not isinstance(key, str):
            msg = f"map={{{name!r}: {key!r}}}: expected a key of the file, or a function such as lambda _: {key!r}"
            raise PolicyError(msg)
    found = {name: key(content) if callable(key) else _looked_up(content, key, source) for name, key in names.items()}
    _check_read(found, names, source)
    states = {name: _without_wrappers(state) for name, state in found.items() if name not in _COUNTS}
    counts = {name: _as_count(name, found.get(name, counts.get(name, 0)), source) for name in _COUNTS}
    used = [f"{key}." for key in names.values() if isinstance(key, str)]
    there = [str(key) for key in content] if isinstance(content, Mapping) else []
    unused = [key for key in there if not any(one.startswith(f"{key}.") for one in used)]
    return states, counts, unused


def _check_read(found: Mapping[str, Any], names: StateMap, source: str) -> None:
    for name, value in found.items():
        for path, unread in unread_in(value):
            where = f"{path!r} in it" if path else "it"
            msg = (
                f"{source} was read without unpickling, and nothing was loaded: {name!r} needs {names[name]!r}, and "
                f"{where} is made by {unread.what}. In map= give a key or a function that leaves it out; if you trust "
                "the file pass weights_only=False"
            )
            raise UnsafePayloadError(msg)


def _looked_up(content: Any, key: str, source: str) -> Any:
    if isinstance(content, Mapping):
        if key in content:
            return content[key]
        ends = [at for at, char in enumerate(key) if char == "."]
        if first := next((key[:at] for at in reversed(ends) if key[:at] in content), ""):
            return _looked_up(content[first], key[len(first) + 1 :], source)
    first, _, rest = key.partition(".")
    if isinstance(content, (list, tuple)) and first.isdecimal() and int(first) < len(content):
        return _looked_up(content[int(first)], rest, source) if rest else content[int(first)]
    there = some_of(list(map(str, content)), 20) if isinstance(content, Mapping) else _kind(content)
    msg = f"{source} has no {key!r} (have: {there}), and nothing was loaded; fix the name in map="
    raise MismatchError(msg)


def _kind(content: Any) -> str:
    items = f", whose items are '0' to '{len(content) - 1}'" if isinstance(content, (list, tuple)) and content else ""
    return f"a {type(content).__name__}{items}"


def _as_count(name: str, value: Any, source: str) -> int:
    value = value.item() if hasattr(value, "item") else value
    number = as_number(value)
    if number is None or not 0 <= number < 1 << 63 or not number.is_integer():
        msg = f"the {name} that map= finds in {source} is {brief(value)}; expected a whole number of at least 0"
        raise PolicyError(msg)
    return int(value)


def _without_wrappers(state: Any) -> Any:
    """Leave out the names of wrappers, and the prefix of DDP if all names have it."""
    if not isinstance(state, dict) or not state or not all(isinstance(key, str) for key in state):
        return state
    if any(unwrapped(key) != key for key in state):
        versions = {unwrapped(path): version for path, version in getattr(state, "_metadata", {}).items()}
        state = OrderedDict((unwrapped(key), value) for key, value in state.items())
        state._metadata = versions
    if all(key.startswith(_DDP) for key in state):
        consume_prefix_in_state_dict_if_present(state, _DDP)
        return _without_wrappers(state)
    return state
