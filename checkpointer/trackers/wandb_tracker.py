"""Weights & Biases: checkpoints as artifacts, ``best`` and ``last`` as their aliases and in the run's summary."""

from __future__ import annotations

import os
from typing import Any

from checkpointer.records.record import Record
from checkpointer.trackers.base import Following, Upload


class WandbTracker(Following):
    """Logs committed checkpoints as versions of one W&B artifact, once they are durable; works offline.

    Each version has the record as its metadata, and the aliases that the checkpoint had at that time. A metric that is
    reported after the save may make an older checkpoint the best. The aliases of the versions do not change then. The
    run's summary always has the current names, as ``checkpoint/best`` and ``checkpoint/last``. Nothing is removed from
    W&B.

    Args:
        run: A ``wandb`` run; None takes the active one.
        upload: Which checkpoints become artifacts: ``"all"``, ``"best"`` (those that are the best when they are saved
            or ranked), or ``"none"``.
        name: The artifact's name; None takes ``checkpoint-`` and the run's id.

    Raises:
        ImportError: If wandb is not installed; the message names the extra.
        RuntimeError: If ``run`` is None and W&B has no active run.

    Example:
        >>> from checkpointer.trackers.wandb_tracker import WandbTracker
        >>> tracker = WandbTracker(upload="best")  # doctest: +SKIP
        >>> CheckpointManager("runs/a", policy, state=state, listeners=[tracker])  # doctest: +SKIP
    """

    def __init__(self, run: Any = None, *, upload: Upload = "all", name: str | None = None) -> None:
        super().__init__(upload)
        wandb = self._package("wandb", "wandb")
        self._run = run or wandb.run
        if self._run is None:
            msg = "there is no active W&B run; call wandb.init() first, or pass run="
            raise RuntimeError(msg)
        self._artifact = wandb.Artifact
        self._name = name or f"checkpoint-{self._run.id}"

    def _put(self, record: Record, where: str, aliases: list[str]) -> None:
        metadata = {key: value for key, value in record.to_dict().items() if key != "line"}
        artifact = self._artifact(self._name, type="model", metadata=metadata)
        if os.path.isdir(where):
            artifact.add_dir(where)
        elif os.path.exists(where):
            # A copy: the file may be retired before it is uploaded.
            artifact.add_file(where, name=os.path.basename(record.name), policy="mutable")
        else:
            artifact.add_reference(where, checksum=False)
        self._run.log_artifact(artifact, aliases=[*aliases, f"step-{record.step}"])

    def _point(self, alias: str, record: Record) -> None:
        self._run.summary[f"checkpoint/{alias}"] = record.name
