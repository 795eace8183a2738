"""Ways in which a checkpoint once was lost, each found by trying to lose one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from support.plain_format import PlainFormat

from checkpointer import (
    Attach,
    CheckpointerWarning,
    CheckpointManager,
    EverySteps,
    KeepAll,
    KeepBest,
    KeepEvery,
    KeepLast,
    Naming,
    Policy,
)
from checkpointer.commit.changes import Changes, changes_path, write_changes
from checkpointer.errors import SaveError
from checkpointer.storage import LocalStorage
from checkpointer.storage.owner import new_owner
from checkpointer.testing import MemoryStorage, die

EVERY = EverySteps(1)
SLOT = Policy(EVERY, [KeepBest(1, "loss", mode="min")], last="copy")


class Run:
    """A manager whose state is its step."""

    def __init__(self, storage: Any, policy: Policy, **kwargs: Any) -> None:
        self.step = 0
        self.manager = CheckpointManager(
            storage, policy, state=lambda: {"step": self.step}, format=PlainFormat(), **kwargs
        )

    def observe(self, step: int, loss: float | None = None) -> Any:
        self.step = step
        return self.manager.observe({} if loss is None else {"loss": loss}, step=step, epoch=0, epoch_end=False)

    def live(self) -> list[tuple[str, int]]:
        """Name and step of each checkpoint that counts, after checking that its payload is of that step."""
        for record in self.manager.records:
            restored = self.manager._directory.storage.open(record.name)
            with restored as stream:
                assert {"step": record.step} == json.load(stream)
        return [(record.name, record.step) for record in self.manager.records]


def test_two_live_managers_that_choose_one_name_keep_both() -> None:
    """The second one takes the next version, and the first one's record is not announced over."""
    storage = MemoryStorage()
    policy = Policy(EVERY, [KeepLast(1)])
    a, b = Run(storage, policy, label="a"), Run(storage, policy, label="b")
    b.observe(1)
    assert "epoch=0-step=1-v1.ckpt" == a.observe(1).name
    assert [("epoch=0-step=1.ckpt", 1)] == b.live()
    assert [("epoch=0-step=1-v1.ckpt", 1)] == a.live()


def test_fresh_run_leaves_the_slot_of_another_run_alone() -> None:
    """Its own last gets a version."""
    storage = MemoryStorage()
    policy = Policy(EVERY, [KeepEvery(steps=1000)], last="copy")
    first = Run(storage, policy)
    first.observe(1)
    first.manager.close()
    second = Run(storage, policy)
    with pytest.warns(CheckpointerWarning, match="other runs|is not this run's"):
        assert "last-v1.ckpt" == second.observe(1).name
    assert {"last.ckpt", "last-v1.ckpt"} <= set(storage.list())


def test_rolling_back_in_one_process_moves_the_abandoned_slot_aside() -> None:
    """The abandoned state keeps a name of its own; last names the new line."""
    storage = MemoryStorage()
    run = Run(storage, SLOT)
    run.observe(1, 0.1)
    run.observe(2, 0.5)
    run.manager.restore(1)
    run.observe(2, 0.3)
    assert [("epoch=0-step=1.ckpt", 1), ("last.ckpt", 2)] == run.live()
    assert ["epoch=0-step=2.ckpt"] == [record.name for record in run.manager.session.manifest.abandoned]


def test_pinning_changes_neither_line_nor_run() -> None:
    """An abandoned checkpoint may be pinned, and stays abandoned; a reader that pins does not adopt the run."""
    storage = MemoryStorage()
    policy = Policy(EVERY, [KeepAll()])
    run = Run(storage, policy)
    for step in range(1, 6):
        run.observe(step)
    run.manager.restore(3)
    run.manager.pin("epoch=0-step=5.ckpt")
    assert [1, 2, 3] == [step for _, step in run.live()]
    assert run.observe(4)
    run.manager.close()
    reader = Run(storage, Policy(EVERY, [KeepLast(1)]))
    reader.manager.pin("epoch=0-step=1.ckpt")
    with pytest.warns(CheckpointerWarning, match="of other runs; they are left alone"):
        reader.observe(1)
    assert {f"epoch=0-step={n}.ckpt" for n in range(1, 6)} <= set(storage.list())


def test_host_that_resumes_before_every_record_forks() -> None:
    """State taken at step 15, a record only at 20: the record is abandoned, and step 20 is saved again."""
    storage = MemoryStorage()
    policy = Policy(EverySteps(10), [KeepLast(1)])
    run = Run(storage, policy)
    run.observe(10)
    run.observe(15)
    saved = run.manager.session.state_dict()
    run.observe(20)
    run.manager.close()
    again = Run(storage, policy)
    again.manager.session.load_state_dict(saved)
    assert [] == again.live()
    decision = again.observe(20)
    assert not isinstance(decision, Attach)
    assert [20] == [record.step for record in again.manager.session.manifest.abandoned]


def test_host_state_of_an_older_line_resumes_on_that_line() -> None:
    """A state taken before a fork does not continue on the fork."""
    storage = MemoryStorage()
    run = Run(storage, Policy(EVERY, [KeepAll()]))
    for step in range(1, 6):
        run.observe(step)
    saved = json.loads(json.dumps(run.manager.session.state_dict()))
    run.manager.restore(2)
    run.observe(3)
    run.manager.session.load_state_dict(saved)
    assert [f"epoch=0-step={n}.ckpt" for n in range(1, 6)] == [name for name, _ in run.live()]


def test_symbolic_links_in_a_payload_are_refused_before_anything_is_retired(tmp_path: Path) -> None:
    """They would be committed and never verify."""

    def save(path: str) -> None:
        Path(path).mkdir()
        Path(path, "m").write_bytes(b"weights")
        if links:
            os.symlink("m", Path(path, "latest"))

    links = False
    manager = CheckpointManager(tmp_path, Policy(EVERY, [KeepLast(1)]), save=save)
    manager.observe({}, step=1, epoch=0)
    links = True
    with pytest.raises(SaveError, match="holds symbolic links"):
        manager.observe({}, step=2, epoch=0)
    assert [1] == [record.step for record in manager.records]
    manager.close()


def test_interrupted_replacement_is_settled_before_the_next_one() -> None:
    """Replaced, but not marked so; then killed in the next replacement: the payload that is there is believed."""

    class Interrupted(MemoryStorage):
        refused = ""

        def write(self, path: str, data: bytes) -> None:
            if self.refused and self.refused in path and b'"committed"' in data:
                raise KeyboardInterrupt
            super().write(path, data)

        def upload(self, path: str) -> Any:
            if self.refused == "upload":
                raise KeyboardInterrupt
            return super().upload(path)

    storage = Interrupted()
    policy = Policy(EVERY, [KeepLast(1)], name=Naming("model", version_counter=False))
    run = Run(storage, policy)
    run.observe(1)
    storage.refused = "model.ckpt.json"
    with pytest.raises(KeyboardInterrupt):
        run.observe(2)
    storage.refused = ""
    publish = storage.upload("model.ckpt").__class__.publish
    try:
        storage.upload("x").__class__.publish = _interrupt
        with pytest.raises(KeyboardInterrupt):
            run.observe(3)
    finally:
        storage.upload("x").__class__.publish = publish
    die(run.manager._owner)
    again = Run(storage, policy)
    restored = again.manager.restore()
    assert restored is not None
    assert (2, {"step": 2}) == (restored.step, restored.state)


def _interrupt(self: Any, *, replace: bool) -> None:
    raise KeyboardInterrupt


def test_folders_that_cannot_be_replaced_get_names_of_their_own(tmp_path: Path) -> None:
    """No slot and no fixed name for a folder: newer state is saved all the same."""

    def save(path: str) -> None:
        Path(path).mkdir()
        Path(path, "m").write_bytes(b"w")

    fixed = Policy(EVERY, [KeepLast(1)], name=Naming("model", version_counter=False))
    for name, policy in (("slot", SLOT), ("fixed", fixed)):
        manager = CheckpointManager(tmp_path / name, policy, save=save)
        for step in (1, 2, 3, 4):
            assert manager.observe({"loss": float(step)}, step=step, epoch=0, epoch_end=False)
        assert manager.last is not None
        assert 4 == manager.last.step
        assert len(manager.records) <= 2
        assert (tmp_path / name / manager.last.name / "m").exists()
        manager.close()
    assert (tmp_path / "slot/last.ckpt/m").exists()


def test_checkpoint_that_was_resumed_from_out_of_the_slot_stays() -> None:
    """It moves to a name of its own before the slot is written again."""
    run = Run(MemoryStorage(), SLOT)
    run.observe(1, 0.1)
    run.observe(2, 0.5)
    run.manager.restore(2)
    run.observe(3, 0.6)
    assert [("epoch=0-step=1.ckpt", 1), ("epoch=0-step=2.ckpt", 2), ("last.ckpt", 3)] == run.live()


def test_checkpoint_that_proved_bad_gives_up_its_rank(tmp_path: Path) -> None:
    """Else nothing worse than it would ever be kept as the best."""
    run = Run(tmp_path, Policy(EVERY, [KeepBest(1, "loss", mode="min"), KeepLast(1)], best="link"))
    run.observe(1, 0.1)
    run.observe(2, 0.5)
    (tmp_path / "epoch=0-step=1.ckpt").write_bytes(b"")
    with pytest.warns(CheckpointerWarning, match="restored epoch=0-step=2.ckpt"):
        run.manager.restore("best")
    run.observe(3, 0.4)
    run.observe(4, 0.9)
    assert run.manager.best is not None
    assert 3 == run.manager.best.step
    assert (tmp_path / "best.ckpt").samefile(tmp_path / "epoch=0-step=3.ckpt")
    run.manager.close()


class FailingUploads(MemoryStorage):
    """Each payload's stream fails at its third piece."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def upload(self, path: str) -> Any:
        upload = super().upload(path)
        write, pieces = upload.write, iter(range(100))

        def fail(data: Any) -> int:
            if next(pieces) >= 2:
                raise self.error
            return write(data)

        upload.write = fail  # type: ignore[method-assign]
        return upload


def test_full_disk_is_named_even_if_torch_hides_it() -> None:
    """torch.save turns an error of its stream into one about file positions. The state has several pieces."""
    storage = FailingUploads(OSError(28, "No space left on device"))
    manager = CheckpointManager(storage, Policy(EVERY, [KeepLast(1)]), state=lambda: {"w": torch.ones(6_000_000)})
    with pytest.raises(SaveError, match="No space left on device"):
        manager.observe({}, step=1, epoch=0)


def test_ctrl_c_while_the_payload_streams_is_a_ctrl_c() -> None:
    """It must not be taken for a failed save, and tolerated."""
    storage = FailingUploads(KeyboardInterrupt())
    policy = Policy(EVERY, [KeepLast(1)])
    manager = CheckpointManager(storage, policy, state=lambda: {"w": torch.ones(6_000_000)}, tolerate_failures=9)
    with pytest.raises(KeyboardInterrupt):
        manager.observe({}, step=1, epoch=0)


def test_slot_that_moves_aside_replaces_no_file() -> None:
    """Another program took the name since the directory was listed."""
    storage = MemoryStorage()
    run = Run(storage, SLOT)
    run.observe(1, 0.1)
    run.observe(2, 0.5)
    storage.write("epoch=0-step=2.ckpt", b"theirs")
    run.manager.pin("last.ckpt")
    with storage.open("epoch=0-step=2.ckpt") as stream:
        assert b"theirs" == stream.read()
    assert [("epoch=0-step=1.ckpt", 1), ("epoch=0-step=2-v1.ckpt", 2)] == run.live()


def test_slot_whose_new_metric_makes_it_the_best_is_kept() -> None:
    """It gets a name of its own before the next save overwrites the slot."""
    run = Run(MemoryStorage(), SLOT)
    run.observe(1, 1.0)
    run.observe(2, 5.0)
    run.observe(2, 0.0)
    run.observe(3, 4.0)
    assert [("epoch=0-step=2.ckpt", 2), ("last.ckpt", 3)] == run.live()
    assert run.manager.best is not None
    assert 2 == run.manager.best.step


@pytest.mark.parametrize("saved", [0, 1])
def test_a_file_of_changes_whose_bytes_a_power_loss_took_stops_no_training(tmp_path: Path, saved: int) -> None:
    """Aliases are announced without fsync. After a power loss ext4 may have the size of the file, and zeros in it."""
    policy = Policy(EVERY, [KeepLast(1)])
    if saved:
        first = Run(tmp_path, policy)
        first.observe(1)
        first.manager.close()
    owner = new_owner()
    zeros = tmp_path / changes_path(owner)
    zeros.parent.mkdir(parents=True, exist_ok=True)
    zeros.write_bytes(bytes(200))
    die(owner)
    run = Run(tmp_path, policy)
    restored = run.manager.restore()
    assert saved == (restored.step if restored else 0)
    assert run.observe(saved + 1)
    run.manager.close()
    following = Run(tmp_path, policy)
    assert following.manager.restore() is not None
    following.manager.close()
    assert not zeros.exists()


def test_changes_that_a_power_loss_could_cut_in_two_are_durable(tmp_path: Path) -> None:
    """What fits in one block of the disk is there or is not; a longer announcement is not written as a scratch file."""
    for count, durable in ((1, False), (100, True)):
        storage = CountingStorage(tmp_path, "")
        write_changes(storage, Changes(owner="me", aliases=("last.ckpt",) * count), None)
        assert durable == (storage.scratches == 0)


class CountingStorage(LocalStorage):
    """A folder that counts what is written without fsync."""

    scratches = 0

    def write_scratch(self, path: str, data: bytes) -> None:
        self.scratches += 1
        super().write_scratch(path, data)
