"""``verify``, ``copy`` and the readers of payloads beside a training that retires checkpoints."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from support.commands import command

from checkpointer import CheckpointManager, EverySteps, KeepLast, Policy
from checkpointer.commit.journal import Journal
from checkpointer.errors import CorruptError, NotFoundError
from checkpointer.ports import Storage
from checkpointer.records.record import Entry
from checkpointer.storage import open_storage
from checkpointer.storage.memory import MemoryStorage
from checkpointer.storage.owner import new_owner, release
from checkpointer.tools.catalog import look_at
from checkpointer.tools.copy import copy
from checkpointer.tools.verify import verify_all

TWO = Policy(EverySteps(1), [KeepLast(2)])
SLOT = Policy(EverySteps(1), [], last="copy")


def state() -> dict[str, Any]:
    return {"w": torch.ones(1000)}


def saved(storage: Storage | Path, steps: range, policy: Policy = TWO) -> None:
    """Go on with the run in the directory."""
    with CheckpointManager(storage, policy, state=state) as manager:
        manager.restore()
        for step in steps:
            manager.observe({}, step=step, epoch=step)


@pytest.fixture(params=["disk", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """A directory with checkpoints of the steps 2 and 3."""
    storage: Storage = MemoryStorage() if request.param == "memory" else open_storage(tmp_path / "run", new_owner())
    saved(storage, range(1, 4))
    return storage


@pytest.mark.parametrize("depth", ["sizes", "digests", "contents"])
def test_verify_calls_nothing_bad_that_was_retired_meanwhile(storage: Storage, depth: Any) -> None:
    """Each checkpoint of the first look is sound, or was retired since then."""
    catalog = look_at(storage)
    saved(storage, range(4, 6))
    if depth == "sizes":
        catalog.files.clear()  # type: ignore[attr-defined]
    findings = [*verify_all(catalog, catalog.records, depth)]
    assert [(True, True), (True, True)] == [(bool(one), one.is_retired) for one in findings]


def test_verify_calls_nothing_bad_whose_removal_is_announced(storage: Storage) -> None:
    """The payload is deleted before the record, and a writer may be paused in between."""
    catalog = look_at(storage)
    first = catalog.records[0]
    owner = new_owner()
    journal = Journal(storage, owner)
    with journal.changing(Entry(record=first, status="retired", owner=owner)):
        storage.delete(first.name)
        (gone,) = [one for one in verify_all(catalog, catalog.records) if one.is_retired]
        assert first.name == gone.name
    release(owner)


def test_verify_still_finds_what_is_damaged_or_gone(storage: Storage) -> None:
    """A second look does not excuse a payload whose record is there."""
    catalog = look_at(storage)
    first, second = catalog.records
    storage.delete(first.name)
    storage.write(second.name, bytes(second.size))
    findings = {one.name: one.problem for one in verify_all(catalog, catalog.records)}
    assert "is gone, though its record is there" in findings[first.name]
    assert "has other bytes than were written" in findings[second.name]


def test_a_checkpoint_that_was_replaced_meanwhile_is_verified_as_it_is_now(tmp_path: Path) -> None:
    """The slot of ``last`` has one name for all checkpoints."""
    run = tmp_path / "run"
    saved(run, range(1, 2), SLOT)
    catalog = look_at(open_storage(run, ""))
    saved(run, range(2, 3), SLOT)
    (finding,) = verify_all(catalog, catalog.records)
    assert (True, False, "last.ckpt") == (bool(finding), finding.is_retired, finding.name)
    data = bytearray((run / "last.ckpt").read_bytes())
    data[-100] ^= 1
    (run / "last.ckpt").write_bytes(data)
    (finding,) = verify_all(catalog, catalog.records)
    assert not finding


@pytest.mark.parametrize("steps", [range(4, 5), range(4, 6)])
def test_copy_leaves_out_what_was_retired_meanwhile_and_goes_on(storage: Storage, steps: range) -> None:
    """The next copy brings the rest."""
    catalog, target = look_at(storage), MemoryStorage()
    saved(storage, steps)
    done = copy(catalog, target, "me")
    assert [2, 3][: len(steps)] == [record.step for record in done.retired]
    assert [2, 3][len(steps) :] == [record.step for record in done.missing]
    assert done.missing == look_at(target).records
    copy(look_at(storage), target, "me")
    assert {record.step for record in look_at(storage).records} <= {r.step for r in look_at(target).records}


def test_copy_of_a_damaged_checkpoint_is_still_an_error(storage: Storage) -> None:
    """It is not copied; what was before it is."""
    catalog, target = look_at(storage), MemoryStorage()
    storage.write(catalog.records[1].name, bytes(catalog.records[1].size))
    with pytest.raises(CorruptError, match="has other bytes than its record says"):
        copy(catalog, target, "me")
    assert [2] == [record.step for record in look_at(target).records]


def test_the_error_of_a_reader_says_that_the_checkpoint_was_retired(storage: Storage) -> None:
    """Instead of that it is gone, which would be damage."""
    catalog = look_at(storage)
    saved(storage, range(4, 5))
    first, second = catalog.records
    message = f"a running process has retired {first.name} meanwhile; choose"
    with (
        pytest.raises(NotFoundError, match=message),
        catalog.naming_retired(first),
        storage.open(first.name),
    ):
        pass
    with pytest.raises(FileNotFoundError, match="other"), catalog.naming_retired(second):
        raise FileNotFoundError("other")


@pytest.mark.slow
def test_no_command_finds_damage_beside_a_run_that_saves_all_the_time(tmp_path: Path) -> None:
    """Verify and copy, again and again, while each save retires a checkpoint."""
    run, ended = tmp_path / "run", threading.Event()
    saved(run, range(1, 3))

    def train() -> None:
        with CheckpointManager(run, TWO, state=state) as manager:
            manager.restore()
            step = 3
            while not ended.is_set():
                manager.observe({}, step=step, epoch=step)
                step += 1

    thread = threading.Thread(target=train)
    thread.start()
    try:
        for turn in range(15):
            for argv in (("verify", run), ("verify", run, "--deep"), ("copy", run, tmp_path / f"copy-{turn}")):
                said = command(*argv)
                assert 0 == said.code, said
                assert "payload gone" not in said.err
    finally:
        ended.set()
        thread.join()
