"""Triggers, rules and names as plain data for YAML, and back, with errors that say where the bad value stands."""

from __future__ import annotations

import difflib
import inspect
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, Final

import attrs
import yaml

from checkpointer.errors import CheckpointerError, PolicyError
from checkpointer.policy.naming import Naming
from checkpointer.policy.ranking import Metric
from checkpointer.policy.retention import Budget, KeepAll, KeepBest, KeepEvery, KeepLast
from checkpointer.policy.triggers import AnyOf, AtSteps, DuringEpochs, EveryEpochs, EverySeconds, EverySteps

MAX_YAML_BYTES: Final = 1 << 18
MAX_VALUES: Final = 50_000
MAX_DEPTH: Final = 32
MAX_TEXT: Final = 1000
"""Characters of one key or value."""

_TYPES: Final[dict[str, Any]] = {
    cls.__name__: cls
    for cls in (
        *(EverySteps, EveryEpochs, DuringEpochs, EverySeconds, AtSteps, AnyOf),
        *(KeepBest, KeepLast, KeepEvery, KeepAll, Budget),
    )
}


def parse_yaml(data: bytes) -> Any:
    """Parse YAML as plain data, with bounds on what it says and on what it expands to; failures are `PolicyError`.

    A few lines whose aliases refer to aliases stand for billions of values: they are counted before they are built.
    """
    if len(data) > MAX_YAML_BYTES:
        msg = f"the policy has more than {MAX_YAML_BYTES} bytes; a file of triggers and rules is far smaller"
        raise PolicyError(msg)
    try:
        loader = yaml.SafeLoader(data.decode())
        node = loader.get_single_node()
        if node is None:
            return None
        _check_node(node, iter(range(MAX_VALUES)))
        return loader.construct_document(node)
    except PolicyError:
        raise
    except Exception as error:  # Odd scalars fail anywhere in it: ValueError for a 99th month, IndexError for !!int ''.
        msg = f"the policy is not valid YAML: {error}"
        raise PolicyError(msg) from error


def _check_node(node: Any, values: Iterator[int], depth: int = MAX_DEPTH) -> None:
    if next(values, None) is None:
        msg = f"the policy stands for more than {MAX_VALUES} values; write each trigger and rule out"
        raise PolicyError(msg)
    if not depth:
        msg = "the policy refers to itself or is nested too deeply; write each trigger and rule out"
        raise PolicyError(msg)
    if isinstance(node, yaml.ScalarNode):
        if len(node.value) > MAX_TEXT:
            msg = f"the policy has a text of {len(node.value)} characters: {node.value[:20]!r}...; at most {MAX_TEXT}"
            raise PolicyError(msg)
        return
    children = node.value
    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in children if isinstance(key, yaml.ScalarNode)]
        if len(keys) != len(set(keys)):
            ((twice, _),) = Counter(keys).most_common(1)
            msg = f"the policy is not valid YAML: the key {twice!r} stands in one mapping twice"
            raise PolicyError(msg)
        children = [child for pair in children for child in pair]
    for child in children:
        _check_node(child, values, depth - 1)


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
    plain, parameters = {}, inspect.signature(type(value)).parameters
    for field in attrs.fields(type(value)):
        item = getattr(value, field.name)
        if isinstance(item, Metric):
            plain["metric"] = item.name if isinstance(item.key, str) else {"score": item.name}
            plain |= {"mode": item.mode} | ({"ties": item.ties} if item.ties != "older" else {})
        elif field.init and item != parameters[field.name].default:
            plain[field.name] = item
    return plain


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


def suggest(name: object, known: Mapping[str, Any]) -> str:
    """Return a hint: the closest of the known names, or all of them."""
    close = difflib.get_close_matches(str(name), known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else f" (known: {', '.join(known)})"


def _call(cls: Any, where: str, *args: Any, **kwargs: Any) -> Any:
    try:
        return cls(*args, **kwargs)
    except (CheckpointerError, TypeError, ValueError, OverflowError, AttributeError) as error:
        msg = f"in {where!r}: {error}"
        raise PolicyError(msg) from error
