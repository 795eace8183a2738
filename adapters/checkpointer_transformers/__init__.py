"""Checkpoints of the Hugging Face Trainer: the Trainer writes them, a policy decides when, and which of them stay."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from checkpointer_transformers.attachment import attach
    from checkpointer_transformers.callback import CheckpointCallback
    from checkpointer_transformers.find_checkpoint import last_valid_checkpoint

__all__ = ["CheckpointCallback", "attach", "last_valid_checkpoint"]

_HOMES: Final = {"CheckpointCallback": "callback", "attach": "attachment", "last_valid_checkpoint": "find_checkpoint"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    for package in ("transformers", "accelerate"):
        spec = find_spec(package)
        if spec is None or spec.origin is None:  # A folder may have that name too.
            hint = "pip install 'torch-checkpointer[transformers]'"
            msg = f"{__name__}.{name} needs {package}, which is not installed: {hint}"
            raise ImportError(msg)
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
