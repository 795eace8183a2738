"""How users type against this library. Never run: mypy --strict reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, BinaryIO, assert_type

from checkpointer import (
    AnyOf,
    Attach,
    Budget,
    CheckpointManager,
    EveryEpochs,
    EverySeconds,
    KeepBest,
    KeepEvery,
    Listener,
    Naming,
    Policy,
    Progress,
    Record,
    Restored,
    Save,
    Skip,
    explain,
)
from checkpointer.ports import Format, Writable


def score(metrics: Mapping[str, float]) -> float:
    return metrics["precision"] * metrics["recall"]


class Mondays:
    """A trigger of one's own."""

    def due(self, now: Progress, since: Progress) -> str | None:
        return "monday" if now.time % 7 < 1 else None


class KeepOdd:
    """A rule of one's own."""

    def keep(self, history: Sequence[Record]) -> Mapping[str, str]:
        return {record.name: "odd" for record in history if record.step % 2}


class Text:
    """A format of one's own."""

    name = "text"
    extension = ".txt"

    def write(self, state: Any, stream: Writable) -> None:
        stream.write(str(state).encode())

    def read(self, stream: BinaryIO, *, weights_only: bool, map_location: Any) -> str:
        return stream.read().decode()

    def refused(self, state: Any) -> Mapping[str, str]:
        return {}


class Print(Listener):
    """A listener of one's own."""

    def on_saved(self, record: Record) -> None:
        print(record.name)


payload: Format = Text()
policy = Policy(
    AnyOf(EveryEpochs(1), EverySeconds(timedelta(hours=1)), Mondays()),
    [KeepBest(2, score, mode="max"), KeepEvery(steps=100), KeepOdd(), Budget(bytes=10**9)],
    name=Naming("{epoch}-{val/loss:.2f}", version_counter=False),
    last="link",
)
with CheckpointManager("runs/x", policy, state=dict, format=payload, listeners=[Print()]) as manager:
    assert_type(manager, CheckpointManager)
    assert_type(manager.restore("best"), Restored | None)
    decision = manager.observe({"loss": 0.1}, step=1, epoch=0, epoch_end=True)
    match decision:
        case Save(name=name, retire=retired):
            assert_type(name, str)
            assert_type(retired, tuple[str, ...])
        case Attach() | Skip():
            assert_type(decision.reason, str)
    assert_type(manager.best, Record | None)
    assert_type(manager.records, tuple[Record, ...])
    assert_type(explain(manager.policy, manager.session.manifest), dict[str, tuple[str, ...]])
