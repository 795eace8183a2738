"""What a loop reports (an observation) and what a checkpoint leaves behind (a record)."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, Final, Literal

import attrs

from checkpointer._display import lines_html, number_text, size_text
from checkpointer._validation import as_index, brief
from checkpointer.errors import MetricError, ObservationError, RecordError, SaveError, SchemaError
from checkpointer.records.codec import MAX_RECORD_BYTES, Reader, parse_json, to_json, to_plain_float
from checkpointer.records.digest_algorithms import DIGESTS
from checkpointer.records.names import has_surrogate

SCHEMA: Final = 1
"""Number of the record format; a reader refuses a higher one."""

ADOPTED: Final = "adopted: "
"""How the reason of a record begins whose payload another program wrote."""
NO_EPOCH: Final = ", without an epoch"
"""How its reason ends if that program did not say the epoch."""

MAX_WRITTEN_BYTES: Final = MAX_RECORD_BYTES * 2 // 5
"""No record larger than this (bytes) is written: a pending one may hold two, and must be read again."""

Contents = Literal["full", "weights"]
Kind = Literal["regular", "rescue"]
Status = Literal["pending", "committed", "retired"]
Line = tuple[tuple[int, int], ...]


def as_metrics(metrics: Mapping[str, Any]) -> Mapping[str, float]:
    """Convert what a loop measured to plain floats.

    Numbers, numpy scalars, and arrays or tensors of one element (of any device) are taken; anything else raises
    `MetricError` naming the metric, the value and its type.
    """
    if not isinstance(metrics, Mapping):
        msg = f"metrics is {metrics!r} ({type(metrics).__name__}); expected a mapping of names to numbers"
        raise MetricError(msg)
    return MappingProxyType({_as_name(name): _as_float(name, value) for name, value in metrics.items()})


def _as_name(name: object) -> str:
    if isinstance(name, str) and name and not any(ord(char) < 32 for char in name) and not has_surrogate(name):
        return name
    msg = f"metric name is {name!r}; expected a non-empty string without control characters or surrogates"
    raise MetricError(msg)


def _as_float(name: object, value: Any) -> float:
    if _is_one_element(value):
        value = value.item()
    if isinstance(value, numbers.Real):
        try:
            return float(value)
        except OverflowError:
            return math.inf if value > 0 else -math.inf  # type: ignore[operator]
    shape = getattr(value, "shape", None)
    detail = type(value).__name__ if shape is None else f"{type(value).__name__} of shape {tuple(shape)}"
    if getattr(value, "is_meta", False):
        detail += ", a meta tensor without a value"
    msg = (
        f"metric {name!r} is {value!r} ({detail}); expected one real number "
        "(a number, a numpy scalar, or a tensor of one element): reduce it first, for example with .mean()"
    )
    raise MetricError(msg)


def _is_one_element(value: Any) -> bool:
    """Return whether this is an array or tensor whose only element can be read."""
    shape = getattr(value, "shape", None)
    return (
        isinstance(shape, tuple)
        and math.prod(shape) == 1
        and callable(getattr(value, "item", None))
        and not getattr(value, "is_meta", False)
    )


def _frozen(metrics: Mapping[str, float]) -> Mapping[str, float]:
    # One NaN object for all, so that records that say the same are equal: a dict compares by identity first.
    return MappingProxyType({name: math.nan if math.isnan(value) else value for name, value in metrics.items()})


_NO_FILES: Final[Mapping[str, tuple[int, str]]] = MappingProxyType({})


def _as_files(files: Mapping[str, tuple[int, str]]) -> Mapping[str, tuple[int, str]]:
    return MappingProxyType(dict(files)) if files else _NO_FILES


def _step(value: Any) -> int:
    return as_index(value, "step", ObservationError)


def _epoch(value: Any) -> int:
    return as_index(value, "epoch", ObservationError)


@attrs.frozen(kw_only=True)
class Progress:
    """How far training is: what triggers count on."""

    step: int = 0
    """Finished optimizer steps."""
    epochs: int = 0
    """Finished epochs (a count, not an index)."""
    time: float = 0.0
    """Seconds since the Unix epoch."""
    metrics: Mapping[str, float] = attrs.field(factory=dict)
    """What was reported at this point."""
    lowest: Mapping[str, float] = attrs.field(factory=dict)
    """The lowest finite value of each metric, of this due point and those before it."""
    highest: Mapping[str, float] = attrs.field(factory=dict)
    """The highest."""
    is_writing: bool = False
    """Whether a save is still being written in the background."""

    def later(self, other: Progress) -> Progress:
        """Return what is further on each of the scales."""
        return attrs.evolve(
            self.after([other]),
            step=max(self.step, other.step),
            epochs=max(self.epochs, other.epochs),
            time=max(self.time, other.time),
        )

    def after(self, points: Iterable[Progress]) -> Progress:
        """Return this point as one that comes after others: its extremes are those of them all."""
        lowest, highest = dict(self.lowest), dict(self.highest)
        for point in (self, *points):
            for metrics in (point.metrics, point.lowest, point.highest):
                for name, value in metrics.items():
                    if math.isfinite(value):
                        lowest[name] = min(value, lowest.get(name, value))
                        highest[name] = max(value, highest.get(name, value))
        return attrs.evolve(self, lowest=lowest, highest=highest)

    def to_dict(self) -> dict[str, Any]:
        """Return what triggers count from as primitives; what is empty is left out."""
        scales = {"step": self.step, "epochs": self.epochs, "time": self.time}
        extremes = {"lowest": dict(self.lowest), "highest": dict(self.highest)}
        return scales | {name: values for name, values in extremes.items() if values}


@attrs.frozen(kw_only=True)
class Observation:
    """One report of the loop, validated and normalised.

    Example:
        >>> from checkpointer import Observation
        >>> now = Observation(metrics={"val_loss": 0.31}, step=400, epoch=3, time=0.0)
        >>> now.metrics["val_loss"], now.progress.epochs
        (0.31, 4)
    """

    metrics: Mapping[str, float] = attrs.field(factory=dict, converter=as_metrics)
    """What was measured *at this step*."""
    step: int = attrs.field(converter=_step)
    """Finished optimizer steps, from 0."""
    epoch: int = attrs.field(converter=_epoch)
    """0-based index of the epoch in progress or just ended."""
    epoch_end: bool = attrs.field(default=True, converter=bool)
    """Whether this report ends the epoch."""
    time: float
    """Seconds since the Unix epoch."""

    def __reduce__(self) -> Any:
        # The read-only metrics cannot be pickled or deep-copied as they are.
        return partial(Observation, **(attrs.asdict(self, recurse=False) | {"metrics": dict(self.metrics)})), ()

    @property
    def progress(self) -> Progress:
        """The observation on the scales that triggers count on."""
        return Progress(step=self.step, epochs=self.epoch + self.epoch_end, time=self.time, metrics=self.metrics)


@attrs.frozen(kw_only=True)
class Record:
    """What is known about one checkpoint; as a file, its commit marker.

    Two records are equal when all fields are. `to_json` and `from_json` round-trip, NaN and infinities included.
    """

    name: str
    """Path of the payload relative to the directory, with ``/`` between parts."""
    step: int
    """Finished optimizer steps when the state was taken."""
    epoch: int
    """0-based index of the epoch in progress or just ended."""
    epoch_end: bool = True
    """Whether the epoch had ended."""
    metrics: Mapping[str, float] = attrs.field(factory=dict, converter=_frozen)
    """Every metric reported at this step."""
    time: float
    """Seconds since the Unix epoch when the save was decided."""
    size: int
    """Bytes of the payload."""
    digest: str
    """Over the payload's bytes: ``"xxh3-128:"`` and 32 hex digits, under trust ``"sha256:"`` and 64."""
    files: Mapping[str, tuple[int, str]] = attrs.field(factory=dict, converter=_as_files, repr=False)
    """Size (bytes) and digest (hex digits) of each file of a folder by its path inside, if the writer took them."""
    format: str
    """Name of the payload format, such as ``"torch"``."""
    contents: Contents = "full"
    """``"full"`` can resume a run, ``"weights"`` cannot."""
    kind: Kind = "regular"
    """``"rescue"`` for a save made because of an exception or a signal."""
    reason: str = ""
    """Why it was saved."""
    run: str
    """Id of the training run, kept across its restarts."""
    label: str = ""
    """Which manager of the directory wrote it; empty unless several share it."""
    line: Line = ()
    """Forks this record descends from, as ``(fork, step)``: see `Manifest`."""
    serial: int
    """Commit order within the directory, from 1."""
    token: str
    """Unique id of this write."""
    pinned: bool = False
    """A pinned checkpoint is never retired."""
    term: int = 0
    """The term of the run that its writer held: see `checkpointer.commit.terms`; 0 if it held none."""

    @property
    def is_adopted(self) -> bool:
        """Whether another program wrote the payload, and `checkpointer.tools.adopt` the record."""
        return self.reason.startswith(ADOPTED)

    @property
    def is_epoch_known(self) -> bool:
        """Whether ``epoch`` is a number of the training, and not a 0 in place of an unknown one."""
        return not (self.is_adopted and self.reason.endswith(NO_EPOCH))

    @property
    def progress(self) -> Progress:
        """The record on the scales that triggers count on."""
        return Progress(step=self.step, epochs=self.epoch + self.epoch_end, time=self.time, metrics=self.metrics)

    def attached(self, now: Observation) -> Record:
        """Return the record with what was measured of its step later."""
        epoch_end = self.epoch_end or (now.epoch_end and now.epoch == self.epoch)
        return attrs.evolve(self, metrics={**self.metrics, **now.metrics}, epoch_end=epoch_end)

    def __str__(self) -> str:
        return f"{self.name}: {'; '.join(text for _, text in self._facts() if text)}"

    def _repr_html_(self) -> str:
        return lines_html(self.name, [*self._facts(), ("run", self.run), ("digest", self.digest)])

    def _facts(self) -> list[tuple[str, str]]:
        rescue = "a rescue" if self.kind == "rescue" else ""
        weights = "weights only" if self.contents == "weights" else ""
        metrics = ", ".join(f"{name}={number_text(value)}" for name, value in self.metrics.items())
        return [
            ("progress", f"step {self.step}{f', epoch {self.epoch}' if self.is_epoch_known else ''}"),
            ("metrics", metrics),
            ("size", size_text(self.size)),
            ("kind", ", ".join(text for text in (rescue, weights, "pinned" if self.pinned else "") if text)),
            ("why", self.reason),
        ]

    def __reduce__(self) -> Any:
        # The read-only metrics cannot be pickled or deep-copied as they are.
        return Record.from_dict, (self.to_dict(), "pickled record")

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, safe for JSON."""
        data = {field: getattr(self, field) for field in _READERS}
        data["metrics"] = {name: to_plain_float(value) for name, value in self.metrics.items()}
        data["line"] = [list(fork) for fork in self.line]
        files = {inside: list(file) for inside, file in data.pop("files").items()}
        return data | ({"files": files} if files else {})

    @classmethod
    def from_dict(cls, data: object, where: str) -> Record:
        """Read what `to_dict` wrote; errors say ``where`` the bad value stands."""
        reader = Reader(data, where)
        return cls(**{field: read(reader, field) for field, read in _READERS.items()})


def commit_order(record: Record) -> tuple[bool, int, float, str, str]:
    """Return the key that sorts records in the order they were committed. What was adopted is older than what was not.

    So a run goes on from what it has written itself, even if another checkpoint was adopted since.
    """
    return not record.is_adopted, record.serial, record.time, record.token, record.name


class Ordered(tuple[Record, ...]):
    """Records that are in commit order, so that they are not sorted again."""

    __slots__ = ()


def in_commit_order(records: Iterable[Record]) -> Ordered:
    """Return the records in commit order."""
    return records if isinstance(records, Ordered) else Ordered(sorted(records, key=commit_order))


@attrs.frozen(kw_only=True)
class Entry:
    """One record file: a record and how far its write or removal has come.

    ``pending``: the payload may be there or not; its digest shows which. ``previous`` is the record that the write
    replaces. ``retired``: no longer a checkpoint, its payload is about to go.
    """

    record: Record
    status: Status = "committed"
    previous: Record | None = None
    owner: str = ""
    """Process that is writing (``pending`` only): see `checkpointer.storage.owner`."""
    signature: str = ""
    """Of all the rest, as `checkpointer.commit.signing` makes and checks it; empty if it was saved without a key."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, safe for JSON."""
        previous = None if self.previous is None else self.previous.to_dict()
        optional = {"previous": previous, "owner": self.owner, "signature": self.signature}
        data = {"schema": SCHEMA, "status": self.status, "record": self.record.to_dict()}
        return data | {key: value for key, value in optional.items() if value}

    def to_json(self) -> bytes:
        """Return the record file's bytes."""
        return to_json(self.to_dict())

    @classmethod
    def from_dict(cls, data: object, where: str) -> Entry:
        """Read what `to_dict` wrote."""
        reader = Reader(data, where)
        schema = reader.whole("schema")
        if schema > SCHEMA:
            msg = (
                f"{where} has schema {schema}; this version of torch-checkpointer reads up to {SCHEMA}. "
                "Upgrade it to read this directory; nothing was changed"
            )
            raise SchemaError(msg)
        data = reader.raw("previous", None)
        record = Record.from_dict(reader.raw("record"), f"{where}, in 'record'")
        previous = None if data is None else Record.from_dict(data, f"{where}, in 'previous'")
        if previous is not None and previous.name != record.name:
            # Else the payload of one name would prove the record of another one.
            msg = f"{where}: 'previous' is the record of {brief(previous.name)}; expected that of {brief(record.name)}"
            raise RecordError(msg)
        return cls(
            record=record,
            status=reader.choice("status", ("pending", "committed", "retired")),
            previous=previous,
            owner=reader.text("owner", ""),
            signature=reader.text("signature", ""),
        )

    @classmethod
    def from_json(cls, data: bytes, where: str) -> Entry:
        """Read a record file; raises `RecordError` with the file and the bad value in the message."""
        return cls.from_dict(parse_json(data, where), where)


def check_readable(record: Record) -> None:
    """Raise `SaveError` if the record, once written, could not be read again: before anything is written for it."""
    digest = record.digest or f"sha256:{DIGESTS['sha256']().hexdigest()}"
    try:
        data = Entry(record=attrs.evolve(record, digest=digest)).to_json()
        Entry.from_json(data, "the record")
    except ValueError as error:
        msg = f"{brief(record.name)} was not saved: its record could not be read again ({error})"
        raise SaveError(msg) from error
    if len(data) > MAX_WRITTEN_BYTES:
        names = sum(len(name.encode()) for name in record.metrics)
        msg = (
            f"{record.name} was not saved: its record would have {len(data)} bytes, and at most {MAX_WRITTEN_BYTES} "
            f"are written; the names of its {len(record.metrics)} metrics take {names}: report fewer, or shorter ones"
        )
        raise SaveError(msg)


_READERS: Final[dict[str, Any]] = {
    "name": Reader.payload_name,
    "step": Reader.whole,
    "epoch": Reader.whole,
    "epoch_end": Reader.flag,
    "metrics": Reader.metrics,
    "time": Reader.time,
    "size": Reader.whole,
    "digest": Reader.digest,
    "format": Reader.text,
    "contents": lambda reader, key: reader.choice(key, ("full", "weights")),
    "kind": lambda reader, key: reader.choice(key, ("regular", "rescue")),
    "reason": Reader.text,
    "run": Reader.text,
    "label": Reader.text,
    "line": Reader.line,
    "serial": Reader.whole,
    "token": Reader.text,
    "pinned": Reader.flag,
    "term": lambda reader, key: reader.whole(key, 0),
    "files": Reader.files,
}
