"""Builds values for tests. Pass the fields that matter; the others have defaults."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from checkpointer.records.manifest import Manifest
from checkpointer.records.record import Observation, Record

RUN = "run-a"
"""The run of factory records and factory manifests."""


def record(name: str | None = None, **kw: Any) -> Record:
    """Return a record; name, serial, epoch and time follow from ``step`` unless given."""
    step = kw.setdefault("step", 1)
    defaults: dict[str, Any] = {
        "name": f"s{step}" if name is None else name,
        "epoch": step,
        "time": float(step),
        "size": 10,
        "digest": "xxh3-128:" + "0" * 32,
        "format": "torch",
        "run": RUN,
        "serial": step,
        "token": f"token-{step}",
    }
    return Record(**(defaults | kw))


def history(*losses: float | None, **kw: Any) -> list[Record]:
    """Return records ``s1``, ``s2``, ... one per loss; None omits the metric."""
    return [
        record(step=step, metrics={} if loss is None else {"loss": loss}, **kw)
        for step, loss in enumerate(losses, start=1)
    ]


def manifest(records: Sequence[Record] = (), **kw: Any) -> Manifest:
    """Return a manifest of the factory's run."""
    return Manifest(**({"records": tuple(records), "run": RUN} | kw))


def observation(step: int = 10, **kw: Any) -> Observation:
    """Return an observation at ``step``. Keywords that are not fields are metrics."""
    fields: dict[str, Any] = {key: kw.pop(key) for key in ("epoch", "epoch_end", "time", "metrics") if key in kw}
    if "time" not in fields:
        fields["time"] = float(step)
    defaults: dict[str, Any] = {"step": step, "epoch": 0, "metrics": kw}
    return Observation(**(defaults | fields))
