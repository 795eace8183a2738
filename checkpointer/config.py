"""Triggers, rules and names as plain data for YAML, and back, with errors that say where the bad value stands."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import Any, Final

import attrs

from checkpointer.errors import CheckpointerError, PolicyError
from checkpointer.naming import Naming
from checkpointer.ranking import Metric
from checkpointer.retention import Budget, KeepAll, KeepBest, KeepEvery, KeepLast
from checkpointer.triggers import AnyOf, AtSteps, EveryEpochs, EverySeconds, EverySteps

__all__ = ["from_plain", "mapping", "naming_from_plain", "suggest", "to_plain"]

_TYPES: Final[dict[str, Any]] = {
    cls.__name__: cls
    for cls in (
        *(EverySteps, EveryEpochs, EverySeconds, AtSteps, AnyOf),
        *(KeepBest, KeepLast, KeepEvery, KeepAll, Budget),
    )
}


def to_plain(value: Any) -> Any:
    """Return a trigger, rule or limit as ``{"ClassName": arguments}``, defaults left out."""
    if not attrs.has(type(value)):
        msg = f"{value!r} cannot be written as YAML; make its class an attrs class"
        raise PolicyError(msg)
    return {type(value).__name__: _arguments(value)}


def _arguments(value: Any) -> Any:
    if isinstance(value, AtSteps):
        return list(value.steps)
    if isinstance(value, AnyOf):
        return [to_plain(trigger) for trigger in value.triggers]
    plain = {}
    for field in attrs.fields(type(value)):
        item = getattr(value, field.name)
        if isinstance(item, Metric):
            plain["metric"] = item.name if isinstance(item.key, str) else {"score": item.name}
            plain |= {"mode": item.mode} | ({"ties": item.ties} if item.ties != "older" else {})
        elif field.init and item != _default(type(value), field.name):
            plain[field.name] = item
    return plain


def _default(cls: type, name: str) -> Any:
    return inspect.signature(cls).parameters[name].default


def from_plain(data: object, where: str, known: Mapping[str, Any]) -> Any:
    """Build what `to_plain` wrote. ``known`` adds the user's own classes and named scores."""
    types = _TYPES | {name: value for name, value in known.items() if isinstance(value, type)}
    if isinstance(data, str):
        data = {data: {}}
    if not isinstance(data, dict) or len(data) != 1:
        msg = f"in {where!r}: expected one name with its arguments, such as 'KeepLast: {{n: 1}}'; found {data!r:.80}"
        raise PolicyError(msg)
    name, arguments = next(iter(data.items()))
    if name not in types:
        msg = f"in {where!r}: {name!r} is not known{suggest(name, types)}; pass your own class as known={{...}}"
        raise PolicyError(msg)
    return _build(types[name], arguments, f"{where}.{name}", known)


def _build(cls: Any, arguments: Any, where: str, known: Mapping[str, Any]) -> Any:
    if arguments is None:
        arguments = {}
    if cls is AnyOf or cls is AtSteps:
        if not isinstance(arguments, list):
            msg = f"in {where!r}: expected a list, found {arguments!r:.80}"
            raise PolicyError(msg)
        if cls is AnyOf:
            arguments = [from_plain(item, f"{where}[{i}]", known) for i, item in enumerate(arguments)]
        return _call(cls, where, *arguments)
    arguments = dict(mapping(cls, arguments, where))
    metric = arguments.get("metric")
    if cls is KeepBest and isinstance(metric, dict):
        arguments["metric"] = _score(metric, f"{where}.metric", known)
    return _call(cls, where, **arguments)


def _score(data: Mapping[str, Any], where: str, known: Mapping[str, Any]) -> Any:
    """Return the function that ``{"score": name}`` stands for: a file cannot say where to import it from."""
    name = data.get("score")
    if list(data) == ["score"] and isinstance(name, str) and callable(known.get(name)):
        return known[name]
    msg = f"in {where!r}: {dict(data)!r:.80} names no score function; pass it as known={{{name!r}: function}}"
    raise PolicyError(msg)


def naming_from_plain(data: object, where: str) -> Naming:
    """Build a `Naming` from a template or a mapping of its settings."""
    if data is None or isinstance(data, str):
        data = {"template": data}
    naming: Naming = _call(Naming, where, **mapping(Naming, data, where))
    return naming


def mapping(cls: Any, data: object, where: str) -> Mapping[str, Any]:
    """Return ``data`` if it is a mapping that has what ``cls`` needs, and nothing it does not take."""
    if not isinstance(data, dict):
        msg = f"in {where!r}: expected a mapping, found {data!r:.80}"
        raise PolicyError(msg)
    parameters = inspect.signature(cls).parameters
    for key in data:
        if key not in parameters:
            msg = f"in '{where}.{key}': {cls.__name__} has no {key!r}{suggest(key, parameters)}"
            raise PolicyError(msg)
    for key, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and key not in data:
            msg = f"in {where!r}: {key!r} is missing; {cls.__name__} takes {', '.join(parameters)}"
            raise PolicyError(msg)
    return data


def suggest(word: object, known: Mapping[str, Any]) -> str:
    """Return a hint: the closest of the known words, or all of them."""
    close = difflib.get_close_matches(str(word), known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else f" (known: {', '.join(known)})"


def _call(cls: Any, where: str, *args: Any, **kwargs: Any) -> Any:
    try:
        return cls(*args, **kwargs)
    except (CheckpointerError, TypeError, AttributeError) as error:
        msg = f"in {where!r}: {error}"
        raise PolicyError(msg) from error
