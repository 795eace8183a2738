"""Restore: newest, best, by name, by step; verified, with fallback; forks; moved folders; ten thousand records."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from support.plain_format import PlainFormat

from checkpointer import (
    CheckpointerWarning,
    CheckpointManager,
    EverySteps,
    KeepAll,
    KeepBest,
    KeepLast,
    Policy,
    explain,
)
from checkpointer.commit.index import load
from checkpointer.errors import (
    CorruptError,
    NotFoundError,
    NoValidCheckpointError,
    RestoreError,
    SchemaError,
    StorageError,
    UnsafePayloadError,
)
from checkpointer.storage import LocalStorage, MemoryStorage
from checkpointer.storage.owner import new_owner

ALL = Policy(EverySteps(1), [KeepAll(), KeepBest(1, "loss", mode="min")])


def make(directory: Path, policy: Policy = ALL, **kwargs: Any) -> CheckpointManager:
    """A manager whose state is what ``box`` holds."""
    return CheckpointManager(directory, policy, state=kwargs.pop("state", dict), format=PlainFormat(), **kwargs)


def train(directory: Path, losses: list[float], policy: Policy = ALL, start: int = 0) -> None:
    """Save one checkpoint per loss, whose state is its step."""
    box = {"step": start}
    with make(directory, policy, state=lambda: dict(box)) as manager:
        if start:
            manager.restore(start)
        for box["step"], loss in enumerate(losses, start=start + 1):
            manager.observe({"loss": loss}, step=box["step"], epoch=0, epoch_end=False)


def payload(directory: Path, step: int) -> Path:
    """Return the path of the payload of a step."""
    return directory / f"epoch=0-step={step}.ckpt"


def opened(directory: Path, *, missing: bool) -> CheckpointManager:
    """Open the directory; the manager warns of payloads that are ``missing``, or have another size."""
    said = pytest.warns(CheckpointerWarning, match="not count") if missing else contextlib.nullcontext()
    with said:
        return make(directory)


def restored_step(directory: Path, which: str | int | None = None) -> int:
    """Restore and return the step, after checking that the state is of that step."""
    with make(directory) as manager:
        restored = manager.restore(which)
        assert restored is not None
        assert {"step": restored.step} == restored.state
        return restored.step


def test_empty_directory_restores_nothing(tmp_path: Path) -> None:
    """None, so that a first start and a restart are one code path."""
    assert make(tmp_path).restore() is None


@pytest.mark.parametrize(
    ("which", "step"),
    [(None, 3), ("last", 3), ("best", 2), (1, 1), ("epoch=0-step=2", 2), ("epoch=0-step=2.ckpt", 2)],
)
def test_restore_finds_by_every_handle(tmp_path: Path, which: str | int | None, step: int) -> None:
    """Newest, best, step, and name with or without extension."""
    train(tmp_path, [0.9, 0.1, 0.5])
    assert step == restored_step(tmp_path, which)


def test_unknown_name_or_step_lists_what_is_there(tmp_path: Path) -> None:
    """The error names the value and the newest checkpoints."""
    train(tmp_path, [0.9])
    with make(tmp_path) as manager:
        with pytest.raises(
            NotFoundError, match=r"no checkpoint 'nope'; the newest are: epoch=0-step=1.ckpt \(step 1\)"
        ):
            manager.restore("nope")
        with pytest.raises(FileNotFoundError, match="no checkpoint at step 7"):
            manager.restore(7)


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-3]), "has 8 bytes, and its record says 11"),
        (lambda path: path.write_bytes(b"\x00" + path.read_bytes()[1:]), "its digest differs"),
        (lambda path: path.unlink(), "is gone, though its record is there"),
    ],
    ids=["truncated", "flipped byte", "gone"],
)
def test_bad_payload_falls_back_to_the_next_newest_and_says_why(tmp_path: Path, damage: Any, why: str) -> None:
    """The newest is bad: the one before is restored, with a warning; asked for by name it is an error."""
    train(tmp_path, [0.9, 0.1, 0.5])
    damage(payload(tmp_path, 3))
    missing = "digest" not in why
    with opened(tmp_path, missing=missing) as manager:
        with pytest.warns(CheckpointerWarning, match=f"restored epoch=0-step=2.ckpt .step 2., because newer .*{why}"):
            restored = manager.restore()
        assert restored is not None
        assert 2 == restored.step
    with opened(tmp_path, missing=missing) as manager, pytest.raises(CorruptError, match=why):
        manager.restore(3)


def test_best_falls_back_to_the_next_best(tmp_path: Path) -> None:
    """Not to the newest."""
    train(tmp_path, [0.9, 0.1, 0.5, 0.8])
    payload(tmp_path, 2).write_bytes(b"")
    with opened(tmp_path, missing=True) as manager:
        with pytest.warns(CheckpointerWarning, match="restored epoch=0-step=3.ckpt"):
            restored = manager.restore("best")
        assert restored is not None
        assert 3 == restored.step


def test_no_valid_checkpoint_is_an_error_not_a_fresh_start(tmp_path: Path) -> None:
    """It lists every bad one with its reason."""
    train(tmp_path, [0.9, 0.1])
    for step in (1, 2):
        payload(tmp_path, step).write_bytes(b"")
    with (
        opened(tmp_path, missing=True) as manager,
        pytest.raises(NoValidCheckpointError, match=r"step=2.*step=1.*does not start over"),
    ):
        manager.restore()


def test_half_a_record_falls_back_and_its_name_stays_taken(tmp_path: Path) -> None:
    """A damaged record is reported, and its payload is not used and not overwritten."""
    train(tmp_path, [0.9, 0.1])
    record = tmp_path / ".checkpointer/records/epoch=0-step=2.ckpt.json"
    record.write_bytes(record.read_bytes()[:100])
    with make(tmp_path) as manager:
        with pytest.warns(CheckpointerWarning, match="restored epoch=0-step=1.ckpt .*is not valid JSON"):
            manager.restore()
        decision = manager.observe({"loss": 0.3}, step=2, epoch=0, epoch_end=False)
        assert "epoch=0-step=2-v1.ckpt" == decision.name  # type: ignore[union-attr]
    assert payload(tmp_path, 2).exists()


def test_only_half_a_record_is_an_error(tmp_path: Path) -> None:
    """A directory whose one record is torn must not look empty."""
    train(tmp_path, [0.9])
    record = tmp_path / ".checkpointer/records/epoch=0-step=1.ckpt.json"
    record.write_bytes(record.read_bytes()[:50])
    with make(tmp_path) as manager, pytest.raises(NoValidCheckpointError, match="is not valid JSON"):
        manager.restore()


def test_record_of_a_future_schema_is_its_own_error(tmp_path: Path) -> None:
    """A record of a newer version is an error, and nothing changes."""
    train(tmp_path, [0.9])
    record = tmp_path / ".checkpointer/records/epoch=0-step=1.ckpt.json"
    record.write_text(record.read_text().replace('"schema": 1', '"schema": 99'))
    with pytest.raises(SchemaError, match=r"has schema 99; this version of torch-checkpointer reads up to 1. Upgrade"):
        make(tmp_path)


def test_record_that_leads_out_of_the_directory_is_refused(tmp_path: Path) -> None:
    """A name from storage is data: it cannot point anywhere else."""
    train(tmp_path, [0.9, 0.5])
    record = tmp_path / ".checkpointer/records/epoch=0-step=2.ckpt.json"
    record.write_text(record.read_text().replace('"name": "epoch=0-step=2.ckpt"', '"name": "../../etc/passwd"'))
    with pytest.warns(CheckpointerWarning, match="expected a relative path inside the directory"):
        assert 1 == restored_step(tmp_path)


def test_directory_of_foreign_checkpoints_is_not_an_empty_one(tmp_path: Path) -> None:
    """restore() does not start over beside unknown checkpoints; without restore() they are left alone."""
    (tmp_path / "epoch=3-step=9.ckpt").write_bytes(b"lightning")
    with make(tmp_path) as manager:
        with pytest.raises(NoValidCheckpointError, match=r"has no record, but files such as epoch=3-step=9.ckpt"):
            manager.restore()
        assert manager.observe({"loss": 1.0}, step=9, epoch=3)
        assert ["epoch=3-step=9-v1.ckpt"] == [record.name for record in manager.records]
    assert b"lightning" == (tmp_path / "epoch=3-step=9.ckpt").read_bytes()


def test_foreign_files_of_other_kinds_do_not_matter(tmp_path: Path) -> None:
    """Logs and configs live beside checkpoints."""
    (tmp_path / "config.yaml").write_text("a: 1")
    assert make(tmp_path).restore() is None


def test_read_only_directory_restores_but_refuses_to_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The refusal comes at construction, before an hour of training is lost."""
    train(tmp_path, [0.9])

    def refuse(*_: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(LocalStorage, "_new_staged", refuse)
    with pytest.raises(StorageError, match=r"cannot write to .*: Read-only file system; choose a directory"):
        make(tmp_path)
    reader = CheckpointManager(tmp_path, format=PlainFormat())
    restored = reader.restore()
    assert restored is not None
    assert 1 == restored.step
    reader.close()


def test_pickle_bomb_is_refused_and_does_not_run(tmp_path: Path) -> None:
    """A payload that would run code is an error that names what was refused; falling back would not help."""
    import os

    import torch

    marker = tmp_path / "pwned"

    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(marker),)

    policy = Policy(EverySteps(1), [KeepLast(1)])
    manager = CheckpointManager(tmp_path / "run", policy, state=lambda: {"w": torch.ones(2), "bomb": Bomb()})
    with pytest.warns(CheckpointerWarning, match=r"state\['bomb'\] is a .*Bomb.*, which a safe load refuses"):
        manager.observe({}, step=1, epoch=0)
    with pytest.raises(UnsafePayloadError, match="weights_only=False"):
        manager.restore()
    assert not marker.exists()
    manager.close()


def test_resume_from_an_older_step_abandons_what_lies_beyond(tmp_path: Path) -> None:
    """Listed, not ranked, not deleted, and still abandoned after a restart; their names stay taken."""
    policy = Policy(EverySteps(1), [KeepBest(1, "loss", mode="min"), KeepLast(2)])
    train(tmp_path, [0.5, 0.4, 0.1], Policy(EverySteps(1), [KeepAll()]))
    with make(tmp_path, policy) as manager:
        restored = manager.restore(1)
        assert restored is not None
        assert [1] == [record.step for record in manager.records]
        assert [2, 3] == [record.step for record in manager.session.manifest.abandoned]
        for step, loss in ((2, 0.45), (3, 0.44), (4, 0.43)):
            manager.observe({"loss": loss}, step=step, epoch=0, epoch_end=False)
        assert 4 == manager.best.step  # type: ignore[union-attr]
        assert "resumed from" in explain(manager.policy, manager.session.manifest)["epoch=0-step=1.ckpt"]
    with make(tmp_path, policy) as manager:
        restored = manager.restore()
        assert restored is not None
        assert "epoch=0-step=4.ckpt" == restored.record.name
        assert [2, 3] == [record.step for record in manager.session.manifest.abandoned]
    assert payload(tmp_path, 2).exists()
    assert payload(tmp_path, 3).exists()


def test_moved_and_copied_directories_work(tmp_path: Path) -> None:
    """Paths in records are relative, and the index is not believed over them."""
    train(tmp_path / "a", [0.5, 0.1, 0.3])
    (tmp_path / "a").rename(tmp_path / "b")
    shutil.copytree(tmp_path / "b", tmp_path / "c")
    for name in ("b", "c"):
        assert 3 == restored_step(tmp_path / name)
        assert 2 == restored_step(tmp_path / name, "best")


def test_index_saves_reading_and_is_never_believed_over_a_record(tmp_path: Path) -> None:
    """A second opening reads no record file; a changed one is read again; a corrupt index only costs time."""
    train(tmp_path, [0.5, 0.1, 0.3])
    storage = LocalStorage(tmp_path, new_owner())
    assert 0 == load(storage).reads
    record = tmp_path / ".checkpointer/records/epoch=0-step=3.ckpt.json"
    record.write_text(record.read_text().replace('"loss": 0.3', '"loss": 0.001'))
    assert 1 == load(storage).reads
    assert 3 == restored_step(tmp_path, "best")
    (tmp_path / ".checkpointer/index.json").write_bytes(b'{"schema": 1, "entries": {"x"')
    assert 3 == load(storage).reads
    assert 3 == restored_step(tmp_path)


def test_weights_are_skipped_unless_asked_for(tmp_path: Path) -> None:
    """A run cannot resume from weights; restoring them says so."""
    policy = Policy(EverySteps(1), [KeepAll()], contents="weights")
    with pytest.warns(CheckpointerWarning, match="cannot resume a run"):
        train(tmp_path, [0.5], policy)
    reader = CheckpointManager(tmp_path, format=PlainFormat())
    with pytest.raises(RestoreError, match="there are only weights"):
        reader.restore()
    with pytest.raises(RestoreError, match="holds only weights"):
        reader.restore(1)
    assert reader.restore(contents="any") is not None


def test_looking_at_a_directory_writes_nothing(tmp_path: Path) -> None:
    """A manager without state is a reader."""
    train(tmp_path, [0.5, 0.1])
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with CheckpointManager(tmp_path, format=PlainFormat()) as reader:
        assert [1, 2] == [record.step for record in reader.records]
        assert reader.restore() is not None
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


class Unanswering(MemoryStorage):
    """An object store that is out of reach when one payload is read."""

    unread = ""

    def open(self, path: str) -> BinaryIO:
        if path == self.unread:
            raise TimeoutError(path)
        return super().open(path)


def test_a_store_that_does_not_answer_abandons_nothing() -> None:
    """The newest checkpoint may be whole: going on from an older one would give up what came after it."""
    storage = Unanswering()
    policy = Policy(EverySteps(1), [KeepAll()])
    with CheckpointManager(storage, policy, state=lambda: {"w": 1}) as manager:
        for step in (1, 2):
            manager.observe({}, step=step, epoch=0, epoch_end=False)
        storage.unread = manager.records[-1].name
    with CheckpointManager(storage, policy, state=dict) as manager:
        with pytest.raises(RestoreError, match=r"could not be read \(TimeoutError: .*\); nothing was restored"):
            manager.restore()
        storage.unread = ""
        restored = manager.restore()

    assert restored is not None
    assert 2 == restored.step
