"""Chooses and orders records by conditions such as ``val_loss<0.1`` and keys to sort by."""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import attrs

from checkpointer.errors import NotFoundError, PolicyError
from checkpointer.policy.yaml_codec import suggest
from checkpointer.records.record import Record

FIELDS: Final = ("name", "step", "epoch", "time", "size", "serial", "kind", "contents", "format", "run", "label")
"""Fields that choose and order records, besides their metrics."""
NO_SCORE: Final = re.compile(
    r".*_(?:runtime|per_second|preparation_time)|total_flos|grad_norm|learning_rate|num_(?:input_)?tokens(?:_seen)?"
)
"""What the HF Trainer logs beside scores."""
_OPERATORS: Final[dict[str, Callable[[Any, Any], bool]]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "!=": operator.ne,
    "==": operator.eq,
    "=": operator.eq,
    "<": operator.lt,
    ">": operator.gt,
}
_CONDITION: Final = re.compile(r"\s*(.+?)\s*(<=|>=|!=|==|=|<|>)\s*(.*?)\s*")


@attrs.frozen
class Condition:
    """One condition on a record: a field or metric, a comparison, a value. Without the metric it never holds.

    Example:
        >>> Condition.parse("val_loss < 0.1")
        Condition(field='val_loss', comparison='<', value='0.1')
    """

    field: str
    comparison: str = attrs.field(validator=attrs.validators.in_(_OPERATORS))
    value: str

    @classmethod
    def parse(cls, text: str) -> Condition:
        """Read a condition; raise `PolicyError` if it is not one."""
        match = _CONDITION.fullmatch(text)
        if match is None:
            msg = f"{text!r} is not a condition; write one such as 'val_loss<0.1', 'step>=1000' or 'kind=rescue'"
            raise PolicyError(msg)
        return cls(*match.groups())

    def holds(self, record: Record) -> bool:
        """Return whether it is true of the record."""
        value = _value(record, self.field)
        try:
            wanted = self.value if value is None or isinstance(value, str) else float(self.value)
        except ValueError:
            msg = f"{self.field}{self.comparison}{self.value}: {self.value!r} is not a number, and {self.field} is one"
            raise PolicyError(msg) from None
        return value is not None and _OPERATORS[self.comparison](value, wanted)


def _value(record: Record, field: str) -> Any:
    if field in record.metrics:
        return record.metrics[field]
    return getattr(record, field) if field in FIELDS else None


def metric_names(records: Iterable[Record]) -> list[str]:
    """Return the names of all metrics, those that most records have first."""
    return [name for name, _ in Counter(name for record in records for name in record.metrics).most_common()]


def check_metrics(names: Iterable[str], records: Iterable[Record]) -> None:
    """Raise `PolicyError` if no record has a metric of one of these names; the message has the closest one."""
    known = dict.fromkeys(metric_names(records))
    for name in names:
        if name not in known:
            msg = f"no checkpoint has the metric {name!r}{suggest(name, known)}"
            raise PolicyError(msg)


def select(
    records: Sequence[Record], conditions: Iterable[Condition] = (), *, sort: str = "serial", reverse: bool = False
) -> list[Record]:
    """Return the records for which all conditions hold, in order; those with NaN or without the metric come last.

    Args:
        records: Where to choose from.
        conditions: All have to hold.
        sort: A field of `Record` or a metric.
        reverse: Largest first.

    Raises:
        PolicyError: If no record has such a field or metric; the message says which there are.
    """
    wanted = tuple(conditions)
    known = dict.fromkeys((*FIELDS, *metric_names(records)))
    for field in (sort, *(condition.field for condition in wanted)):
        if field not in known and (records or field not in FIELDS):
            msg = f"no checkpoint has {field!r}{suggest(field, known)}"
            raise PolicyError(msg)
    found = [record for record in records if all(condition.holds(record) for condition in wanted)]
    there = [record for record in found if (value := _value(record, sort)) is not None and value == value]
    there.sort(key=lambda record: _value(record, sort), reverse=reverse)
    named = {record.name for record in there}
    return [*there, *(record for record in found if record.name not in named)]


def name_like(wanted: str, records: Sequence[Record]) -> NotFoundError:
    """Return the error for a name that no checkpoint has, with the closest there is."""
    names = dict.fromkeys(record.name for record in records)
    if not names:
        return NotFoundError(f"no checkpoint {wanted!r}: the directory has none")
    few = dict.fromkeys([*names][-5:])
    hint = suggest(wanted, names)
    return NotFoundError(f"no checkpoint {wanted!r}{hint if 'did you mean' in hint else suggest('', few)}")
