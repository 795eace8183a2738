"""Continuing a run of Lightning's own class: its files become checkpoints of the run."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from fsspec.core import url_to_fs

from checkpointer import CheckpointerWarning, CheckpointManager, Save
from checkpointer_lightning.siblings import name_in

__all__ = ["adopt"]


def adopt(manager: CheckpointManager, directory: str, scores: Mapping[str, Any], monitor: str | None) -> None:
    """Adopt the files that Lightning ranked, with their scores. A file that cannot be read is left alone."""
    found = sorted((*_progress_of(path), path) for path in scores if _is_in(directory, path))
    for step, epoch, path in found:
        if step < 0:
            msg = f"{path} is not adopted: its step cannot be read; it is neither ranked nor removed"
            warnings.warn(msg, CheckpointerWarning, stacklevel=3)
            continue
        metrics = {} if monitor is None else {monitor: scores[path]}
        decision = manager.session.decide(metrics, step, epoch, due="Lightning had saved it")
        if isinstance(decision, Save):
            manager.session.commit(decision, path)


def _is_in(directory: str, path: str) -> bool:
    if name_in(directory, path).startswith(".."):
        return False
    filesystem, name = url_to_fs(path)
    return bool(filesystem.isfile(name))


def _progress_of(path: str) -> tuple[int, int]:
    try:
        filesystem, name = url_to_fs(path)
        with filesystem.open(name, "rb") as stream:
            state = torch.load(stream, map_location="meta", weights_only=True)
        return int(state["global_step"]), int(state["epoch"])
    except Exception:  # The file is not this library's, and its content must not end the training.
        return -1, -1
