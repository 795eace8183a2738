"""Writing in the background: attributes and loggers name files that exist, and it leaves what waiting leaves."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from checkpointer_lightning import CheckpointCallback, ModelCheckpoint
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from tiny import BATCHES, Model, files, fit, held, quiet, seen, together

from checkpointer import AnyOf, CheckpointManager, EveryEpochs, EverySteps, KeepBest, KeepLast, Policy
from checkpointer.commit.directory import Directory
from checkpointer.errors import SaveError
from checkpointer.records.record import Record
from checkpointer.save.background import Busy

pytestmark = quiet

POLICY = Policy(
    AnyOf(EveryEpochs(1), EverySteps(3)), [KeepBest(1, "val_loss", mode="min"), KeepLast(1)], name="{step}", last="link"
)
BOTH = [
    lambda directory, background: CheckpointCallback(directory, POLICY, background=background),
    lambda directory, background: ModelCheckpoint(directory, "{step}", monitor="val_loss", save_last=True),
    lambda directory, background: ModelCheckpoint(directory, "{step}", every_n_train_steps=1, save_last="link"),
]


RETIRED, LOOKED = threading.Event(), threading.Event()
"""The writer has retired what a save retires; the training thread has looked at what is shown then."""


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let only the writer thread wait for the disk longer than a batch, and linger after a delete."""
    sync = os.fsync

    def slowly(descriptor: int) -> None:
        if threading.current_thread().name == "checkpointer-writer":
            time.sleep(0.01)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", slowly)
    conclude = Directory.conclude

    def lingering(directory: Directory, **options: Any) -> list[Record]:
        retired = conclude(directory, **options)
        if threading.current_thread().name == "checkpointer-writer":
            LOOKED.clear()
            RETIRED.set()
            LOOKED.wait(0.3)
            RETIRED.clear()
        return retired

    monkeypatch.setattr(Directory, "conclude", lingering)


def shown(callback: Any) -> set[str]:
    """Return the paths that a callback shows."""
    paths = {callback.best_model_path, callback.last_model_path, callback.kth_best_model_path, *callback.best_k_models}
    return paths - {""}


class Looking(pl.Callback):
    """Looks at each hook whether what is shown is there, and whether something is being written."""

    def __init__(self, callback: Any) -> None:
        self.callback = callback
        self.missing: list[str] = []
        self.under_way = 0

    def look(self, *, waits: bool = False) -> None:
        training = self.callback._session
        manager = training.manager if training is not None else None
        if manager is not None and manager.session.background_status is not None:
            is_under_way = bool(manager.session.background_status.unfinished)
            self.under_way += is_under_way
            if is_under_way and waits:
                RETIRED.wait(0.3)
        self.missing += [path for path in shown(self.callback) if not os.path.exists(path)]
        LOOKED.set()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.look()  # While it is written.
        self.look(waits=True)  # When the old is gone.

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.look()

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self.look()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.look()


class Notified(DummyLogger):
    """Looks whether the files that it is called for exist."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Any] = []
        self.missing: list[str] = []

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        assert threading.current_thread() is threading.main_thread()
        path = checkpoint_callback._last_checkpoint_saved
        self.steps.append(os.path.basename(path))
        self.missing += [path for path in {path, *shown(checkpoint_callback)} if not os.path.exists(path)]


def train(
    directory: Path, make: Callable[..., Any], *, background: Busy | None, **kw: Any
) -> tuple[Any, Looking, Notified]:
    """Train with a callback and what looks at it."""
    callback = make(directory, background)
    looking, notified = Looking(callback), Notified()
    plugins = [AsyncCheckpointIO()] if background and isinstance(callback, ModelCheckpoint) else []
    fit([looking, callback], plugins=plugins, logger=notified, **kw)
    return callback, looking, notified


@pytest.mark.usefixtures("slow_disk")
@pytest.mark.parametrize("make", BOTH, ids=["policy", "drop-in", "each step"])
def test_71_and_72_it_leaves_and_logs_what_waiting_does_and_shows_only_files_that_exist(
    tmp_path: Path, make: Callable[..., Any]
) -> None:
    """The weights are those of the moment although the training went on. Each file is logged once, when it is whole."""
    there, _, first = train(tmp_path / "waits", make, background=None)
    callback, looking, notified = train(tmp_path / "behind", make, background="wait")
    assert looking.under_way
    assert [] == looking.missing == notified.missing
    assert first.steps == notified.steps
    assert held(tmp_path / "waits") == held(tmp_path / "behind")
    assert seen(there, tmp_path / "waits") == seen(callback, tmp_path / "behind")


@pytest.mark.usefixtures("slow_disk")
def test_a_resume_from_what_was_written_behind_goes_on_as_if_it_had_waited(tmp_path: Path) -> None:
    """The state in a file counts what was under way as done: it is read when it is."""
    sides: tuple[tuple[Path, Busy | None], ...] = ((tmp_path / "waits", None), (tmp_path / "behind", "wait"))
    for directory, background in sides:
        train(directory, BOTH[0], background=background, max_epochs=2)
        train(directory, BOTH[0], background=background, max_epochs=4, resume="last")
    assert held(tmp_path / "waits") == held(tmp_path / "behind")
    found = [
        [(record.name, record.metrics.get("val_loss")) for record in CheckpointManager(tmp_path / name).records]
        for name in ("waits", "behind")
    ]
    assert found[0] == found[1]


@pytest.mark.usefixtures("slow_disk")
def test_an_exception_waits_for_what_is_under_way_and_rescues(tmp_path: Path) -> None:
    """Both exist, the exception is raised, and loggers are called for the file that was pending."""
    callback = CheckpointCallback(tmp_path, POLICY, background="wait")
    looking, notified = Looking(callback), Notified()
    with pytest.raises(ZeroDivisionError, match="the training breaks"):
        fit([callback, looking], model=Model(fails_at=BATCHES + 1), logger=notified)
    assert ["last.ckpt", "rescue-step=5.ckpt", "step=4.ckpt"] == files(tmp_path)
    assert [] == looking.missing == notified.missing
    assert "step=4.ckpt" in notified.steps


@pytest.mark.parametrize("number", [1, 5], ids=["the first", "the last"])
def test_71_an_error_of_the_thread_ends_the_training_and_shows_no_file_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """It comes with the next report, or at the end at the latest."""
    policy = Policy(EveryEpochs(1), [KeepBest(1, "val_loss", mode="min")], name="{step}", last="link", rescue=False)
    callback = CheckpointCallback(tmp_path, policy, background="wait")
    sync, saves = os.fsync, [0]

    def full(descriptor: int) -> None:
        if threading.current_thread().name == "checkpointer-writer" and saves[0] == number:
            raise OSError(28, "No space left on device")
        sync(descriptor)

    class Counting(pl.Callback):
        def on_save_checkpoint(self, *args: Any) -> None:
            saves[0] += 1

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SaveError, match="No space left on device"):
        fit([Counting(), callback], model=Model([5.0, 4.0, 3.0, 2.0, 1.0]))
    assert (["last.ckpt", "step=16.ckpt"] if number > 1 else []) == files(tmp_path)
    assert {*map(str, tmp_path.glob("*.ckpt"))} == shown(callback)


class Plugin(TorchCheckpointIO):
    """Not Lightning's own."""


def test_what_a_plugin_writes_is_waited_for_and_that_is_said(tmp_path: Path) -> None:
    """It reads the live state, which the training would change under it."""
    callback = CheckpointCallback(tmp_path, POLICY, background="wait")
    with pytest.warns(UserWarning, match="background has no effect here"):
        fit(callback, plugins=[Plugin()], max_epochs=1)
    assert ["last.ckpt", "step=4.ckpt"] == files(tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("slow_disk")
def test_with_two_ranks_both_show_what_is_there(tmp_path: Path) -> None:
    """Rank 0 writes; the other rank gets the result with the next report."""

    def work() -> None:
        callback, looking, notified = train(tmp_path / "run", BOTH[0], background="wait", strategy="ddp", devices=2)
        rank = os.environ["LOCAL_RANK"]
        assert looking.under_way or rank != "0"
        assert [] == looking.missing == notified.missing
        names = sorted(os.path.basename(path) for path in shown(callback))
        (tmp_path / f"rank{rank}").write_text(" ".join([*names, "logged", *notified.steps]))

    together(work, work)
    first, second = ((tmp_path / f"rank{rank}").read_text().split(" logged") for rank in (0, 1))
    assert first[0] == second[0]
    assert set(files(tmp_path / "run")) >= set(first[0].split())
    assert first[1]
    assert not second[1]
