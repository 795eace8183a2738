"""Trackers are called for checkpoints once they are durable, and their aliases follow the records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from checkpointer import CheckpointManager, EverySteps, KeepBest, KeepLast, Listener, Policy

POLICY = Policy(EverySteps(1), [KeepBest(1, "loss", mode="min"), KeepLast(1)], name="{step}")


def train(directory: Path | None, tracker: Listener) -> None:
    """Four saves; the last one's metric comes after it."""
    with CheckpointManager(directory, POLICY, state=lambda: {"w": 1}, listeners=[tracker]) as manager:
        for step, loss in enumerate([0.5, 0.3, 0.4], start=1):
            manager.observe({"loss": loss}, step, 0, epoch_end=False)
        manager.observe({}, 4, 0, epoch_end=False)
        manager.observe({"loss": 0.1}, 4, 0, epoch_end=False)


class Collecting(Listener):
    """Collects its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []

    def on_opened(self, manager: Any) -> None:
        self.calls.append(("opened", type(manager).__name__))

    def on_saved(self, record: Any) -> None:
        self.calls.append(("saved", record.name))

    def on_attached(self, record: Any) -> None:
        self.calls.append(("attached", f"{record.name} {record.metrics['loss']}"))

    def on_retired(self, record: Any) -> None:
        self.calls.append(("retired", record.name))


def test_a_listener_is_called_for_every_change_of_a_checkpoint() -> None:
    """First of the manager, then of what is there, what was attached, what is gone."""
    listener = Collecting()
    train(None, listener)

    assert ("opened", "CheckpointManager") == listener.calls[0]
    assert ["step=1.ckpt", "step=2.ckpt", "step=3.ckpt", "step=4.ckpt"] == [
        name for event, name in listener.calls if event == "saved"
    ]
    assert ["step=1.ckpt", "step=3.ckpt", "step=2.ckpt"] == [
        name for event, name in listener.calls if event == "retired"
    ]
    assert ("attached", "step=4.ckpt 0.1") == listener.calls[-1]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_mlflow_has_what_is_there_and_tags_for_best_and_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a real file store: what was retired is gone there too."""
    mlflow = pytest.importorskip("mlflow", reason="needs torch-checkpointer[mlflow]")
    from checkpointer.trackers.mlflow_tracker import MLflowTracker

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    with mlflow.start_run() as run:
        train(tmp_path / "run", MLflowTracker())
    client = mlflow.MlflowClient()
    tags = client.get_run(run.info.run_id).data.tags
    assert ("step=4.ckpt", "step=4.ckpt") == (tags["checkpoint.best"], tags["checkpoint.last"])
    assert ["checkpoints/step=4.ckpt"] == [file.path for file in client.list_artifacts(run.info.run_id, "checkpoints")]


@pytest.mark.filterwarnings("ignore")
def test_wandb_gets_versions_with_aliases_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run's summary names best and last; each version has its record as metadata."""
    wandb = pytest.importorskip("wandb", reason="needs torch-checkpointer[wandb]")
    from checkpointer.trackers.wandb_tracker import WandbTracker

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logged: list[tuple[str, list[str], int]] = []
    run = wandb.init(dir=str(tmp_path), project="p")
    log_artifact = run.log_artifact

    def remember(artifact: Any, aliases: list[str]) -> Any:
        logged.append((artifact.name.partition(":")[0], aliases, artifact.metadata["step"]))
        return log_artifact(artifact, aliases=aliases)

    run.log_artifact = remember
    train(tmp_path / "run", WandbTracker(upload="best"))
    summary = dict(run.summary)
    run.finish()

    assert [(["best", "last", "step-1"], 1), (["best", "last", "step-2"], 2), (["best", "last", "step-4"], 4)] == [
        (aliases, step) for _, aliases, step in logged
    ]
    assert ("step=4.ckpt", "step=4.ckpt") == (summary["checkpoint/best"], summary["checkpoint/last"])
    assert list(tmp_path.rglob("*.wandb"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_has_markers_for_best_and_last(tmp_path: Path) -> None:
    """Scalars: at each step that was saved, the step that the alias names."""
    pytest.importorskip("tensorboard", reason="needs torch-checkpointer[tensorboard]")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from checkpointer.trackers.tensorboard_tracker import TensorBoardTracker

    train(tmp_path / "run", TensorBoardTracker(tmp_path / "events"))
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    assert [(1, 1.0), (2, 2.0), (4, 4.0)] == [(e.step, e.value) for e in events.Scalars("checkpoint/best")]
    assert [1, 2, 3, 4] == [e.step for e in events.Scalars("checkpoint/last")]


def test_a_tracker_whose_package_is_missing_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """And `import checkpointer` needs none of them."""
    import sys

    from checkpointer.trackers.mlflow_tracker import MLflowTracker
    from checkpointer.trackers.wandb_tracker import WandbTracker

    for name, tracker in (("mlflow", MLflowTracker), ("wandb", WandbTracker)):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ImportError, match=rf"torch-checkpointer\[{name}\]"):
            tracker()
