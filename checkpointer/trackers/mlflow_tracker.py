"""MLflow: checkpoints as artifacts of a run, ``best`` and ``last`` as its tags."""

from __future__ import annotations

import os
from typing import Any

from checkpointer.records.record import Record
from checkpointer.trackers.base import Following, Upload


class MLflowTracker(Following):
    """Puts committed checkpoints into an MLflow run, once they are durable.

    The tags ``checkpoint.best`` and ``checkpoint.last`` name the best and the newest checkpoint. A checkpoint at a URL
    is not uploaded again: the tag ``checkpoint.<name>`` has its URL. When a checkpoint is retired, its artifact is
    deleted.

    Args:
        run_id: Id of the MLflow run; None takes the active run. If MLflow has no active run, a run is started.
        upload: Which checkpoints become artifacts: ``"all"``, ``"best"`` (those that are the best when they are saved
            or ranked), or ``"none"``.
        artifact_path: The folder among the run's artifacts.
        client: An ``mlflow.MlflowClient``; None makes one for MLflow's current tracking URI.

    Raises:
        ImportError: If mlflow is not installed; the message names the extra.

    Example:
        >>> from checkpointer.trackers.mlflow_tracker import MLflowTracker
        >>> tracker = MLflowTracker(upload="best")  # doctest: +SKIP
        >>> CheckpointManager("runs/a", policy, state=state, listeners=[tracker])  # doctest: +SKIP
    """

    def __init__(
        self,
        run_id: str | None = None,
        *,
        upload: Upload = "all",
        artifact_path: str = "checkpoints",
        client: Any = None,
    ) -> None:
        super().__init__(upload)
        mlflow = self._package("mlflow", "mlflow")
        active = mlflow.active_run() if run_id is None else None
        self._run = run_id or (active or mlflow.start_run()).info.run_id
        self._client = client or mlflow.MlflowClient()
        self._folder = artifact_path

    def _put(self, record: Record, where: str, aliases: list[str]) -> None:
        if os.path.exists(where):
            self._client.log_artifact(self._run, where, self._artifact(record).rpartition("/")[0])
        else:
            self._client.set_tag(self._run, f"checkpoint.{record.name}", where)

    def _identity(self, record: Record) -> str:
        return record.name  # A checkpoint that replaces another has its artifact.

    def _artifact(self, record: Record) -> str:
        return f"{self._folder}/{record.name}"

    def _point(self, alias: str, record: Record) -> None:
        self._client.set_tag(self._run, f"checkpoint.{alias}", record.name)

    def on_retired(self, record: Record) -> None:
        """See `Listener.on_retired`."""
        if record.name not in self._there:
            return
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        self._there.discard(record.name)
        get_artifact_repository(self._client.get_run(self._run).info.artifact_uri).delete_artifacts(
            self._artifact(record)
        )
