"""Reads a policy file for commands: each error has the line it stands on. Also has a file to begin with."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final

import attrs
import yaml

from checkpointer.errors import PolicyError
from checkpointer.policy import yaml_codec as config
from checkpointer.policy.policy import Policy

_PLACE: Final = re.compile(r"in '([^']*)': ")
_STEP: Final = re.compile(r"\[(\d+)\]|([^.\[\]]+)")

START: Final = """\
# When to save. One trigger, or several in AnyOf.
when:
  AnyOf:
  - EveryEpochs: {n: 1}
  # - EverySteps: {n: 1000}
  # - EverySeconds: {seconds: 1800}
  # - AtSteps: [100, 1000]

# What to keep. A checkpoint stays while one of the rules keeps it.
keep:
- KeepBest: {k: 3, metric: val_loss, mode: min}
- KeepLast: {n: 2}
# - KeepEvery: {epochs: 10}
# - KeepAll
# - Budget: {bytes: 200000000000}   # a limit: drops what rules keep, but never the newest or the best

# How to name. The fields are step, epoch and each metric.
# name: "{epoch}-{step}-{val_loss:.3f}"

# A name for the newest checkpoint, and one for the best: a link, or a copy.
last: link
# best: link
"""
"""A policy file with the usual triggers and rules, some of them as comments."""


@attrs.frozen
class Problem:
    """One thing that is wrong with a policy file."""

    text: str
    line: int = 0
    """The line it stands on, from 1; 0 if it is about the whole file."""

    def __str__(self) -> str:
        return f"line {self.line}: {self.text}" if self.line else self.text


def check_policy(data: bytes) -> tuple[Policy | None, list[Problem]]:
    r"""Return the policy that a file says, or all that is wrong with it.

    Args:
        data: The bytes of the file.

    Example:
        >>> policy, problems = check_policy(b"when: {EverySteps: {n: 0}}\nkeep:\n- KeepLats\n")
        >>> for problem in problems:
        ...     print(problem)
        line 1: in 'when.EverySteps': EverySteps.n is 0; expected a whole number of at least 1
        line 3: in 'keep[0]': 'KeepLats' is not known (did you mean 'KeepLast'?); pass your own class as known={...}
    """
    try:
        plain = config.parse_yaml(data)
        root = yaml.compose(data.decode(), Loader=yaml.SafeLoader)
    except PolicyError as error:
        mark = getattr(error.__cause__, "problem_mark", None)  # Only errors of the YAML parser have one.
        return None, [Problem(_one_line(str(error)), 0 if mark is None else mark.line + 1)]
    problems = sorted((Problem(text, _line_of(root, text)) for text in _problems(plain)), key=lambda one: one.line)
    if problems:
        return None, problems
    try:
        return Policy.from_yaml(data.decode() + "\n"), []
    except PolicyError as error:
        return None, [Problem(str(error), _line_of(root, str(error)))]


def _problems(plain: Any) -> list[str]:
    """Return the errors of the parts of a policy, each part for itself."""
    found: list[str] = []

    def attempt(call: Callable[..., object], *values: Any) -> None:
        try:
            call(*values)
        except PolicyError as error:
            found.append(str(error))

    attempt(config.mapping, Policy, plain, "policy")
    if not isinstance(plain, dict):
        return found
    if "when" in plain:
        attempt(config.from_plain, plain["when"], "when", {})
    keep = plain.get("keep", [])
    for number, rule in enumerate(keep if isinstance(keep, list) else ()):
        attempt(config.from_plain, rule, f"keep[{number}]", {})
    attempt(config.naming_from_plain, plain.get("name"), "name")
    return found


def _line_of(root: Any, text: str) -> int:
    """Return the line of the place that a message names, or of the innermost part of it that exists."""
    match = _PLACE.match(text)
    node = root
    if match is None or node is None:
        return 0
    line: int = node.start_mark.line + 1
    for step in _STEP.finditer(match[1].removeprefix("policy.").removeprefix("policy")):
        number, key = step[1], step[2]
        if number is not None and isinstance(node, yaml.SequenceNode) and int(number) < len(node.value):
            node = node.value[int(number)]
        elif isinstance(node, yaml.MappingNode):
            pairs = [pair for pair in node.value if pair[0].value == key]
            if not pairs:
                break
            line, node = pairs[0][0].start_mark.line + 1, pairs[0][1]
            continue
        else:
            break
        line = node.start_mark.line + 1
    return line


def _one_line(text: str) -> str:
    """Return a message of the YAML parser, which draws the place over several lines, as one line."""
    lines = [line.strip() for line in text.splitlines()]
    return "; ".join(line for line in lines if "policy" in line or (line and not line.startswith(("in ", "^"))))
