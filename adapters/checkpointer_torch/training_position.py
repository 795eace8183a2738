"""Where a training is: its epoch, its finished steps, and its place in the data."""

from __future__ import annotations

import attrs

from checkpointer import Record
from checkpointer_torch.data_position import DataPosition


@attrs.frozen(kw_only=True)
class LoopProgress:
    """The place of the loop, at a boundary between two steps."""

    epoch: int = 0
    """0-based index of the epoch in progress, or of the next one."""
    step: int = 0
    """Finished steps."""
    batch: int = 0
    """Batches of this epoch that those steps have used."""
    source: str = ""
    """The checkpoint this was resumed from; empty at the start of a training."""


class TrainingPosition:
    """Counts what a training has finished."""

    def __init__(self) -> None:
        self.data = DataPosition()
        self.epoch = self.step = 0
        self.is_within_step = self.is_fed = False
        """Whether a step has begun, and whether this epoch's batches were asked for."""
        self.unfed_since: int | None = None
        """The step at which the epoch began, if the loop does not see its batches."""
        self.source = ""
        self._epoch_began_at = 0
        self._left_over = (0, 0)

    @property
    def progress(self) -> LoopProgress:
        """The place of the training."""
        return LoopProgress(epoch=self.epoch, step=self.step, batch=self.data.used, source=self.source)

    @property
    def is_unstepped(self) -> bool:
        """Whether the epoch has had no step so far."""
        return self.step == self._epoch_began_at and not self.data.used

    @property
    def left_over(self) -> int:
        """Batches of the epoch that has just ended that are in no step."""
        count, step = self._left_over
        return count if step == self.step else 0

    def go_on(self, source: str, *, epoch: int, step: int) -> None:
        """Take over the counts of a checkpoint; those of the data belong to `DataPosition`."""
        self.epoch, self.step, self.source = epoch, step, source
        self._epoch_began_at, self.is_within_step = step, False

    def begin_at(self, record: Record) -> None:
        """Take step and epoch from the record of a checkpoint that no loop wrote."""
        self.go_on(record.name, epoch=record.epoch + record.epoch_end, step=record.step)
        self.data.used = self.data.given = 0

    def end_epoch(self) -> int:
        """Go on to the next epoch, and return the one that has ended; without a step it counts as one."""
        data = self.data
        if self.is_unstepped and (data.given or not self.is_fed):
            self.step += 1  # Else every epoch would be saved as the same step.
            data.used = data.given
        self._left_over = (data.given - data.used, self.step) if data.is_accumulating else (0, 0)
        data.end()
        self.is_within_step = self.is_fed = False
        self.unfed_since, self._epoch_began_at = None, self.step
        self.epoch += 1
        return self.epoch - 1
