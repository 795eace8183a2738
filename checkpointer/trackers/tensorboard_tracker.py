"""TensorBoard: markers where checkpoints were saved, and which is best and last."""

from __future__ import annotations

from typing import Any

from checkpointer.records.record import Record
from checkpointer.trackers.base import Following


class TensorBoardTracker(Following):
    """Marks committed checkpoints in TensorBoard; no file is copied there.

    ``checkpoint/last`` and ``checkpoint/best`` are scalars: at each step that was saved, the step that the alias names.
    The text ``checkpoint`` says name and reason.

    Args:
        writer: A ``torch.utils.tensorboard.SummaryWriter``, or the folder for a new one.

    Raises:
        ImportError: If tensorboard is not installed; the message names the extra.
    """

    def __init__(self, writer: Any) -> None:
        super().__init__()
        if isinstance(writer, str) or hasattr(writer, "__fspath__"):
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                msg = "TensorBoardTracker needs tensorboard: pip install 'torch-checkpointer[tensorboard]'"
                raise ImportError(msg) from error
            writer = SummaryWriter(writer)
        self._writer = writer

    def _put(self, record: Record, where: str, aliases: list[str]) -> None:
        self._writer.add_text("checkpoint", f"`{record.name}`: {record.reason}", record.step)

    def _point(self, alias: str, record: Record) -> None:
        self._writer.add_scalar(f"checkpoint/{alias}", record.step, self._step)
        self._writer.flush()
