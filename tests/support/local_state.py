"""A digest of all that a thread's next steps depend on: the variables of its frames, and every value they lead to.

Two threads of the same code with equal digests do the same from here on. Not in the digest is what Python keeps on a
frame's own stack: the rest of an iteration, a half-built list. So inside of a comprehension there is no digest. A loop
is taken to go over what its function has in variables, so that the loop's own variable says how far it has come. Loops
for which that is not so are named in `_LOOP_OVER_TEMPORARY`.
"""

from __future__ import annotations

import collections
import contextlib
import dis
import enum
import functools
import io
import itertools
import pathlib
import re
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import attrs
import xxhash

__all__ = ["digest_of_frames"]

_ATOMS: Final = (
    str,
    bytes,
    int,
    float,
    complex,
    bool,
    type(None),
    range,
    slice,
    enum.Enum,
    re.Pattern,
    pathlib.PurePath,
)
_BY_NAME: Final = (type, types.ModuleType, types.BuiltinFunctionType, types.CodeType, functools._lru_cache_wrapper)
_UNCLEAR: Final = frozenset({"<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>"})
_LOOP_OVER_TEMPORARY: Final = frozenset({"_take_over"})
"""Functions with a loop over a list that no variable has, and that changes meanwhile."""


def digest_of_frames(frame: types.FrameType | None, last: types.CodeType, replace: Callable[[Any], Any]) -> str | None:
    """Return a digest of a frame and its callers, up to the frame of ``last``; None if it cannot be known.

    Args:
        frame: The innermost frame.
        last: The code of the outermost frame, which is left out.
        replace: Returns what counts instead of a value, such as a part of it; or the value.
    """
    walk = _Walk(replace)
    walk.visit(sys.exc_info()[1])  # A `finally` raises it again.
    while frame is not None and frame.f_code is not last:
        if frame.f_code.co_name in _UNCLEAR or _is_in_loop(frame.f_code, frame.f_lasti):
            return None
        walk.text(f"{frame.f_code.co_filename}:{frame.f_code.co_name}:{frame.f_lasti}")
        walk.visit(dict(frame.f_locals))
        frame = frame.f_back
    return walk.digest()


@functools.lru_cache(10_000)
def _is_in_loop(code: types.CodeType, last: int) -> bool:
    """Return whether a frame is in a loop over values that only its stack has."""
    if code.co_name not in _LOOP_OVER_TEMPORARY:
        return False
    loops = [(one.offset, one.argval) for one in dis.get_instructions(code) if one.opname == "FOR_ITER"]
    return any(start <= last < end for start, end in loops)


class _Walk:
    def __init__(self, replace: Callable[[Any], Any]) -> None:
        self._replace = replace
        self._parts: list[str] = []
        self._numbers: dict[int, int] = {}
        self._kept: list[Any] = []
        """Values that were made on the way, so that no other value gets their id."""

    def text(self, text: str) -> None:
        self._parts.append(text)

    def digest(self) -> str:
        return xxhash.xxh3_128_hexdigest("\0".join(self._parts).encode(errors="surrogatepass"))

    def visit(self, value: Any) -> None:
        if isinstance(value, _ATOMS):
            self._parts.append(repr(value))
            return
        number = self._numbers.get(id(value))
        if number is not None:
            self._parts.append(f"@{number}")
            return
        self._numbers[id(value)] = len(self._numbers)
        self._kept.append(value)
        other = self._replace(value)
        if other is not value:
            self.visit(other)
            return
        self._parts.append(type(value).__qualname__)
        for part in self._parts_of(value):
            self.visit(part)
        self._parts.append(")")

    def _parts_of(self, value: Any) -> Iterable[Any]:
        match value:
            case tuple() | list() | collections.deque():
                return value
            case set() | frozenset():
                return sorted(map(self._apart, value))
            case Mapping():
                return itertools.chain.from_iterable(value.items())
            case types.FunctionType():
                cells = [_content(cell) for cell in value.__closure__ or ()]
                return [value.__module__, value.__qualname__, value.__defaults__, value.__kwdefaults__, *cells]
            case types.MethodType():
                return [value.__func__.__qualname__, value.__self__]
            case functools.partial():
                return [value.func, value.args, value.keywords]
            case types.GeneratorType():
                frame = value.gi_frame
                return [value.__qualname__, *([frame.f_lasti, dict(frame.f_locals)] if frame is not None else [])]
            case contextlib._GeneratorContextManager():
                return [getattr(value, "gen", None)]
            case io.BytesIO():
                return [value.getvalue(), value.tell()] if not value.closed else []
            case BaseException():
                return [str(value), value.__dict__, value.__cause__, value.__context__]
            case itertools.count():
                return [repr(value)]
            case _:
                return self._of_object(value)

    def _of_object(self, value: Any) -> Iterable[Any]:
        kind = type(value)
        if isinstance(value, _BY_NAME):
            return [getattr(value, "__module__", ""), getattr(value, "__qualname__", getattr(value, "__name__", ""))]
        if attrs.has(kind):
            # Cached properties are left out: they follow from the fields.
            return [getattr(value, field.name, None) for field in attrs.fields(kind)]
        if kind.__module__ in ("threading", "_thread", "weakref", "_weakref", "logging"):
            return [getattr(value, "name", "")] if kind.__module__ == "logging" else []
        with contextlib.suppress(TypeError, AttributeError):
            if kind.__module__ == "builtins":  # Iterators.
                return value.__reduce__()[1:] if kind is not object else []
        slots = [s for base in kind.__mro__ for s in _slots(base)]
        return [getattr(value, "__dict__", {}), *(getattr(value, slot, None) for slot in slots)]

    def _apart(self, value: Any) -> str:
        walk = _Walk(self._replace)
        walk.visit(value)
        return walk.digest()


def _slots(kind: type) -> Iterable[str]:
    slots = kind.__dict__.get("__slots__", ())
    return [s for s in ([slots] if isinstance(slots, str) else slots) if s not in ("__dict__", "__weakref__")]


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return None
