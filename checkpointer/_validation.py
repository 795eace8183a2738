"""Validators shared by the frozen values: each names the field, the value and what was expected."""

from __future__ import annotations

import math
import operator
import reprlib
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Final

import attrs

from checkpointer.errors import ObservationError, PolicyError

MAX_BRIEF: Final = 160

_brief: Final = reprlib.Repr()
_brief.maxlevel = 2
_brief.maxstring = _brief.maxother = 80


def brief(value: object) -> str:
    """Return the start of a value's repr, for messages about data of others: short and soon, whatever it holds.

    A plain repr of a few kilobytes of YAML can take forever (lists that share lists), and one of a huge number fails.
    """
    try:
        return _brief.repr(value)[:MAX_BRIEF]
    except (ValueError, RecursionError):
        return f"a huge {type(value).__name__}"


def whole_number(minimum: int) -> Any:
    """An attrs validator: an ``int`` (not a ``bool``) of at least ``minimum``."""

    def check(instance: object, field: attrs.Attribute[Any], value: object) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            expected = f"expected a whole number of at least {minimum}"
            msg = f"{type(instance).__name__}.{field.name} is {brief(value)}; {expected}"
            raise PolicyError(msg)

    return check


def as_seconds(value: Any, what: str, *, above_zero: bool = False) -> float:
    """Return seconds or a ``timedelta`` as seconds: finite and at least 0, or above zero and any."""
    seconds = value.total_seconds() if isinstance(value, timedelta) else value
    is_number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
    if is_number and (seconds > 0 if above_zero else 0 <= seconds < math.inf):
        return float(seconds)
    expected = "more than 0" if above_zero else "seconds of at least 0"
    msg = f"{what} is {brief(seconds)}; expected {expected}, or a timedelta"
    raise PolicyError(msg)


def one_of(*allowed: object) -> Any:
    """An attrs validator: the value is one of ``allowed``."""

    def check(instance: object, field: attrs.Attribute[Any], value: object) -> None:
        if not any(value is choice or (type(value) is type(choice) and value == choice) for choice in allowed):
            choices = " or ".join(repr(choice) for choice in allowed)
            msg = f"{type(instance).__name__}.{field.name} is {brief(value)}; expected {choices}"
            raise PolicyError(msg)

    return check


def named_function(instance: object, field: attrs.Attribute[Any], value: Any) -> None:
    """An attrs validator: the value is a function with a name of its own."""
    if not callable(value) or getattr(value, "__name__", "<lambda>") == "<lambda>":
        msg = f"{type(instance).__name__}.{field.name} is {brief(value)}; expected a function made with def"
        raise PolicyError(msg)


def ask(predicate: Callable[[Any], object], about: Any) -> bool:
    """Return whether a function of the user says so; raise an `ObservationError` if it fails."""
    try:
        return bool(predicate(about))
    except Exception as error:
        msg = f"{predicate.__name__} failed on {getattr(about, 'name', brief(about))}: {error!r}; fix the function"
        raise ObservationError(msg) from error


def check_function(value: Any, what: str, error: type[Exception]) -> None:
    """Raise if ``value`` is the state itself, or an object that has one, instead of a function that is called."""
    if value is not None and (not callable(value) or hasattr(value, "state_dict")):
        msg = (
            f"{what} is of type {type(value).__name__}; expected a function that is called at each save, such as "
            'state=lambda: {"model": model.state_dict()}'
        )
        raise error(msg)


def as_index(value: Any, what: str, error: type[Exception]) -> int:
    """Return ``value`` as a non-negative ``int``; numpy and 0-d torch integers are welcome."""
    try:
        number = operator.index(value)
    except TypeError:
        msg = f"{what} is {value!r} ({type(value).__name__}); expected a whole number"
        raise error(msg) from None
    if isinstance(value, bool) or number < 0:
        msg = f"{what} is {value!r}; expected a whole number of at least 0"
        raise error(msg)
    return number
