"""The callbacks for a Trainer of ``lightning``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from checkpointer_lightning.checkpoint_callback import Composed
from checkpointer_lightning.model_checkpoint import DropIn, make_on_use
from checkpointer_lightning.packages import Package

__all__ = ["CheckpointCallback", "ModelCheckpoint"]

_PACKAGE = Package.load("lightning.pytorch")

from lightning.pytorch.callbacks import ModelCheckpoint as Theirs  # noqa: E402


class CheckpointCallback(Composed, Theirs):
    __doc__ = Composed.__doc__
    _package = _PACKAGE


if TYPE_CHECKING:

    class ModelCheckpoint(DropIn, Theirs):
        _package = _PACKAGE


def __getattr__(name: str) -> Any:
    return make_on_use(name, globals())
