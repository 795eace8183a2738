"""Who a callback is: its key among the callbacks of a Trainer, its directory, and its place in that."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from checkpointer import Policy
from checkpointer.clock import SystemClock
from checkpointer.ports import Clock
from checkpointer_lightning import siblings
from checkpointer_lightning.packages import Package

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import ModelCheckpoint as Base
else:
    Base = object

__all__ = ["Identity"]


class Identity(Base):
    """The first of the bases of both callbacks."""

    _package: ClassVar[Package]
    _clock: Clock = SystemClock()
    _options: Mapping[str, Any] = {}
    """What else the manager is given."""
    _place: int | None = None
    _stage: str = ""

    @property
    def _base_key(self) -> str:
        """The state key, but for the number of those that are equal."""
        raise NotImplementedError

    def _make_policy(self) -> Policy:
        raise NotImplementedError

    @property  # type: ignore[misc]
    def __class__(self) -> type[Any]:
        """The class, which the Trainer of the other package asks for: to it this is a stranger, whatever it is."""
        self._package.refuse_caller(type(self).__name__)
        return type(self)

    @property
    def state_key(self) -> str:
        """Key of the callback's state in a checkpoint: distinct among the callbacks of a Trainer, whatever they are."""
        key = self._base_key
        number = siblings.guess_place(self, key) if self._place is None else self._place
        return f"{key}#{number + 1}" if number else key

    @property
    def _folder(self) -> str:
        return os.fspath(self.dirpath or "")

    def _resolve_folder(self, trainer: Any) -> str:
        # Asked before `setup` has found the directory.
        return str(self._ModelCheckpoint__resolve_ckpt_dir(trainer))

    def _number(self, trainer: Any) -> int:
        """Return how many callbacks of the Trainer come before this one in its directory."""
        folder = self._resolve_folder(trainer)
        same = [
            other
            for other in trainer.callbacks
            if isinstance(other, Identity) and other._resolve_folder(trainer) == folder
        ]
        return same.index(self) if self in same else 0

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """See `Callback.setup`: find the directory."""
        self._package.refuse_trainer(trainer, type(self).__name__)
        self._enter(trainer, pl_module, stage)
        self._place = siblings.place(self, self._base_key, trainer.callbacks)
        self._stage = stage

    def _enter(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Do what Lightning's own callback does in `setup`."""
        super().setup(trainer, pl_module, stage)
