"""Reads the metrics of a training from a file or from records, as the observations that a manager would get."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import attrs

from checkpointer._display import some_of
from checkpointer._validation import brief
from checkpointer.errors import ObservationError
from checkpointer.policy.yaml_codec import suggest
from checkpointer.records.codec import MAX_TIME
from checkpointer.records.record import Observation, Record

MAX_BYTES: Final = 1 << 28
"""A file of metrics larger than this (bytes) is refused."""

_MAX_NAMED: Final = 50
"""Columns that a message names."""
_STEPS: Final = ("step", "global_step", "train/global_step", "_step", "iteration")
_EPOCHS: Final = ("epoch", "train/epoch")
_TIMES: Final = ("time", "timestamp", "_timestamp")
_ENDS: Final = ("epoch_end",)


@attrs.frozen(kw_only=True)
class History:
    """Observations in the order they were made."""

    observations: tuple[Observation, ...]
    sizes: Mapping[int, int] = attrs.field(factory=dict)
    """Bytes of the checkpoint at a step, where that is known."""
    has_epochs: bool = True
    """Whether epochs are known; else all are 0."""
    has_times: bool = True
    """Whether times are known; else all are equal."""
    has_survivors_only: bool = False
    """Whether these are the reports of the checkpoints that are left of a run, and not all of its reports."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of all that was measured, in the order they came."""
        return tuple(dict.fromkeys(name for now in self.observations for name in now.metrics))


def history_of(records: Sequence[Record]) -> History:
    """Return the history of an old run's records: a report at each checkpoint that is still there."""
    observations = [
        Observation(metrics=r.metrics, step=r.step, epoch=r.epoch, epoch_end=r.epoch_end, time=r.time)
        for r in records
        if r.kind == "regular"
    ]
    sizes = {record.step: record.size for record in records}
    return History(observations=tuple(observations), sizes=sizes, has_survivors_only=True)


def history_at(path: str) -> History:
    """Read a file as `read_history` does, and of a file over the limit only one byte more than the limit."""
    with open(path, "rb") as stream:
        return read_history(stream.read(MAX_BYTES + 1), path)


def read_history(data: bytes, where: str) -> History:
    r"""Read what a logger wrote: CSV with a head, or one JSON object a line.

    Needed is a column ``step`` (or ``global_step``, ``iteration``); ``epoch``, ``time`` (seconds) and ``epoch_end``
    count if they are there, and every other column of numbers is a metric. An empty cell was not measured. Lines of one
    step are one report, as loggers write a line for each metric. Without ``epoch_end`` an epoch ends at its last line.

    Raises:
        ObservationError: If a value is not a number, a step is missing or goes back: the message has line and column.

    Example:
        >>> history = read_history(b"step,epoch,val_loss\n10,0,0.9\n20,1,\n20,1,0.5\n", "metrics.csv")
        >>> [(now.step, dict(now.metrics)) for now in history.observations]
        [(10, {'val_loss': 0.9}), (20, {'val_loss': 0.5})]
    """
    if len(data) > MAX_BYTES:
        msg = f"{where} has more than {MAX_BYTES} bytes, which are the most that are read"
        raise ObservationError(msg)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        msg = f"{where} is not text ({error}); expected CSV with a head, or one JSON object a line"
        raise ObservationError(msg) from error
    is_json = text.lstrip().startswith("{")
    head, rows = ([], [*_json_rows(text, where)]) if is_json else _csv_rows(text, where)
    if not rows:
        msg = f"{where} has no line of metrics; expected CSV with a head, or one JSON object a line"
        raise ObservationError(msg)
    return _history(dict.fromkeys([*head, *(name for _, row in rows for name in row)]), rows, where)


_Row = tuple[int, dict[str, Any]]
"""Number of the line, and its values by column; what is empty is left out."""


def _csv_rows(text: str, where: str) -> tuple[list[str], list[_Row]]:
    reader = csv.reader(io.StringIO(text))
    rows: list[_Row] = []
    try:
        head = [name.strip() for name in next(reader, [])]
        twice = [name for name, count in Counter(head).items() if count > 1]
        if twice:
            msg = f"{where}, line 1: two columns have the name {twice[0]!r}"
            raise ObservationError(msg)
        for cells in reader:
            if len(cells) > len(head) and any(cell.strip() for cell in cells):
                msg = f"{where}, line {reader.line_num}: {len(cells)} cells, and the head has {len(head)}"
                raise ObservationError(msg)
            named = zip(head, cells, strict=False)
            row = {name: cell.strip() for name, cell in named if cell.strip() and name}
            rows += [(reader.line_num, row)] if row else []
    except csv.Error as error:
        msg = f"{where}, line {reader.line_num}: it is not CSV ({error})"
        raise ObservationError(msg) from error
    return head, rows


def _json_rows(text: str, where: str) -> Iterator[_Row]:
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            msg = f"{where}, line {number}: it is not a JSON object ({error})"
            raise ObservationError(msg) from error
        if not isinstance(row, dict):
            msg = f"{where}, line {number}: found {brief(row)}; expected a JSON object"
            raise ObservationError(msg)
        # Nested objects and lists are not numbers of this step: histograms, tables, configurations.
        yield number, {k: v for k, v in row.items() if k and v is not None and not isinstance(v, (dict, list))}


def _history(columns: Mapping[str, None], rows: Sequence[_Row], where: str) -> History:
    names = (_STEPS, _EPOCHS, _TIMES, _ENDS)
    step, epoch, time, ends = (next((name for name in some if name in columns), "") for some in names)
    if not step:
        some = [*columns][:_MAX_NAMED]
        hint = suggest("step", dict.fromkeys(some)) if some else ""
        msg = f"{where} has no column 'step'{hint} (columns: {some_of([*columns], _MAX_NAMED)})"
        raise ObservationError(msg)
    merged = _merge(
        [(line, _typed(f"{where}, line {line}", row, (step, epoch, ends))) for line, row in rows], step, where
    )
    observations = []
    for (line, row), (_, following) in zip(merged, [*merged[1:], (0, {})], strict=True):
        at_epoch = row.get(epoch, 0)
        ended = bool(row[ends]) if ends in row else bool(epoch) and following.get(epoch) != at_epoch
        metrics = {name: value for name, value in row.items() if name not in (step, epoch, time, ends)}
        when = row.get(time, 0.0)
        if not abs(when) < MAX_TIME:
            msg = f"{where}, line {line}: the time is {when!r}; expected seconds since 1970, before the year 3058"
            raise ObservationError(msg)
        observations.append(Observation(metrics=metrics, step=row[step], epoch=at_epoch, epoch_end=ended, time=when))
    return History(observations=tuple(observations), has_epochs=bool(epoch), has_times=bool(time))


def _typed(place: str, row: Mapping[str, Any], whole: Sequence[str]) -> dict[str, Any]:
    typed: dict[str, Any] = {}
    for name, value in row.items():
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            msg = (
                f"{place}, column {name!r}: {brief(value)} is not a number; "
                "correct the cell, or leave it empty if nothing was measured"
            )
            raise ObservationError(msg) from None
        # Hugging Face counts parts of epochs.
        if name in whole and not (0 <= number < 1 << 63 and (number.is_integer() or name in _EPOCHS)):
            msg = f"{place}, column {name!r}: {brief(value)}; expected a whole number of at least 0, and below 2**63"
            raise ObservationError(msg)
        typed[name] = int(number) if name in whole else number
    return typed


def _merge(rows: Sequence[_Row], step: str, where: str) -> list[_Row]:
    """Join the lines of one step, and give a line without an epoch that of the line before."""
    merged: list[_Row] = []
    for line, row in rows:
        if step not in row:
            msg = f"{where}, line {line}: the column {step!r} is empty; every line needs its step"
            raise ObservationError(msg)
        before = merged[-1][1] if merged else {}
        if before and row[step] < before[step]:
            msg = (
                f"{where}, line {line}: the step went back from {before[step]} to {row[step]}; "
                "pass the metrics of one training at a time"
            )
            raise ObservationError(msg)
        if before and row[step] == before[step]:
            before.update(row)  # A copy for each line would take time by the square of their number.
            merged[-1] = (line, before)
            continue
        carried = {name: before[name] for name in _EPOCHS if name in before}
        merged.append((line, carried | row))
    return merged
