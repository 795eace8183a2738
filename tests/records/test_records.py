"""Observations are validated and normalised; record files round-trip and are read with suspicion."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from support.factories import observation, record

from checkpointer.errors import CheckpointerError, MetricError, ObservationError, RecordError, SchemaError
from checkpointer.records.codec import MAX_RECORD_BYTES, parse_json
from checkpointer.records.record import SCHEMA, Entry, Progress, Record, as_metrics


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (2, 2.0),
        (0.5, 0.5),
        (True, 1.0),
        (Fraction(1, 4), 0.25),
        (np.float32(0.5), 0.5),
        (np.int64(3), 3.0),
        (np.array(1.5), 1.5),
        (torch.tensor(2.5), 2.5),
        (torch.tensor(3), 3.0),
        (torch.tensor(0.5, dtype=torch.bfloat16, requires_grad=True), 0.5),
        (torch.tensor([0.5]), 0.5),
        (torch.tensor([[3]]), 3.0),
        (np.array([1.5]), 1.5),
        (math.inf, math.inf),
        (10**400, math.inf),
        (-(10**400), -math.inf),
    ],
)
def test_numbers_and_arrays_of_one_element_become_floats(value: object, expected: float) -> None:
    """A number becomes a plain float, and so does an array of one element, whatever its shape."""
    got = as_metrics({"m": value})["m"]
    assert expected == got
    assert type(got) is float


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ("0.3", "str"),
        (None, "NoneType"),
        (1 + 0j, "complex"),
        ([0.1], "list"),
        (np.array([0.1, 0.2]), r"ndarray of shape \(2,\)"),
        (np.array([]), r"ndarray of shape \(0,\)"),
        (torch.zeros((), device="meta"), r"Tensor of shape \(\), a meta tensor without a value"),
        (torch.zeros(1, device="meta"), r"Tensor of shape \(1,\), a meta tensor without a value"),
        (torch.zeros(2, 3), r"Tensor of shape \(2, 3\)"),
        (np.complex64(1), "complex"),
        (torch.tensor(1j), "complex"),
        (np.str_("a"), "str"),
    ],
)
def test_what_is_not_one_number_names_metric_value_and_type(value: object, kind: str) -> None:
    """A bad metric is an error that says which one, what it is and what to do."""
    with pytest.raises(MetricError, match=rf"(?s)metric 'val_loss' is .*\({kind}\); expected one real number.*mean"):
        as_metrics({"val_loss": value})


def test_metric_error_is_what_callers_expect() -> None:
    """A metric error is caught as ours, as a ValueError and as a TypeError."""
    assert issubclass(MetricError, (CheckpointerError, ValueError))
    assert issubclass(MetricError, TypeError)


@pytest.mark.parametrize("name", ["", "a\nb", "a\0", 3, None, "\ud800"])
def test_bad_metric_names_are_refused(name: Any) -> None:
    """A metric's name is text that can stand in a record file."""
    with pytest.raises(MetricError, match="metric name is"):
        as_metrics({name: 1.0})


def test_metrics_that_are_no_mapping_are_refused() -> None:
    """A bare number in place of the metrics is said to be one."""
    with pytest.raises(MetricError, match=r"metrics is 0\.3 \(float\); expected a mapping"):
        as_metrics(0.3)  # type: ignore[arg-type]


def test_observation_copies_its_metrics() -> None:
    """Later changes of the dict that was reported do not reach the observation."""
    metrics = {"loss": 1.0}
    now = observation(metrics=metrics)
    metrics["loss"] = 2.0
    assert {"loss": 1.0} == now.metrics
    with pytest.raises(TypeError, match="does not support item assignment"):
        now.metrics["loss"] = 3.0  # type: ignore[index]


@pytest.mark.parametrize("step", [np.int64(4), torch.tensor(4), 4])
def test_integers_of_any_kind_are_steps(step: Any) -> None:
    """A step counted in numpy or torch is a step."""
    now = observation(step=step, time=0.0)
    assert 4 == now.step
    assert type(now.step) is int


@pytest.mark.parametrize("value", [-1, 1.0, "1", None, True])
@pytest.mark.parametrize("field", ["step", "epoch"])
def test_steps_and_epochs_are_whole_and_not_negative(field: str, value: Any) -> None:
    """A step or epoch that cannot be counted is refused by its name."""
    with pytest.raises(ObservationError, match=rf"{field} is .*; expected a whole number"):
        observation(**{"step": 1, "time": 0.0, field: value})


@pytest.mark.parametrize(("ended", "epochs"), [(True, 4), (False, 3), (np.True_, 4), (np.False_, 3)])
def test_an_epoch_counts_once_it_ended(ended: Any, epochs: int) -> None:
    """Progress counts finished epochs; the epoch in an observation is an index."""
    now = observation(8, epoch=3, epoch_end=ended, time=5.0)
    assert Progress(step=8, epochs=epochs, time=5.0) == now.progress
    assert type(now.epoch_end) is bool
    assert epochs == record(step=8, epoch=3, epoch_end=bool(ended)).progress.epochs


@pytest.mark.parametrize(
    "entry",
    [
        Entry(record=record()),
        Entry(record=record(name="a/b:c.ckpt", metrics={"a": math.nan, "b": math.inf, "c": -math.inf, "ü": -0.0})),
        Entry(record=record(kind="rescue", contents="weights", pinned=True, label="x", line=((1, 5), (2, 7)))),
        Entry(record=record("a", step=2), previous=record("a"), status="pending", owner="host-1-2"),
        Entry(record=record(), status="retired"),
    ],
)
def test_entries_round_trip(entry: Entry) -> None:
    """What is written to a record file is what is read back."""
    assert entry == Entry.from_json(entry.to_json(), "f")


def test_records_that_say_the_same_are_equal_with_nan() -> None:
    """Two NaN that differ as objects do not make two records differ."""
    assert record(metrics={"a": float("nan")}) == record(metrics={"a": float("nan")})


def test_record_files_are_strict_json() -> None:
    """NaN is written as text, for readers in other languages."""
    data = json.loads(Entry(record=record(metrics={"a": math.nan})).to_json(), parse_constant=pytest.fail)
    assert "nan" == data["record"]["metrics"]["a"]
    assert SCHEMA == data["schema"]


def test_a_future_schema_has_its_own_error() -> None:
    """A record of a newer version is refused by a message that says to upgrade."""
    data = Entry(record=record()).to_dict() | {"schema": SCHEMA + 1}
    with pytest.raises(SchemaError, match=rf"f\.json has schema {SCHEMA + 1}.*Upgrade"):
        Entry.from_json(json.dumps(data).encode(), "f.json")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("step", -1, "'step' is -1; expected a whole number"),
        ("step", True, "'step' is True; expected a whole number"),
        ("step", 1.0, "'step' is 1.0; expected a whole number"),
        ("epoch_end", 1, "'epoch_end' is 1; expected true or false"),
        ("time", math.nan, "'time' is nan; expected a number of seconds since 1970"),
        ("time", 10**400, "'time' is 1000.*; expected a number of seconds since 1970"),
        ("contents", "all", "'contents' is 'all'; expected 'full' or 'weights'"),
        ("kind", [], r"'kind' is \[\]; expected 'regular' or 'rescue'"),
        ("digest", "abc", "'digest' is 'abc'; expected 'algorithm:hex'"),
        ("metrics", [], r"'metrics' is \[\]; expected an object of numbers"),
        ("metrics", {"a": "high"}, r"'metrics\['a'\]' is 'high'; expected a number"),
        ("metrics", {"a": True}, r"'metrics\['a'\]' is True; expected a number"),
        ("metrics", {"a": 10**400}, r"'metrics\['a'\]' is 1000.*; expected a number"),
        ("line", 3, "'line' is 3; expected a list of"),
        ("line", [[1]], "'line' is .*; expected a list of"),
        ("line", [[1, "a"]], "'line' is .*; expected a list of"),
        ("token", None, "'token' is None; expected text"),
        ("reason", "\ud800", "'reason' is .*; expected text"),
        ("metrics", {"\ud800": 1.0}, "'metrics' is .*; expected names that can be encoded"),
    ],
)
def test_a_bad_value_is_named_with_its_path(field: str, value: object, message: str) -> None:
    """The error says the file, the object and the field, and what was expected."""
    data = Entry(record=record()).to_dict()
    data["record"][field] = value
    with pytest.raises(RecordError, match=rf"f, in 'record': {message}"):
        Entry.from_dict(data, "f")


@pytest.mark.parametrize(
    "name", ["", "/etc/x", "../x", "a/../b", "a//b", "./a", "C:x", "c:/x", "a\\b", "a\0b", ".checkpointer/records/x"]
)
def test_a_record_cannot_name_a_file_outside_the_directory(name: str) -> None:
    """A record that others may have written never leads out of the directory."""
    data = record().to_dict() | {"name": name}
    with pytest.raises(RecordError, match=r"'name' is .*; expected a .*path"):
        Record.from_dict(data, "f")


@pytest.mark.parametrize("field", [field for field in record().to_dict() if field != "term"])
def test_a_missing_field_is_named(field: str) -> None:
    """No field has a silent default when read, but the term, which older records do not have."""
    data = record().to_dict()
    del data[field]
    with pytest.raises(RecordError, match=f"f: '{field}' is missing"):
        Record.from_dict(data, "f")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[: len(data) // 2], "not valid JSON.*cut short"),
        (lambda data: b"", "not valid JSON"),
        (lambda data: b"\xff\xfe" + data, "not valid JSON|expected an object"),
        (lambda data: b"[]", "expected an object, found list"),
        (lambda data: b"[" * 100_000, "not valid JSON"),
        (lambda data: b" " * (MAX_RECORD_BYTES + 1), "at most 1048576 are read"),
        (lambda data: data.replace(b'"committed"', b'"done"'), "'status' is 'done'"),
    ],
)
def test_damaged_record_files_are_one_kind_of_error(damage: Callable[[bytes], bytes], message: str) -> None:
    """Half a record, another file or a bomb: each a RecordError that says where."""
    with pytest.raises(RecordError, match=f"some.json.*({message})"):
        Entry.from_json(damage(Entry(record=record()).to_json()), "some.json")


def test_json_is_read_up_to_the_limit() -> None:
    """The bound on size is inclusive."""
    assert [] == parse_json(b"[]", "f", limit=2)
    with pytest.raises(RecordError, match="f is 3 bytes; at most 2"):
        parse_json(b"[ ]", "f", limit=2)
