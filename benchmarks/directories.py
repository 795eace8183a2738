"""What a directory of many checkpoints holds."""

from __future__ import annotations

from collections.abc import Iterator

from checkpointer.records.record import Entry, Record


def records_of(count: int) -> Iterator[tuple[str, bytes]]:
    """Yield the names of so many checkpoints whose payloads are empty, and what their record files hold."""
    for step in range(1, count + 1):
        name = f"epoch=0-step={step}.ckpt"
        record = Record(
            name=name, step=step, epoch=0, metrics={"val_loss": 1 / step, "acc": 0.5}, time=float(step),
            size=0, digest=f"xxh3-128:{step:032x}", format="torch", run="bench", serial=step, token=f"{step:032x}",
            reason="step reached a multiple of 1; kept by everything",
        )  # fmt: skip
        yield name, Entry(record=record).to_json()
