"""TensorBoard: a marker at each saved step, and the steps of the best and the newest checkpoint."""

from __future__ import annotations

from typing import Any

from checkpointer.records.record import Record
from checkpointer.trackers.base import Following


class TensorBoardTracker(Following):
    """Writes a marker for each durable checkpoint into TensorBoard's log. No checkpoint is copied.

    When the best or the newest checkpoint changes, the scalar ``checkpoint/best`` or ``checkpoint/last`` gets a point:
    its x is the saved step, its y the step of the best or newest checkpoint. The text ``checkpoint`` has the name and
    the reason of each save.

    Args:
        writer: A ``torch.utils.tensorboard.SummaryWriter``, or the folder for a new one.

    Raises:
        ImportError: If tensorboard is not installed; the message names the extra.

    Example:
        >>> from checkpointer.trackers.tensorboard_tracker import TensorBoardTracker
        >>> tracker = TensorBoardTracker("runs/a/tensorboard")  # doctest: +SKIP
        >>> CheckpointManager("runs/a", policy, state=state, listeners=[tracker])  # doctest: +SKIP
    """

    def __init__(self, writer: Any) -> None:
        super().__init__()
        if isinstance(writer, str) or hasattr(writer, "__fspath__"):
            writer = self._package("torch.utils.tensorboard", "tensorboard").SummaryWriter(writer)
        self._writer = writer

    def _put(self, record: Record, where: str, aliases: list[str]) -> None:
        self._writer.add_text("checkpoint", f"`{record.name}`: {record.reason}", record.step)

    def _point(self, alias: str, record: Record) -> None:
        self._writer.add_scalar(f"checkpoint/{alias}", record.step, self._step)
        self._writer.flush()
