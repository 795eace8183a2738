"""Triggers, rules and names as plain data for YAML, and back, with errors that say where the bad value stands."""

from __future__ import annotations

import difflib
import inspect
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, Final

import attrs
import yaml

from checkpointer.errors import CheckpointerError, PolicyError
from checkpointer.policy import retention, triggers
from checkpointer.policy.naming import Naming
from checkpointer.policy.ranking import Metric
from checkpointer.policy.retention import KeepBest, KeepWhere
from checkpointer.policy.triggers import AnyOf, AtSteps, When

MAX_YAML_BYTES: Final = 1 << 18
MAX_VALUES: Final = 50_000
MAX_DEPTH: Final = 32
MAX_TEXT: Final = 1000
"""Characters of one key or value."""

_TYPES: Final[dict[str, Any]] = {
    cls.__name__: cls
    for cls in (
        *(triggers.EverySteps, triggers.EveryEpochs, triggers.DuringEpochs, triggers.EverySeconds, AtSteps),
        *(triggers.EveryCount, triggers.EveryFraction, triggers.OnImprovement, triggers.Continuous, When, AnyOf),
        *(KeepBest, retention.KeepLast, retention.KeepEvery, retention.KeepFor, KeepWhere, retention.KeepAll),
        retention.Budget,
    )
}


_INT: Final = re.compile(r"[-+]?(?:0x[0-9a-fA-F_]+|0o[0-7_]+|0b[01_]+|[0-9][0-9_]*)")
_FLOAT: Final = re.compile(
    r"[-+]?(?:\.[0-9][0-9_]*|[0-9][0-9_]*\.[0-9_]*|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
_NUMBERS: Final = {"tag:yaml.org,2002:int": _INT, "tag:yaml.org,2002:float": _FLOAT}


class _Loader(yaml.SafeLoader):
    """Reads numbers as YAML 1.2 does: ``010`` is 10, ``1e3`` is 1000, and ``1:30`` is text. YAML 1.1 has 8 and 90."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in found if tag not in _NUMBERS]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


class _Dumper(yaml.SafeDumper):
    """Quotes each text that some reader would take for a number."""


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = node.value.replace("_", "").lower()
    digits = text.lstrip("+-")
    number = int(digits, {"0x": 16, "0o": 8, "0b": 2}.get(digits[:2], 10))
    return -number if text.startswith("-") else number


for _tag, _pattern in _NUMBERS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_tag, re.compile(f"(?:{_pattern.pattern})$"), list("-+.0123456789"))
_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


def dump_yaml(data: object) -> str:
    """Return YAML that `parse_yaml` reads as the same data."""
    text: str = yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text


def parse_yaml(data: bytes) -> Any:
    """Parse YAML as plain data, with bounds on what it says and on what it expands to; failures are `PolicyError`.

    A few lines whose aliases refer to aliases stand for billions of values: they are counted before they are built.
    """
    if len(data) > MAX_YAML_BYTES:
        msg = f"the policy has more than {MAX_YAML_BYTES} bytes; a file of triggers and rules is far smaller"
        raise PolicyError(msg)
    try:
        loader = _Loader(data.decode())
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
        keys = Counter(key.value for key, _ in children if isinstance(key, yaml.ScalarNode))
        twice, count = next(iter(keys.most_common(1)), ("", 0))
        if count > 1:
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
            plain[field.name] = item.__name__ if field.name == "predicate" else item
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
    if cls is When or cls is KeepWhere:
        arguments["predicate"] = _function(arguments["predicate"], f"{where}.predicate", known)
    return _call(cls, where, **arguments)


def _score(data: Mapping[str, Any], where: str, known: Mapping[str, Any]) -> Any:
    """Return the function that ``{"score": name}`` stands for."""
    if list(data) == ["score"]:
        return _function(data["score"], where, known)
    msg = f"in {where!r}: expected a metric's name or {{score: name}}, found {dict(data)!r:.80}"
    raise PolicyError(msg)


def _function(name: object, where: str, known: Mapping[str, Any]) -> Any:
    """Return the function of that name: a file cannot say where to import it from."""
    if isinstance(name, str) and callable(known.get(name)):
        return known[name]
    msg = f"in {where!r}: {name!r:.80} is not a known function; pass it as known={{{name!r:.80}: function}}"
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
