"""Names: a template parsed once, filled from an observation, made unique by a version counter."""

from __future__ import annotations

import math
import re
import string
from bisect import bisect_left
from collections.abc import Container, Mapping
from itertools import chain
from typing import Any, Final, Literal

import attrs

from checkpointer._validation import one_of, whole_number
from checkpointer.errors import NamingError
from checkpointer.records.names import MAX_PART_BYTES, check_name

DEFAULT_EXTENSION: Final = ".ckpt"

_HOSTILE: Final = re.compile(r'[/\\:*?"<>|\x00-\x1f]')
_HUGE: Final = 1e100
_FEW_VERSIONS: Final = 100
_OWN_EXTENSION: Final = re.compile(r"(?<=[^./])(?:\.[A-Za-z]\w*){1,2}$", re.ASCII)
"""What a template ends with if it has an extension of its own: one suffix such as ``.pt``, or two."""
_BUILTIN: Final = ("epoch", "step")


@attrs.frozen
class _Field:
    key: str
    spec: str

    def format(self, value: float) -> str:
        # A loss that explodes must not end the run because its hundreds of digits make no file name.
        if _HUGE <= abs(value) < math.inf:
            return f"{value:.6g}"
        # An int spec such as 'd' is for whole numbers, and metrics are floats: 3.0 may be written as 3.
        if self.spec[-1:] in tuple("bcdoxX") and float(value).is_integer():
            value = int(value)
        try:
            return format(value, self.spec)
        except (ValueError, OverflowError) as error:
            msg = f"{{{self.key}:{self.spec}}} cannot format {value!r} ({error}); change the format spec"
            raise NamingError(msg) from error


@attrs.frozen
class _Part:
    """What stands between two separators; left out as a whole when a metric in it is not there yet."""

    separator: str
    pieces: tuple[str | _Field, ...]

    @property
    def fields(self) -> list[_Field]:
        return [piece for piece in self.pieces if isinstance(piece, _Field)]


def _parse(template: str, join: str) -> tuple[_Part, ...]:
    separators = re.compile("(" + "|".join(re.escape(sep) for sep in {join, "/"} if sep) + ")")
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        msg = f"the template {template!r} cannot be parsed ({error}); write a literal brace as '{{{{' or '}}}}'"
        raise NamingError(msg) from error
    parts: list[tuple[str, list[str | _Field]]] = [("", [])]
    for literal, key, spec, conversion in parsed:
        for text in filter(None, separators.split(literal)):
            if text in (join, "/"):
                parts.append((text, []))
            else:
                parts[-1][1].append(text)
        if key is not None:
            parts[-1][1].append(_field(template, key, spec or "", conversion))
    return tuple(_Part(separator, tuple(pieces)) for separator, pieces in parts)


def _field(template: str, key: str, spec: str, conversion: str | None) -> _Field:
    if not key or conversion or "{" in spec:
        msg = f"the template {template!r} has a field that is not {{name}} or {{name:format}}; name a metric"
        raise NamingError(msg)
    if re.search(r"\d{4}", spec):
        msg = f"the template {template!r} has {spec!r}; a name has at most {MAX_PART_BYTES} bytes: ask for fewer"
        raise NamingError(msg)
    for sample in (1, 1.5):
        try:
            format(sample, spec)
        except ValueError:
            continue
        return _Field(key, spec)
    msg = f"the template {template!r} has {spec!r}, which is not a number format; use one such as '.3f' or '02d'"
    raise NamingError(msg)


def fixed_parts(template: str, join: str = "-") -> str:
    """Return what of a template, such as ``{epoch}-last``, is the same for every checkpoint; empty if nothing is."""
    parts = [part for part in _parse(template, join) if not part.fields]
    texts = [(part.separator, "".join(map(str, part.pieces))) for part in parts]
    return "".join(separator + text for separator, text in texts)[len(texts[0][0]) :] if texts else ""


def _as_alias(value: str) -> str:
    if "{" in value or "}" in value:
        msg = f"the alias name {value!r} holds a brace; an alias is a fixed name, such as 'last'"
        raise NamingError(msg)
    return check_name(value)


@attrs.frozen
class Naming:
    """How checkpoints are named.

    Args:
        template: Fields are ``{epoch}``, ``{step}`` and any metric, with a format spec if wanted; None means
            ``{epoch}-{step}``. A part (between two joins or slashes) whose metric is not there yet is left out.
        auto_insert: Write ``name=value`` for a field instead of the value alone.
        join: Stands between parts and before a version.
        equals: Stands between name and value.
        extension: With its dot; empty for none; None takes what the template ends with (``{epoch}.keras``,
            ``{epoch}.weights.h5``), or else the payload format's own (``.ckpt`` for the torch file).
        last: Name of the ``last`` alias, without extension.
        best: Name of the ``best`` alias, without extension.
        first_version: Number of the first suffix when a name is taken: ``-v1``.
        version_counter: If off, a checkpoint that has the same name is replaced (old or new, never neither), whether
            this run wrote it or an earlier one. It is not replaced if it is pinned, was resumed from, is an abandoned
            one of this run, or belongs to a manager of another label. A file without a record is never replaced.
        missing: What to do with a field that was not reported. ``"error"`` raises a `NamingError`, ``"zero"`` writes 0,
            as Lightning does. If a rule names the metric, it may be reported later. Then the part is left out of the
            name, with both settings.
        rescue: ``"own"`` names a rescue ``rescue-step=N``. ``"template"`` names a rescue as a regular checkpoint. If
            that name is taken, the rescue is named ``rescue-step=N``.
        slashes: ``"replace"`` makes ``val/loss`` in a name ``val_loss``; ``"keep"`` makes folders of it. A slash
            that the template itself has outside a field always makes a folder.

    Raises:
        NamingError: If the template cannot be parsed or a name would leave the directory.

    Example:
        >>> from checkpointer import Naming
        >>> Naming("{epoch:02d}-{val/loss:.3f}").stem({"val/loss": 0.31}, step=400, epoch=3)
        'epoch=03-val_loss=0.310'
        >>> Naming("{epoch:02d}.weights.h5").last_file
        'last.weights.h5'
    """

    template: str | None = None
    auto_insert: bool = attrs.field(default=True, kw_only=True)
    join: str = attrs.field(default="-", kw_only=True)
    equals: str = attrs.field(default="=", kw_only=True)
    extension: str | None = attrs.field(default=None, kw_only=True)
    last: str = attrs.field(default="last", converter=_as_alias, kw_only=True)
    best: str = attrs.field(default="best", converter=_as_alias, kw_only=True)
    first_version: int = attrs.field(default=1, validator=whole_number(0), kw_only=True)
    version_counter: bool = attrs.field(default=True, kw_only=True)
    missing: Literal["error", "zero"] = attrs.field(default="error", validator=one_of("error", "zero"), kw_only=True)
    rescue: Literal["own", "template"] = attrs.field(default="own", validator=one_of("own", "template"), kw_only=True)
    slashes: Literal["replace", "keep"] = attrs.field(
        default="replace", validator=one_of("replace", "keep"), kw_only=True
    )
    _parts: tuple[_Part, ...] = attrs.field(init=False, repr=False, eq=False)

    def __attrs_post_init__(self) -> None:
        template = f"{{epoch}}{self.join}{{step}}" if self.template is None else self.template
        if not isinstance(template, str) or not template:
            msg = f"the template is {template!r}; expected text such as '{{epoch}}-{{step}}'"
            raise NamingError(msg)
        own = _OWN_EXTENSION.search(template) if self.extension is None else None
        if own is not None:
            template = template[: own.start()]
            object.__setattr__(self, "template", template)
            object.__setattr__(self, "extension", own[0])
        object.__setattr__(self, "_parts", _parse(template, self.join))
        if self.extension and not self.extension.startswith("."):
            msg = f"the extension {self.extension!r} has no dot; write it as {'.' + self.extension!r}"
            raise NamingError(msg)
        literal = re.sub(r"\{[^}]*\}", "x", template)
        check_name(literal)

    @property
    def suffix(self) -> str:
        """The extension in force."""
        return DEFAULT_EXTENSION if self.extension is None else self.extension

    @property
    def last_file(self) -> str:
        """File name of the ``last`` alias."""
        return self.last + self.suffix

    @property
    def best_file(self) -> str:
        """File name of the ``best`` alias."""
        return self.best + self.suffix

    @property
    def keys(self) -> tuple[str, ...]:
        """The metrics the template asks for, in order."""
        return tuple(field.key for part in self._parts for field in part.fields if field.key not in _BUILTIN)

    def stem(self, metrics: Mapping[str, float], *, step: int, epoch: int, known: Container[str] = ()) -> str:
        """Fill the template.

        Args:
            metrics: What was reported at this step.
            step: Finished optimizer steps.
            epoch: 0-based index of the epoch.
            known: Metric names that are right although they may not be there yet.

        Raises:
            NamingError: If a field is neither reported nor known, or the result cannot be a name.
        """
        values: dict[str, float] = {"epoch": epoch, "step": step, **metrics}
        rendered = [(part.separator, self._render(part, values, known)) for part in self._parts]
        present = [(separator, text) for separator, text in rendered if text is not None]
        if not present:
            return Naming(join=self.join, equals=self.equals).stem({}, step=step, epoch=epoch)
        return check_name(present[0][1] + "".join(separator + text for separator, text in present[1:]))

    def _render(self, part: _Part, values: Mapping[str, float], known: Container[str]) -> str | None:
        if self.missing == "zero":
            values = {field.key: 0 for field in part.fields if field.key not in known} | dict(values)
        absent = [field.key for field in part.fields if field.key not in values]
        for key in absent:
            if key not in known:
                msg = (
                    f"the template {self.template!r} asks for {key!r}, which was not reported "
                    f"(have: {', '.join(sorted(values))}); fix the name, or name it in a rule if it comes later"
                )
                raise NamingError(msg)
        if absent:
            return None
        return "".join(piece if isinstance(piece, str) else self._fill(piece, values) for piece in part.pieces)

    def _fill(self, field: _Field, values: Mapping[str, float]) -> str:
        value: Any = values[field.key]
        if field.key in _BUILTIN and math.isfinite(value):
            value = int(value)
        text = field.format(value)
        if not self.auto_insert:
            return text
        key = field.key if self.slashes == "keep" else _HOSTILE.sub("_", field.key)
        return f"{key}{self.equals}{text}"

    def free_name(self, stem: str, taken: Container[str], *, replaceable: Container[str] = ()) -> str:
        """Return the first file name for ``stem`` that is free or may be replaced.

        Looks names up in ``taken`` and asks no storage. If the first hundred versions are taken, the next ones are
        looked for in strides: then it is one that comes after a taken one, and there may be a lower one that is free.
        """

        def versioned(version: int) -> str:
            return check_name(f"{stem}{self.join}v{version}{self.suffix}")

        def is_free(name: str) -> bool:
            return name not in taken or name in replaceable

        few = range(self.first_version, self.first_version + _FEW_VERSIONS)
        for name in chain((check_name(stem + self.suffix),), map(versioned, few)):
            if is_free(name):
                return name
        last, stride = few[-1], 1
        while not is_free(versioned(last + stride)):
            last, stride = last + stride, stride * 2
        between = range(last + 1, last + stride)
        return versioned(last + 1 + bisect_left(between, True, key=lambda version: is_free(versioned(version))))
