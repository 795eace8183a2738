"""JSON that comes from storage: parsed with bounds, and read value by value, with the place of each bad one."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, Final, NoReturn, TypeGuard

from checkpointer._validation import brief
from checkpointer.errors import RecordError
from checkpointer.records.digest_algorithms import DIGESTS, OF_FILES
from checkpointer.records.names import has_surrogate, name_problem

MAX_RECORD_BYTES: Final = 1 << 20
"""A record larger than this (bytes) is refused unread: no honest one comes near it."""

MAX_TIME: Final = 1 << 35
"""Seconds before and after 1970 of each time: some systems have no date for later ones than this, in the year 3058."""

MAX_DEPTH: Final = 8
"""Objects and lists within one another: a record file has four, more are refused."""

_MISSING: Final = object()
_NON_FINITE: Final = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_HEX: Final = re.compile(r"[0-9a-f]{1,128}")
_DIGEST: Final = re.compile(r"([a-z0-9-]+):([0-9a-f]+)")
METADATA: Final = ".metadata"
"""The file of a DCP folder that has the digest of each shard."""
_HEX_DIGITS: Final = {name: 2 * new().digest_size for name, new in DIGESTS.items()}


def to_json(data: Mapping[str, Any]) -> bytes:
    """Return a record file's bytes."""
    return json.dumps(data, ensure_ascii=False, indent=1, allow_nan=False).encode()


def parse_json(data: bytes, where: str, limit: int = MAX_RECORD_BYTES) -> Any:
    """Parse JSON from storage with bounds on size and depth; any failure is a `RecordError`.

    Two readers must not see two things in one file: a key given twice, and NaN, are refused.
    """
    if len(data) > limit:
        msg = f"{where} is {len(data)} bytes; at most {limit} are read"
        raise RecordError(msg)
    try:
        value = json.loads(data, object_pairs_hook=object_once, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        msg = f"{where} is not valid JSON ({error}); it was cut short or is not a record"
        raise RecordError(msg) from error
    nested: list[Any] = [[value]]
    for _ in range(MAX_DEPTH + 1):
        nested = [
            child
            for node in nested
            for child in (node.values() if type(node) is dict else node)
            if type(child) in (dict, list)
        ]
        if not nested:
            return value
    msg = f"{where} has objects or lists more than {MAX_DEPTH} deep; it is not a record"
    raise RecordError(msg)


def object_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object; raise `ValueError` if it has a key twice: two readers would see two things in it."""
    data = dict(pairs)
    if len(data) != len(pairs):
        ((name, _),) = Counter(name for name, _ in pairs).most_common(1)
        msg = f"the key {brief(name)} stands there twice"
        raise ValueError(msg)
    return data


def _no_constant(text: str) -> NoReturn:
    msg = f"{text} is not a number"
    raise ValueError(msg)


def as_number(value: object) -> float | None:
    """Return a number as a float; None if it is not a number, or too large for one."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def _is_whole(value: object) -> TypeGuard[int]:
    # Beyond 64 bits lie numbers with thousands of digits, which Python reads but will not write.
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _is_fork(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_whole, value))


def _is_file(item: tuple[str, object]) -> bool:
    inside, value = item
    if has_surrogate(inside) or name_problem(inside) or not isinstance(value, list) or len(value) != 2:
        return False
    return _is_whole(value[0]) and isinstance(value[1], str) and bool(_HEX.fullmatch(value[1]))


def to_plain_float(value: float) -> float | str:
    """Return a number as JSON may hold it: one that is not finite as text."""
    return value if math.isfinite(value) else repr(value)


class Reader:
    """Typed reads from untrusted plain data; every error carries the path of the value."""

    def __init__(self, data: object, where: str) -> None:
        if not isinstance(data, dict):
            msg = f"{where}: expected an object, found {type(data).__name__}"
            raise RecordError(msg)
        self._data = data
        self._where = where

    def raw(self, key: str, default: Any = _MISSING) -> Any:
        """Return the value as it is."""
        value = self._data.get(key, default)
        if value is _MISSING:
            raise self.bad(key, "a value")
        return value

    def bad(self, key: str, expected: str) -> RecordError:
        """Return the error for a value that is not what was expected, or is missing."""
        found = f"is {brief(self._data[key])}; expected {expected}" if key in self._data else "is missing"
        return RecordError(f"{self._where}: {key!r} {found}")

    def text(self, key: str, default: str | None = None) -> str:
        """Return text that can be encoded."""
        value = self._data.get(key, default)
        if isinstance(value, str) and (value.isascii() or not has_surrogate(value)):
            return value
        raise self.bad(key, "text")

    def whole(self, key: str, default: int | None = None) -> int:
        """Return a whole number of at least 0 that fits into 63 bits."""
        value = self._data.get(key, default)
        if _is_whole(value):
            return value
        raise self.bad(key, "a whole number of at least 0, and below 2**63")

    def time(self, key: str) -> float:
        """Return seconds since the Unix epoch."""
        number = as_number(self._data.get(key))
        if number is not None and abs(number) < MAX_TIME:
            return number
        raise self.bad(key, "a number of seconds since 1970, before the year 3058")

    def flag(self, key: str) -> bool:
        """Return true or false."""
        value = self._data.get(key)
        if isinstance(value, bool):
            return value
        raise self.bad(key, "true or false")

    def choice(self, key: str, choices: tuple[str, ...]) -> Any:
        """Return one of the choices."""
        value = self._data.get(key)
        if value in choices:
            return value
        raise self.bad(key, " or ".join(map(repr, choices)))

    def payload_name(self, key: str) -> str:
        """Return a name that stays inside the directory."""
        value = self.text(key)
        # A record comes from storage that others may write to: its name must not lead out of the directory.
        if problem := name_problem(value):
            raise self.bad(key, problem)
        return value

    def digest(self, key: str) -> str:
        """Return a digest by a known algorithm."""
        value = self.text(key)
        match = _DIGEST.fullmatch(value)
        if match is None:
            raise self.bad(key, "'algorithm:hex'")
        algorithm = match[1].removeprefix(OF_FILES)
        if algorithm not in DIGESTS:
            known = " or ".join(DIGESTS)
            raise self.bad(key, f"one by {known}; a newer version of torch-checkpointer wrote it, so upgrade")
        if len(match[2]) != _HEX_DIGITS[algorithm]:
            raise self.bad(key, f"{_HEX_DIGITS[algorithm]} hex digits")
        return value

    def files(self, key: str) -> dict[str, tuple[int, str]]:
        """Return sizes (bytes) and digests (hex digits) by the path of a file inside its folder; empty if missing."""
        files = self._data.get(key, {})
        if not isinstance(files, dict) or not all(map(_is_file, files.items())):
            raise self.bad(key, "an object of [size, hex digits] by the paths of files")
        return {inside: (size, digits) for inside, (size, digits) in files.items()}

    def metrics(self, key: str) -> dict[str, float]:
        """Return numbers by name, NaN and infinities included."""
        value = self._data.get(key)
        if not isinstance(value, dict):
            raise self.bad(key, "an object of numbers")
        if any(map(has_surrogate, value)):
            raise self.bad(key, "names that can be encoded")
        numbers = {}
        for name, item in value.items():
            number = _NON_FINITE.get(item) if isinstance(item, str) else as_number(item)
            if number is None:
                msg = f"{self._where}: '{key}[{brief(name)}]' is {brief(item)}; expected a number"
                raise RecordError(msg)
            numbers[name] = number
        return numbers

    def line(self, key: str) -> tuple[tuple[int, int], ...]:
        """Return forks as ``(fork, step)``."""
        forks = self._data.get(key)
        if isinstance(forks, list) and all(map(_is_fork, forks)):
            return tuple((number, step) for number, step in forks)
        raise self.bad(key, "a list of [fork, step]")
