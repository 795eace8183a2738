"""The callbacks for a Trainer of ``pytorch_lightning``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

try:
    from pytorch_lightning import Trainer
    from pytorch_lightning.callbacks import ModelCheckpoint as Theirs
    from pytorch_lightning.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
    from pytorch_lightning.strategies import Strategy
    from pytorch_lightning.utilities.rank_zero import rank_zero_info
except ModuleNotFoundError as error:
    if error.name not in ("pytorch_lightning",):
        raise
    _msg = f"{__name__} needs pytorch_lightning, which is not installed: pip install pytorch-lightning"
    raise ImportError(_msg) from error

from checkpointer_lightning.composed import Composed
from checkpointer_lightning.drop_in import DropIn
from checkpointer_lightning.packages import Package

__all__ = ["CheckpointCallback", "ModelCheckpoint"]

_PACKAGE = Package(
    root="pytorch_lightning",
    trainer=Trainer,
    strategy=Strategy,
    torch_io=TorchCheckpointIO,
    async_io=AsyncCheckpointIO,
    info=rank_zero_info,
)


class CheckpointCallback(Composed, Theirs):
    __doc__ = Composed.__doc__
    _package = _PACKAGE


if TYPE_CHECKING:

    class ModelCheckpoint(DropIn, Theirs):
        _package = _PACKAGE


def __getattr__(name: str) -> Any:
    """Make the drop-in when it is first used: LightningCLI looks up a short class name among all existing classes."""
    if name != "ModelCheckpoint":
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    body = {"__module__": __name__, "__doc__": DropIn.__doc__, "_package": _PACKAGE}
    return globals().setdefault(name, type(name, (DropIn, Theirs), body))
