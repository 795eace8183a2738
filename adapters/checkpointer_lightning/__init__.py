"""Checkpoints for Lightning: the composed policy as a callback, and a drop-in for its ``ModelCheckpoint``.

If the package ``lightning`` is installed, the classes here are for its Trainer. If only ``pytorch_lightning`` is
installed, they are for the Trainer of ``pytorch_lightning``. If both are installed, and your Trainer is one of
``pytorch_lightning``, import the classes from ``checkpointer_lightning.for_pytorch_lightning``.
"""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from checkpointer_lightning.for_lightning import CheckpointCallback, ModelCheckpoint

__all__ = ["CheckpointCallback", "ModelCheckpoint"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    specs = {root: find_spec(root) for root in ("lightning", "pytorch_lightning")}
    # A plain folder of that name has no origin. If neither is installed, the import raises.
    root = next((root for root, spec in specs.items() if spec is not None and spec.origin), "lightning")
    return getattr(importlib.import_module(f"{__name__}.for_{root}"), name)


def __dir__() -> list[str]:
    return __all__
