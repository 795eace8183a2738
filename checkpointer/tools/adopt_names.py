"""Reads the step, epoch and scores in the name of another program's file: pure functions of its path."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Final

import attrs

from checkpointer.errors import PolicyError

SUFFIXES: Final = (".pth.tar", ".ckpt", ".pt", ".pth", ".safetensors")
"""Extensions of files that may be a checkpoint by themselves."""
_COPIES: Final = frozenset({"best", "last", "latest", "newest", "final", "current"})
_PLAIN: Final = frozenset(
    {
        "model",
        "checkpoint",
        "ckpt",
        "chkpt",
        "weights",
        "state",
        "params",
        "net",
        "network",
        "snapshot",
        "epoch",
        "step",
    }
    | {"iter", "g", "d", "v"}
)
"""Parts of a name that do not say what is in the file."""
_NUMBER: Final = r"-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?"
_PAIR: Final = re.compile(rf"(?:^|[-_/])([A-Za-z][\w. ]*(?:/[A-Za-z][\w. ]*)*)=({_NUMBER})(?=[-_]|$)")
_PREFIX: Final = re.compile(r"(?:(?:best|last|model|checkpoint|ckpt|weights|net)_)+(?:\d+_)?")
"""What ignite writes before the name of a score: ``best_model_5_acc=0.9``."""
_OPEN_PAIR: Final = re.compile(r"=[^/=]*-[A-Za-z][\w. ]*")
"""The end of a folder that is the first half of a name, because the name of a metric has a slash."""
_FIELD: Final = re.compile(r"\{([^{}]*)\}")
COUNTERS: Final = ("step", "epoch", "epochs")
"""Fields of a pattern besides scores: ``epoch`` is an index from 0, and ``epochs`` counts the finished ones."""


def parts_of(name: str) -> frozenset[str]:
    """Return the runs of letters in a file name without its extension, in lower case."""
    return frozenset(part.lower() for part in re.findall(r"[A-Za-z]+", stem_of(name)))


def copy_of(name: str) -> frozenset[str]:
    """Return what calls the file a copy of another checkpoint (``best``, ``last``); empty if a part says otherwise."""
    parts = parts_of(_without_scores(name)) - _PLAIN
    return parts if parts <= _COPIES else frozenset()


def folder_of(name: str) -> str:
    """Return the folder of the training that wrote a file. A metric ``val/acc`` in a template makes no such folder."""
    folder = name.rpartition("/")[0]
    return folder_of(folder) if _OPEN_PAIR.search(folder.rpartition("/")[2]) else folder


def stem_of(name: str) -> str:
    """Return a name without the folder of its training, its extension, and the version that Lightning appends."""
    own = name[len(folder_of(name)) :].lstrip("/")
    suffix = next((suffix for suffix in SUFFIXES if own.endswith(suffix)), "")
    return re.sub(r"-v\d+$", "", own.removesuffix(suffix))


def texts_in(name: str) -> dict[str, str]:
    """Return what a file name says as ``name=value``."""
    return {key[len(_before(key)) :]: text for key, text in _PAIR.findall(stem_of(name))}


def _before(key: str) -> str:
    found = _PREFIX.match(key)
    return found[0] if found and found.end() < len(key) else ""


def _without_scores(name: str) -> str:
    return _PAIR.sub(lambda pair: _before(pair[1]), stem_of(name))


def numbers_in(name: str) -> dict[str, float]:
    """Return what a file name says as ``name=value``, and ``epoch`` or ``step`` with a number after it."""
    found = {key: float(text) for key, text in texts_in(name).items()}
    for key in ("epoch", "step", "iter"):
        match = re.search(rf"(?:^|[^A-Za-z]|(?<=global)){key}[-_]?(\d+)(?:$|[^\d.])", stem_of(name))
        if match and key not in found:
            found[key] = float(match[1])
    return found


def only_number_in(name: str) -> int | None:
    """Return the number of a name such as ``ckpt_1000``: the only one, beside parts that say nothing else."""
    if not numbers_in(name).keys().isdisjoint(("epoch", "step", "iter")):
        return None
    rest = _without_scores(name)
    numbers = re.findall(r"(?:^|(?<=[-_]))\d+(?=[-_]|$)", rest)
    is_plain = parts_of(rest) <= _PLAIN | _COPIES and len(re.findall(r"\d+", rest)) == 1
    return int(numbers[0]) if numbers and is_plain else None


def as_pattern(name: str) -> str:
    """Return the file name as a `Pattern`, with its only number as that of finished epochs."""
    own = name.rpartition("/")[2]
    scored = re.sub(rf"([A-Za-z]\w*)={_NUMBER}(?=[-_.])", lambda pair: _as_field(pair[1]), own)
    return re.sub(r"(?:^|(?<=[-_]))\d+(?=[-_.])", "{epochs}", scored, count=1)


def _as_field(key: str) -> str:
    score = key[len(_before(key)) :]
    return f"{key}={{{score}}}"


@attrs.frozen
class Pattern:
    """A pattern of one's own for names, such as ``model_{step}_{acc}.pt``."""

    text: str
    _compiled: re.Pattern[str] = attrs.field(eq=False, repr=False)
    _fields: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Read a pattern.

        Args:
            text: ``{step}``, ``{epoch}`` (counted from 0), ``{epochs}`` (how many are finished) and ``{NAME}`` for a
                score, between text that is literal. A format such as ``{acc:.2f}`` is allowed. With a slash it stands
                for the last parts of the path. Without an extension it stands for any.

        Raises:
            PolicyError: If it is not such a pattern.

        Example:
            >>> Pattern.parse("model_{step}_{acc}.pt").match("runs/model_20_0.75.pt")
            {'step': 20, 'acc': 0.75}
        """
        fields = tuple(field.partition(":")[0].strip() for field in _FIELD.findall(text))
        literals = _FIELD.split(text)[::2]
        if problem := _problem(fields, literals):
            msg = f"the pattern {text!r} {problem}; expected text and fields, such as 'model_{{step}}_{{acc}}.pt'"
            raise PolicyError(msg)
        parts = [re.escape(literals[0])]
        for field, literal in zip(fields, literals[1:], strict=True):
            parts.append((r"(\d+)" if field in COUNTERS else f"({_NUMBER})") + re.escape(literal))
        has_suffix = text.endswith(SUFFIXES)
        endings = "" if has_suffix else f"(?:{'|'.join(map(re.escape, SUFFIXES))})?"
        return cls(text, re.compile(rf"(?:^|.*/){''.join(parts)}{endings}"), fields)

    def match(self, name: str) -> dict[str, float] | None:
        """Return the number of each field; None if the name does not fit."""
        found = self._compiled.fullmatch(name)
        if found is None:
            return None
        texts = zip(self._fields, found.groups(), strict=True)
        return {field: int(text) if field in COUNTERS else float(text) for field, text in texts}


def _problem(fields: Collection[str], literals: list[str]) -> str:
    named = [field for field in fields if not re.fullmatch(r"[A-Za-z][\w./ -]*", field)]
    twice = [field for field in fields if list(fields).count(field) > 1]
    if any("{" in literal or "}" in literal for literal in literals):
        return "has a brace without its other half"
    if not fields:
        return "has no field"
    if named:
        return f"has a field without a name: {{{named[0]}}}"
    if twice:
        return f"has the field {{{twice[0]}}} twice"
    if {"epoch", "epochs"} <= {*fields}:
        return "has both {epoch} and {epochs}"
    if "" in literals[1:-1]:
        return "has two fields with no text between them, so it cannot say where the first one ends"
    return ""


def matches(
    patterns: Sequence[Pattern], names: Collection[str], adopted: Collection[str] = ()
) -> Mapping[str, Mapping[str, float]]:
    """Return what the first pattern that fits says of each name.

    Raises:
        PolicyError: If a pattern fits no name, not even one that was adopted before.
    """
    for pattern in patterns:
        if not any(pattern.match(name) is not None for name in (*names, *adopted)):
            there = ", ".join(sorted(names or adopted)[:4]) or "no file that could be adopted"
            msg = f"no name fits the pattern {pattern.text!r}; there are: {there}"
            raise PolicyError(msg)
    # Of several patterns that fit a name, the first one remains.
    return {name: said for one in reversed(patterns) for name in names if (said := one.match(name)) is not None}
