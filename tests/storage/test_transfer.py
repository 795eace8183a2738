"""A payload that takes long to write logs its progress."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from support.plain_format import PlainFormat

from checkpointer import CheckpointManager, EverySteps, KeepLast, Policy
from checkpointer.ports import Writable
from checkpointer.storage.progress import Transfer
from checkpointer.testing import FakeClock, MemoryStorage

POLICY = Policy(EverySteps(1), [KeepLast(1)])


class Slow(MemoryStorage):
    """Takes ``seconds`` for each chunk of a payload."""

    def __init__(self, clock: FakeClock) -> None:
        super().__init__()
        self.seconds = 0.0
        self._fake = clock

    def upload(self, path: str) -> Any:
        upload = super().upload(path)
        write = upload.write

        def write_slowly(data: Any) -> int:
            self._fake.advance(0 if path.startswith(".checkpointer/") else self.seconds)
            return write(data)

        upload.write = write_slowly  # type: ignore[method-assign]
        return upload


class Megabytes(PlainFormat):
    """Writes a payload of ``state["megabytes"]`` chunks of a megabyte."""

    def write(self, state: Any, stream: Writable) -> None:
        for _ in range(state["megabytes"]):
            stream.write(bytes(1_000_000))


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "MB/s" in record.getMessage()]


def test_a_manager_logs_the_progress_of_a_long_save(caplog: pytest.LogCaptureFixture) -> None:
    """It logs every ten seconds. The last checkpoint, if there is one, gives the expected size."""
    clock, state = FakeClock(), {"megabytes": 5}
    storage = Slow(clock)
    caplog.set_level(logging.INFO, "checkpointer")
    with CheckpointManager(storage, POLICY, state=lambda: state, format=Megabytes(), clock=clock) as manager:
        manager.observe({}, step=1, epoch=0)
        assert [] == lines(caplog)

        storage.seconds = 6.0
        state["megabytes"] = 6
        manager.observe({}, step=2, epoch=1)

    assert [
        "epoch=1-step=2.ckpt: 2.0 of about 5.0 MB written (0.167 MB/s)",
        "epoch=1-step=2.ckpt: 4.0 of about 5.0 MB written (0.167 MB/s)",
        "epoch=1-step=2.ckpt: 6.0 MB written (0.167 MB/s)",
    ] == lines(caplog)


def test_a_first_save_logs_no_expected_size(caplog: pytest.LogCaptureFixture) -> None:
    """Before the first save no size is known."""
    clock = FakeClock()
    storage = Slow(clock)
    storage.seconds = 10.0
    caplog.set_level(logging.INFO, "checkpointer")
    with CheckpointManager(storage, POLICY, state=lambda: {"megabytes": 1}, format=Megabytes(), clock=clock) as manager:
        manager.observe({}, step=1, epoch=0)

    assert ["epoch=0-step=1.ckpt: 1.0 MB written (0.1 MB/s)"] == lines(caplog)


def test_a_fetch_from_the_mirror_logs_its_progress(caplog: pytest.LogCaptureFixture) -> None:
    """Its size is known from the record."""
    mirror = MemoryStorage()
    with CheckpointManager(mirror, POLICY, state=lambda: {"megabytes": 9}, format=Megabytes()) as manager:
        manager.observe({}, step=1, epoch=0)
    clock = FakeClock()
    here = Slow(clock)
    here.seconds = 10.0
    caplog.set_level(logging.INFO, "checkpointer")
    with CheckpointManager(here, POLICY, format=Zeros(), clock=clock, mirror=mirror) as manager:
        assert manager.restore() is not None

    assert "epoch=0-step=1.ckpt: 4.2 of 9.0 MB copied (0.419 MB/s)" == lines(caplog)[0]


class Zeros(Megabytes):
    """Reads a payload of `Megabytes`."""

    def read(self, stream: Any, *, weights_only: bool, map_location: Any) -> Any:
        return {"megabytes": len(stream.read()) // 1_000_000}


@pytest.mark.parametrize(
    ("size", "is_copy", "expected"),
    [
        (3_400_000_000, False, "a.ckpt: 1.2 of about 3.4 GB written (120 MB/s)"),
        (1_200_000_000, True, "a.ckpt: 1.2 of 1.2 GB copied (120 MB/s)"),
        (1_000_000_000, False, "a.ckpt: 1.2 GB written (120 MB/s)"),
        (None, False, "a.ckpt: 1.2 GB written (120 MB/s)"),
    ],
)
def test_amounts_have_the_unit_of_the_whole(
    size: int | None, is_copy: bool, expected: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A payload that is larger than expected has no expected size."""
    caplog.set_level(logging.INFO, "checkpointer")
    clock = FakeClock()
    transfer = Transfer("a.ckpt", clock, expected=size, is_copy=is_copy)
    clock.advance(10)

    transfer.note(1_200_000_000)
    assert 1_200_000_000 == transfer.bytes
    assert [expected] == lines(caplog)
