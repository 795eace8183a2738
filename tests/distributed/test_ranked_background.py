"""Shards written in the background (gloo): what is written is what was copied, by all ranks or by none."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from support.servers.fixtures import Serve
from support.sharded import Training
from support.together import DiedError, together
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from checkpointer import (
    CheckpointerWarning,
    CheckpointManager,
    DistributedManager,
    EverySteps,
    KeepAll,
    KeepLast,
    Policy,
)
from checkpointer.distributed import shard_writer as writers
from checkpointer.distributed.ranks import OneRank, TorchMailbox, TorchRanks
from checkpointer.errors import PolicyError
from checkpointer.formats import dcp_folder, dcp_reader, dcp_writer
from checkpointer.ports import Listener

POLICY = Policy(EverySteps(3), [KeepLast(2)], last="link")
PATIENCE_S = 60.0

# Of no type, to be taken apart in the processes of a test.
FolderModule: Any = dcp_folder
ReaderModule: Any = dcp_reader
WriterModule: Any = dcp_writer
ShardWriterModule: Any = writers
ShardWriterClass: Any = writers.ShardWriter


@contextlib.contextmanager
def gate(path: Path) -> Iterator[None]:
    """Let no rank write a shard until the file ``path`` is there."""
    save = FolderModule.save

    def late(*args: Any, **kwargs: Any) -> Any:
        wait_for(path)
        return save(*args, **kwargs)

    FolderModule.save = late
    try:
        yield
    finally:
        FolderModule.save = save


def wait_for(path: Path) -> None:
    give_up = time.monotonic() + PATIENCE_S
    while not path.exists():
        assert time.monotonic() < give_up, f"{path} never came"
        time.sleep(0.01)


def names(manager: DistributedManager) -> list[str]:
    """Return what rank 0 knows to be durable; nothing on the others."""
    return [record.name for record in manager.manager.records] if manager.manager is not None else []


def train_behind(rank: int, directory: Path, busy: Any) -> Any:
    training = Training(seed=7)
    before: list[Any] = []
    with DistributedManager(directory, POLICY, state=training.state_dict, format="dcp", background=busy) as manager:
        with gate(directory / "go"):
            while training.step < 5:
                training.learn()
                if manager.observe({}, training.step, 0, epoch_end=False):
                    before.append(training.whole())
            unwritten = names(manager)
            if rank == 0:
                (directory / "go").touch()
            assert manager.wait()
        return unwritten, names(manager), before, training.whole()


def restore(rank: int, directory: Path) -> Any:
    training = Training(seed=rank)
    with DistributedManager(directory, POLICY, state=training.state_dict, format="dcp") as manager:
        restored = manager.restore()
        assert restored is not None
        training.load(restored.state)
        return restored.step, training.whole()


@pytest.mark.slow
@pytest.mark.parametrize("busy", ["wait", "skip"])
def test_training_goes_on_with_its_collectives_while_its_shards_are_written(tmp_path: Path, busy: str) -> None:
    """What is written is the state as it was when `observe` returned, and any number of ranks restores it."""
    first, second = together(2, train_behind, tmp_path / "run", busy)

    unwritten, written, (saved,), now = first
    assert ([], ["epoch=0-step=3.dcp"]) == (unwritten, written)
    assert second[2:] == ([saved], now)
    assert saved != now
    for size in (1, 2, 4):
        assert [(3, saved)] * size == together(size, restore, tmp_path / "run")


def skip(rank: int, directory: Path) -> Any:
    training = Training(seed=7)
    policy = Policy(EverySteps(1), [KeepAll()])
    with DistributedManager(directory, policy, state=training.state_dict, format="dcp", background="skip") as manager:
        assert manager._io.writer is not None, "it writes in the background"
        with gate(directory / "go"):
            manager.observe({}, 1, 0, epoch_end=False)
            if manager.manager is not None:
                while not manager._io.writer._posted:
                    time.sleep(0.01)
            alive = []
            for step in (2, 3, 4):
                torch.distributed.barrier()
                manager.observe({}, step, 0, epoch_end=False)
                alive.append(len(manager._io.writer._copies))
            assert not manager.wait(0.0)
            if rank == 0:
                (directory / "go").touch()
            assert manager.wait()
        manager._io.writer._join()
        return names(manager), alive, len(manager._io.writer._copies)


@pytest.mark.slow
def test_a_copy_that_makes_way_for_a_newer_one_is_given_up_on_all_ranks(tmp_path: Path) -> None:
    """With ``background="skip"`` no rank ever has more than two."""
    first, second = together(2, skip, tmp_path / "run")

    assert ["epoch=0-step=1.dcp", "epoch=0-step=4.dcp"] == first[0]
    assert ([2, 2, 2], 0) == first[1:] == second[1:]


def fail_on_one(rank: int, directory: Path) -> Any:
    training = Training(seed=7)
    save = FolderModule.save
    broken = [True]

    def failing(state: Any, *, storage_writer: Any, **options: Any) -> Any:
        def fail(*args: Any) -> Any:
            raise OSError(28, "no space left on device")

        if rank == 1 and broken:
            storage_writer.write_data = fail
        return save(state, storage_writer=storage_writer, **options)

    FolderModule.save = failing
    said: list[Any] = []
    manager = DistributedManager(directory, POLICY, state=training.state_dict, format="dcp", background="wait")
    for step in range(1, 10):
        try:
            said.append(bool(manager.observe({}, step, 0, epoch_end=False)))
        except Exception as error:
            said.append(str(error)[-60:])
            broken.clear()
            # It may be made again.
            said.append(bool(manager.observe({}, step, 0, epoch_end=False)))
        if step % 3 == 0 and manager.manager is not None:
            manager.manager._executor.settle()
    manager.close()
    return said


@pytest.mark.slow
def test_a_rank_that_cannot_write_its_shards_is_an_error_on_all_at_the_next_due_report(tmp_path: Path) -> None:
    """Nothing of that save is left, and the next one works."""
    first, second = together(2, fail_on_one, tmp_path / "run")

    assert first == second
    assert [False, False, True, False, False] == first[:5]
    assert first[5].endswith("no space left on device); older checkpoints are untouched")
    assert [True, False, False, True] == first[6:]
    with CheckpointManager(tmp_path / "run") as manager:
        assert [6, 9] == [record.step for record in manager.records]
    assert not [*(tmp_path / "run" / ".checkpointer").glob("staging/*/*")]


def fail_to_copy(rank: int, directory: Path) -> Any:
    lock = [threading.Lock()] if rank == 1 else []
    state = {"w": torch.ones(1), "lock": lock}
    with DistributedManager(directory, POLICY, state=lambda: state, format="dcp", background="wait") as manager:
        with pytest.raises(Exception, match="cannot be copied"):
            manager.observe({}, 3, 0, epoch_end=False)
        lock.clear()
        saved = bool(manager.observe({}, 6, 0, epoch_end=False))
        assert manager.wait()
        assert manager._io.writer is not None
        manager._io.writer._join()
        return saved, len(manager._io.writer._copies)


@pytest.mark.slow
def test_a_state_that_one_rank_cannot_copy_is_an_error_on_all(tmp_path: Path) -> None:
    """The copies of the others are given up, and the next save works."""
    assert [(True, 0), (True, 0)] == together(2, fail_to_copy, tmp_path / "run")
    with CheckpointManager(tmp_path / "run") as manager:
        assert [6] == [record.step for record in manager.records]


def die(rank: int, directory: Path, dying: int, while_writing: bool) -> Any:
    writers.HEARTBEAT_TIMEOUT_S = 0.5  # type: ignore[misc]
    training = Training(seed=7)
    manager = DistributedManager(directory, POLICY, state=training.state_dict, format="dcp", background="wait")
    manager.observe({}, 3, 0, epoch_end=False)
    assert manager.wait()

    def kill(*args: Any, **options: Any) -> None:
        wait_for(directory / "go")
        os.kill(os.getpid(), signal.SIGKILL)

    if rank == dying and while_writing:
        FolderModule.save = kill
    elif rank == dying:
        ShardWriterClass.write = kill
    training.learn()
    manager.observe({}, 6, 0, epoch_end=False)
    torch.distributed.barrier()
    (directory / "go").touch()
    if rank == dying:
        time.sleep(PATIENCE_S)
    manager.close()
    return "closed"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dying", "while_writing"),
    [(0, True), (1, True), (0, False)],
    ids=["rank 0", "rank 1", "rank 0 before its message"],
)
def test_a_rank_killed_while_shards_are_written_leaves_the_older_checkpoint(
    tmp_path: Path, dying: int, while_writing: bool
) -> None:
    """The others end: rank 0 with an error, the other ranks without waiting for a message that never comes."""
    results = together(2, die, tmp_path / "run", dying, while_writing)

    assert isinstance(results[dying], DiedError)
    if dying == 0:
        assert "closed" == results[1]
    else:
        assert "epoch=0-step=6.dcp was not saved" in str(results[0])
    assert [3, 3] == [step for step, _ in together(2, restore, tmp_path / "run")]
    with CheckpointManager(tmp_path / "run", POLICY, state=dict) as manager:
        manager.restore(3)
        manager.observe({}, 9, 0, epoch_end=False)
        assert [3, 9] == [record.step for record in manager.records]
    assert not [*(tmp_path / "run" / ".checkpointer").glob("staging/*/*")]


def fail_before_writing(rank: int, directory: Path, failing: int, background: Any) -> Any:
    states: list[Any] = [None if rank == failing else {"w": sharded(rank)}]
    manager = DistributedManager(
        directory, Policy(EverySteps(1), [KeepAll()]), state=lambda: states[0], format="dcp", background=background
    )
    said: list[Any] = []
    for step in (1, 2, 3):
        try:
            said.append(bool(manager.observe({}, step, 0, epoch_end=False)))
            manager.wait()
        except Exception as error:
            said.append(str(error))
        states[0] = {"w": sharded(rank)}
    manager.close()
    return said


def sharded(rank: int) -> DTensor:
    return DTensor.from_local(torch.full((2,), float(rank)), init_device_mesh("cpu", (2,)), [Shard(0)])


@pytest.mark.slow
@pytest.mark.parametrize("background", [None, "wait"], ids=["in the loop", "in the background"])
@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_that_cannot_begin_to_write_leaves_no_other_one_waiting(
    tmp_path: Path, failing: int, background: Any
) -> None:
    """Wherever it fails, it is an error on all of that save, and the next one has all shards."""
    first, second = together(2, fail_before_writing, tmp_path / "run", failing, background)

    assert first == second
    assert "the state is a NoneType; the dcp format writes a dict of names" in first[0]
    assert [True, True] == first[1:]
    check_shards(tmp_path / "run", [2, 3])


def check_shards(directory: Path, steps: list[int]) -> None:
    """Check that what these steps have saved has the parts of both ranks."""
    with CheckpointManager(directory) as manager:
        assert steps == [record.step for record in manager.records]
        for step in steps:
            restored = manager.restore(step)
            assert restored is not None
            assert [0.0, 0.0, 1.0, 1.0] == restored.state["w"].tolist()


class UnsendableError(Exception):
    """Cannot be pickled, or cannot be made again from what was pickled, as the errors of some storages."""

    def __init__(self, what: str, lock: Any) -> None:
        super().__init__(what)
        self.lock = lock


def fail_unsendably(rank: int, directory: Path, background: Any) -> Any:
    for failure in (UnsendableError("no bucket", threading.Lock()), UnsendableError("no bucket", 1)):
        writer = WriterModule.FileSystemWriter.write_data

        def fail(*args: Any, failure: Exception = failure) -> Any:
            raise failure

        how: Any = {"state": lambda: {"w": sharded(rank)}, "format": "dcp", "background": background}
        with DistributedManager(directory, Policy(EverySteps(1), [KeepAll()]), **how) as manager:
            if rank == 1:
                WriterModule.FileSystemWriter.write_data = fail
            manager.restore()
            step = 1 + (manager.last.step if manager.last else 0)
            with pytest.raises(Exception, match="no bucket"):
                save_and_wait(manager, step)
            WriterModule.FileSystemWriter.write_data = writer
            torch.distributed.barrier()
            save_and_wait(manager, step + 1)
    return "done"


def save_and_wait(manager: DistributedManager, step: int) -> None:
    manager.observe({}, step, 0, epoch_end=False)
    manager.wait()


@pytest.mark.slow
@pytest.mark.parametrize("background", [None, "wait"], ids=["in the loop", "in the background"])
def test_an_error_that_cannot_be_sent_to_other_ranks_reaches_them_as_text(tmp_path: Path, background: Any) -> None:
    """DCP sends errors by pickling them, and would leave the others waiting."""
    assert ["done", "done"] == together(2, fail_unsendably, tmp_path / "run", background)
    check_shards(tmp_path / "run", [2, 4])


def fail_to_read(rank: int, directory: Path) -> Any:
    how: Any = {"state": lambda: {"w": sharded(rank)}, "format": "dcp"}
    with DistributedManager(directory, POLICY, **how) as manager:
        manager.observe({}, 3, 0, epoch_end=False)
        read = ReaderModule.FolderReader.read_data
        for failure in (UnsendableError("no bucket", threading.Lock()), UnsendableError("no bucket", 1)):

            def fail(*args: Any, failure: Exception = failure) -> Any:
                raise failure

            if rank == 1:
                ReaderModule.FolderReader.read_data = fail
            with pytest.raises(Exception, match="no bucket"):
                manager.restore(3)
            ReaderModule.FolderReader.read_data = read
            torch.distributed.barrier()
        restored = manager.restore()
        assert restored is not None
        return restored.step


@pytest.mark.slow
def test_an_error_of_reading_that_cannot_be_sent_reaches_all_too(tmp_path: Path) -> None:
    """And the next restore works."""
    assert [3, 3] == together(2, fail_to_read, tmp_path / "run")


def destroy_early(rank: int, directory: Path) -> Any:
    training = Training(seed=7)
    manager = DistributedManager(directory, POLICY, state=training.state_dict, format="dcp", background="wait")
    with gate(directory / "go"):
        manager.observe({}, 3, 0, epoch_end=False)
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        (directory / "go").touch()
        assert manager._io.writer is not None
        manager._io.writer._join()
        if manager.manager is not None:
            with pytest.raises(Exception, match=r"destroyed|process group|not been initialized|closed|reset"):
                manager.manager.wait()
    raise KeyboardInterrupt


@pytest.mark.slow
def test_groups_that_are_destroyed_too_early_are_an_error_and_not_half_a_checkpoint(tmp_path: Path) -> None:
    """DCP alone would go on, each rank as if there were no other, and write over each other's shards."""
    assert ["KeyboardInterrupt()"] * 2 == [repr(result) for result in together(2, destroy_early, tmp_path / "run")]
    with CheckpointManager(tmp_path / "run") as manager:
        assert () == manager.records


def train_apart(rank: int, directory: Path, background: Any) -> Any:
    members = [0, 1] if rank < 2 else [2, 3]
    groups: Any = torch.distributed.new_subgroups_by_enumeration
    group = groups([[0, 1], [2, 3]], backend="gloo")[0]
    ranks = TorchRanks(group)
    mesh = DeviceMesh.from_group(group, "cpu")
    state = {"w": DTensor.from_local(torch.full((2,), float(rank)), mesh, [Shard(0)], run_check=False)}
    how: Any = {"state": lambda: state, "format": "dcp", "background": background, "ranks": ranks}
    with DistributedManager(directory / str(members[0]), Policy(EverySteps(1), [KeepAll()]), **how) as manager:
        for step in (1, 2, 3):
            manager.observe({}, step, 0, epoch_end=False)
        manager.wait()
    return members


@pytest.mark.slow
@pytest.mark.parametrize("background", [None, "wait"], ids=["in the loop", "in the background"])
def test_two_trainings_apart_from_each_other_do_not_mix(tmp_path: Path, background: Any) -> None:
    """Each of two ranks out of four; their groups are made at the same time."""
    assert [[0, 1], [0, 1], [2, 3], [2, 3]] == together(4, train_apart, tmp_path, background)
    for first in (0, 2):
        with CheckpointManager(tmp_path / str(first)) as manager:
            restored = manager.restore()
            assert restored is not None
            assert [first, first, first + 1, first + 1] == restored.state["w"].tolist()


def leave_alone(rank: int, directory: Path) -> Any:
    writers.HEARTBEAT_TIMEOUT_S = 0.5  # type: ignore[misc]
    manager = DistributedManager(directory, POLICY, state=Training(seed=7).state_dict, format="dcp", background="wait")

    def kill(*args: Any) -> None:
        wait_for(directory / "go")
        os.kill(os.getpid(), signal.SIGKILL)

    ShardWriterClass.write = kill
    manager.observe({}, 3, 0, epoch_end=False)
    torch.distributed.barrier()
    (directory / "go").touch()
    if rank == 0:
        time.sleep(PATIENCE_S)
    raise KeyboardInterrupt


@pytest.mark.slow
def test_a_rank_that_ends_without_close_does_not_wait_for_ever_for_one_that_was_killed(tmp_path: Path) -> None:
    """The interpreter waits for the thread, and the thread for a message that does not come."""
    killed, left = together(2, leave_alone, tmp_path / "run")
    assert (DiedError, KeyboardInterrupt) == (type(killed), type(left))


class Slow(Listener):
    def on_saved(self, record: Any) -> None:
        time.sleep(2.0)


def close_first(rank: int, directory: Path) -> Any:
    writers.HEARTBEAT_TIMEOUT_S, writers.HEARTBEAT_S = 0.5, 0.1  # type: ignore[misc]
    policy = Policy(EverySteps(1), [KeepAll()])
    how: Any = {"format": "dcp", "background": "skip", "listeners": [Slow()]}
    manager = DistributedManager(directory, policy, state=lambda: {"w": sharded(rank)}, **how)
    for step in (1, 2):
        assert manager.observe({}, step, 0, epoch_end=False)
        if manager.manager is not None:
            while step == 1 and not manager.manager.records:
                time.sleep(0.01)
    manager.close()
    return "closed"


@pytest.mark.slow
def test_a_rank_that_closes_waits_for_the_message_of_a_rank_0_that_is_busy(tmp_path: Path) -> None:
    """Not for a fixed time, but as long as rank 0 sends heartbeats."""
    assert ["closed", "closed"] == together(2, close_first, tmp_path / "run")
    check_shards(tmp_path / "run", [1, 2])


def fail_and_leave(rank: int, directory: Path) -> Any:
    def fail(*args: Any, **options: Any) -> Any:
        raise OSError(28, "no space left on device")

    WriterModule.FileSystemWriter.write_data = fail
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", CheckpointerWarning)
        try:
            with DistributedManager(
                directory,
                attrs.evolve(POLICY, rescue=False),
                state=Training(seed=7).state_dict,
                format="dcp",
                background="wait",
            ) as manager:
                manager.observe({}, 3, 0, epoch_end=False)
                raise KeyboardInterrupt
        except KeyboardInterrupt:
            return [str(warning.message)[:34] for warning in caught]


@pytest.mark.slow
def test_the_error_that_ended_the_training_is_the_one_that_is_seen(tmp_path: Path) -> None:
    """That a save has failed too is a warning, on rank 0."""
    assert [["epoch=0-step=3.dcp was not saved ("], []] == together(2, fail_and_leave, tmp_path / "run")


def let_go_late(rank: int, directory: Path, busy: str) -> Any:
    forget, alive = ShardWriterClass._forget, []

    def late(self: Any, number: int) -> None:
        if threading.current_thread() is not threading.main_thread() and rank == 1:
            time.sleep(0.3)
        forget(self, number)

    ShardWriterClass._forget = late
    policy = Policy(EverySteps(1), [KeepAll()])
    with DistributedManager(
        directory, policy, state=lambda: {"w": sharded(rank)}, format="dcp", background=busy
    ) as manager:
        assert manager._io.writer is not None
        for step in range(1, 7):
            manager.observe({}, step, 0, epoch_end=False)
            alive.append(len(manager._io.writer._copies))
    return max(alive)


@pytest.mark.slow
@pytest.mark.parametrize(("busy", "copies"), [("wait", 1), ("skip", 2)])
def test_no_rank_has_more_copies_than_promised(tmp_path: Path, busy: str, copies: int) -> None:
    """A rank that is slow to let go of one waits before it takes the next."""
    first, second = together(2, let_go_late, tmp_path / "run", busy)
    assert max(first, second) <= copies


def fail_to_start(rank: int, directory: Path) -> Any:
    start = ShardWriterModule._start
    policy = Policy(EverySteps(1), [KeepAll()])

    def fail(*args: Any, **options: Any) -> Any:
        raise RuntimeError("can't start new thread")

    with (
        gate(directory / "go"),
        DistributedManager(
            directory, policy, state=lambda: {"w": sharded(rank)}, format="dcp", background="skip"
        ) as manager,
    ):
        manager.observe({}, 1, 0, epoch_end=False)
        if rank == 1:
            ShardWriterModule._start = fail
        with pytest.raises(Exception, match="can't start new thread"):
            manager.observe({}, 2, 0, epoch_end=False)
        ShardWriterModule._start = start
        (directory / "go").touch()
    return "closed"


@pytest.mark.slow
def test_a_thread_that_cannot_be_started_costs_only_its_own_save(tmp_path: Path) -> None:
    """The one before it is waited for."""
    assert ["closed", "closed"] == together(2, fail_to_start, tmp_path / "run")
    check_shards(tmp_path / "run", [1])


def save_statefuls(rank: int, directory: Path, background: Any) -> Any:
    training = Training(seed=7)
    calls: list[bool] = []

    class App:
        def state_dict(self) -> Any:
            calls.append(threading.current_thread() is threading.main_thread())
            return training.state_dict()

        def load_state_dict(self, state: Any) -> None:
            training.load(state)

    state = {"app": App(), "model": training.model}
    with DistributedManager(directory, POLICY, state=lambda: state, format="dcp", background=background) as manager:
        training.learn()
        manager.observe({}, 3, 0, epoch_end=False)
        before = training.whole()
        training.learn()
        manager.wait()
        assert before != training.whole()
        assert manager.restore() is not None
        return calls[:1], before == training.whole()


@pytest.mark.slow
@pytest.mark.parametrize("background", [None, "wait"], ids=["in the loop", "in the background"])
def test_whatever_has_a_state_dict_is_asked_for_it_in_the_loop(tmp_path: Path, background: Any) -> None:
    """As in DCP's own examples; taking it may be a collective."""
    assert [([True], True)] * 2 == together(2, save_statefuls, tmp_path / "run", background)


def rescue(rank: int, directory: Path) -> Any:
    training = Training(seed=7)
    with DistributedManager(directory, POLICY, state=training.state_dict, format="dcp", background="wait") as manager:
        for _ in range(4):
            training.learn()
            manager.observe({}, training.step, 0, epoch_end=False)
        manager.rescue("asked for")
        return names(manager), training.whole()


@pytest.mark.slow
def test_a_rescue_waits_for_the_shards_under_way_and_is_durable_on_return(tmp_path: Path) -> None:
    """It is written by all ranks in their loops."""
    first, second = together(2, rescue, tmp_path / "run")

    assert ["epoch=0-step=3.dcp", "rescue-step=4.dcp"] == first[0]
    assert [(4, first[1])] * 2 == [(4, second[1])] * 2 == together(2, restore, tmp_path / "run")


def leave(rank: int, directory: Path) -> Any:
    training = Training(seed=7)
    save, leaving = FolderModule.save, threading.Event()

    def late(*args: Any, **options: Any) -> Any:
        assert leaving.wait(PATIENCE_S)
        time.sleep(0.5)
        return save(*args, **options)

    FolderModule.save = late
    manager = DistributedManager(directory, POLICY, state=training.state_dict, format="dcp", background="wait")
    manager.observe({}, 3, 0, epoch_end=False)
    assert not manager.wait(0.0)
    leaving.set()
    raise KeyboardInterrupt


@pytest.mark.slow
def test_shards_under_way_are_written_although_the_managers_are_not_closed(tmp_path: Path) -> None:
    """The interpreter waits, on each rank."""
    assert ["KeyboardInterrupt()"] * 2 == [repr(result) for result in together(2, leave, tmp_path / "run")]
    with CheckpointManager(tmp_path / "run") as manager:
        assert [3] == [record.step for record in manager.records]


def train_at_url(rank: int, url: str, options: dict[str, Any]) -> Any:
    training = Training(seed=7)
    how: dict[str, Any] = {"state": training.state_dict, "format": "dcp", "storage_options": options}
    with DistributedManager(url, POLICY, background="wait", **how) as manager:
        while training.step < 7:
            training.learn()
            manager.observe({}, training.step, 0, epoch_end=False)
    with DistributedManager(url, POLICY, **how) as manager:
        restored = manager.restore()
        assert restored is not None
        return restored.step, int(restored.state["step"])


@pytest.mark.slow
def test_shards_go_to_a_bucket_behind_the_training(serve: Serve) -> None:
    """Each rank sends its own to S3."""
    server = serve("s3")
    assert [(6, 6)] * 2 == together(2, train_at_url, f"{server.url}/behind", dict(server.storage_options))


# One process


def test_one_process_writes_its_folder_behind_the_training(tmp_path: Path) -> None:
    """There is only one rank, so nothing is posted."""
    state = {"w": torch.zeros(3)}
    with DistributedManager(
        tmp_path, POLICY, ranks=OneRank(), state=lambda: state, format="dcp", background="wait"
    ) as manager:
        manager.observe({}, 3, 0, epoch_end=False)
        state["w"].fill_(1.0)
        assert manager.wait()
        restored = manager.restore()
        assert restored is not None
    with CheckpointManager(tmp_path) as manager_of_one:
        whole = manager_of_one.restore()
        assert whole is not None
        assert [0.0, 0.0, 0.0] == whole.state["w"].tolist()


@attrs.frozen
class WithoutMailbox(OneRank):
    """Two ranks whose threads cannot communicate."""

    @property
    def size(self) -> int:
        return 2


def test_ranks_whose_threads_cannot_work_together_are_refused(tmp_path: Path) -> None:
    """The error says what is missing."""
    with pytest.raises(PolicyError, match=r"WithoutMailbox has no mailbox\(\); leave background= out"):
        DistributedManager(tmp_path, POLICY, ranks=WithoutMailbox(), state=dict, format="dcp", background="wait")


def test_another_folder_format_is_refused_in_the_background(tmp_path: Path) -> None:
    """The process group that it uses is not known."""
    with pytest.raises(PolicyError, match="format='dcp'"):
        DistributedManager(
            tmp_path, POLICY, ranks=OneRank(), state=dict, format=dcp_folder.DcpFormat(), background="wait"
        )


def look(rank: int) -> Any:
    ranks = TorchRanks()
    mailbox, other = ranks.mailbox(), ranks.mailbox()
    # As in a training that comes after another, with groups of the same names.
    again = TorchMailbox(mailbox.group, timeout_s=PATIENCE_S)
    before = mailbox.look("1")
    torch.distributed.barrier()
    if rank == 0:
        mailbox.post("0", "")
        mailbox.post("1", "before")
        mailbox.post("1", "runs/é")
    torch.distributed.barrier()
    found = before, mailbox.look("0"), mailbox.look("1"), other.look("1"), again.look("1")
    for closed in (mailbox, other, ranks, mailbox):
        closed.close()
    return found


@pytest.mark.slow
def test_a_message_in_the_mailbox_is_read_by_all_ranks() -> None:
    """Also an empty one; and what is left in one mailbox is not in another."""
    assert [(None, "", "runs/é", None, None)] * 2 == together(2, look)
