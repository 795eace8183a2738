"""One run has one writer: who holds a run, who may take it over, and that a writer that comes back can do no harm."""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
from support.commands import command
from support.plain_format import PlainFormat
from support.s3_tools import LargeFormat, unfinished
from support.servers.fixtures import Serve

from checkpointer import (
    CheckpointManager,
    EverySteps,
    HMACKey,
    KeepAll,
    KeepBest,
    KeepLast,
    Policy,
)
from checkpointer.commit import holder, lease, terms
from checkpointer.commit.changes import Changes, write_changes
from checkpointer.commit.journal import Journal
from checkpointer.commit.writer_marks import writers_in
from checkpointer.errors import (
    CheckpointerError,
    CheckpointerWarning,
    FencedError,
    PolicyError,
    RunInUseError,
    StorageError,
)
from checkpointer.ports import Stat, Storage
from checkpointer.records.record import Entry
from checkpointer.restore.load import verify
from checkpointer.storage import owner as owners
from checkpointer.storage.digests import digest_of
from checkpointer.storage.local import LocalStorage
from checkpointer.storage.owner import machine, new_owner, release
from checkpointer.testing import MemoryStorage
from checkpointer.tools.catalog import look_at
from checkpointer.tools.prune import plan_pruning, prune

pytestmark = pytest.mark.filterwarnings("ignore::checkpointer.errors.CheckpointerWarning")

LAST = Policy(EverySteps(1), [KeepLast(2)], last="link")
SLOT = Policy(EverySteps(1), [KeepBest(1, "loss", mode="min")], last="link", best="link")
ALL = Policy(EverySteps(1), [KeepAll()])
ONE_NAME = Policy(EverySteps(1), [KeepLast(1)], name="model")
POLICIES = {"last": LAST, "slot": SLOT, "copies": Policy(EverySteps(1), [KeepLast(1)], last="copy"), "all": ALL}


def started(
    storage: Storage | Path | str, policy: Policy, name: str, host: str = "", **options: Any
) -> CheckpointManager:
    """Return a manager whose state says who wrote it; on another host if one is named."""
    state = {"writer": name, "step": 0}
    before = owners._host
    if host:
        owners._host = lambda: f"{host}_0000_1"  # type: ignore[assignment]
    try:
        manager = CheckpointManager(
            storage,
            policy,
            state=lambda: dict(state),
            **{"format": PlainFormat(), "lease_s": 0.05, **options},
        )
    finally:
        owners._host = before
    if host:
        manager.session._directory.holder.open_again = _hang
    manager.state = state  # type: ignore[attr-defined]
    return manager


def _hang() -> Any:
    """Open no storage for heartbeats, as on a host that is gone."""
    raise OSError


def save(manager: CheckpointManager, step: int, loss: float = 0.5) -> Any:
    """Save one step."""
    manager.state["step"] = step  # type: ignore[attr-defined]
    return manager.observe({"loss": loss}, step=step, epoch=0, epoch_end=False)


def test_a_second_manager_of_the_process_is_refused_at_once(tmp_path: Path) -> None:
    """Without an alias too; the first one goes on."""
    first = started(tmp_path, ALL, "first")
    save(first, 1)
    second = started(tmp_path, ALL, "second")
    with pytest.raises(RunInUseError, match=r"on this host .* another manager of this process; close\(\) that one"):
        second.restore()
    save(first, 2)
    first.close()
    restored = second.restore()
    assert restored is not None
    assert 2 == restored.record.step
    save(second, 3)
    second.close()
    assert [1, 2, 3] == [record.step for record in look_at(second.session._directory.storage).records]


def test_a_reader_never_claims(tmp_path: Path) -> None:
    """An evaluation beside the training restores, and the training goes on."""
    with started(tmp_path, ALL, "first") as first:
        save(first, 1)
        with CheckpointManager(tmp_path, format=PlainFormat()) as reader:
            assert reader.restore() is not None
        save(first, 2)
        assert 1 == len(list((tmp_path / ".checkpointer/terms").rglob("*.json")))


def test_a_fresh_run_beside_another_one_is_free(tmp_path: Path) -> None:
    """Two runs in one directory go on as before."""
    with started(tmp_path, ALL, "first") as first, started(tmp_path, ALL, "second") as second:
        for step in (1, 2):
            save(first, step)
            save(second, step)
    assert 4 == len(look_at(first.session._directory.storage).records)


def test_a_holder_on_another_host_without_heartbeats_is_replaced_and_fenced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It learns at its next save who has taken over; it makes no rescue and writes nothing more."""
    old = started(tmp_path, LAST, "old", host="node1")
    save(old, 1)
    save(old, 2)
    new = started(tmp_path, LAST, "new")
    assert new.restore() is not None
    assert "process" in caplog.text
    assert "on host node1" in caplog.text
    assert "sent no heartbeat" in caplog.text
    save(new, 3)
    before = sorted(path for path in tmp_path.rglob("*"))
    for _ in range(2):
        with pytest.raises(FencedError, match=r"has taken over run .* \(term 2; this process had term 1\)"):
            save(old, 3)
    with pytest.raises(FencedError):
        old.rescue("asked for", step=4)
    old.close(RuntimeError("the end"))
    assert "old" not in {found["writer"] for found in states(tmp_path, [3, 4])}
    assert {path.name for path in before} >= {path.name for path in tmp_path.rglob("*") if path.suffix == ".ckpt"}
    save(new, 4)
    new.close()


class Interrupted(PlainFormat):
    """Calls a function in the middle of a write."""

    def __init__(self) -> None:
        self.meanwhile: Callable[[], object] = lambda: None

    def write(self, state: Any, stream: Any) -> None:
        stream.write(b" ")
        self.meanwhile()
        super().write(state, stream)


class InterruptedFolder(Interrupted):
    """Writes a folder of two files, and calls the function between them."""

    def __init__(self, *, makes_again: bool) -> None:
        super().__init__()
        self.makes_again = makes_again

    def write_folder(self, state: Any, path: str) -> None:
        Path(path).mkdir()
        Path(path, "first").write_text(state["writer"])
        self.meanwhile()
        if self.makes_again:
            Path(path).mkdir(parents=True, exist_ok=True)
        Path(path, "second").write_text(state["writer"])

    def read_folder(self, path: str, *, weights_only: bool, map_location: Any) -> Any:
        return {"writer": Path(path, "second").read_text()}


@pytest.mark.parametrize("what", ["file", "slot", "folder", "folder that is made again"])
def test_what_a_replaced_writer_on_another_host_had_staged_is_gone_at_once(tmp_path: Path, what: str) -> None:
    """It was paused in a save. When it goes on that save fails, and what it had acknowledged before is there."""
    payload = InterruptedFolder(makes_again="again" in what) if "folder" in what else Interrupted()
    policy = SLOT if what == "slot" else LAST
    old = started(tmp_path, policy, "old", host="node1", format=payload)
    save(old, 1)
    staging, owner, news = tmp_path / ".checkpointer/staging", old.session._directory.journal.owner, []
    claim = staging / f"claim-0/{owner}-1"
    claim.mkdir(parents=True)  # It may be about to rename to a name that it has claimed.

    def take_over() -> None:
        payload.meanwhile = lambda: None
        assert [] != list(staging.glob(f"{owner}-*/*"))
        news.append(started(tmp_path, policy, "new", run=old.session.manifest.run, format=payload))
        assert [claim] == list(staging.rglob(f"{owner}-*"))

    payload.meanwhile = take_over
    for step in (2, 3):
        with pytest.raises(FencedError):
            save(old, step)
    [new] = news
    assert [1] == [record.step for record in look_at(new.session._directory.storage).records]
    restored = new.restore()
    assert restored is not None
    assert (1, "old") == (restored.step, restored.state["writer"])
    save(new, 2)
    new.close()
    with CheckpointManager(tmp_path, format=payload) as reader:
        assert "old" not in {reader.restore(r.name).state["writer"] for r in reader.records if r.step > 1}  # type: ignore[union-attr]


@pytest.mark.parametrize("saved", [[], [1]], ids=["first save", "later save"])
def test_sweep_with_force_removes_what_a_writer_on_another_host_had_staged(tmp_path: Path, saved: list[int]) -> None:
    """The user says that this writer has ended. If it goes on, it is fenced, and publishes nothing."""
    with started(tmp_path, LAST, "other", run="another run") as other:
        save(other, 1)
    payload = InterruptedFolder(makes_again=True)
    old = started(tmp_path, LAST, "old", host="node1", run="r", format=payload)
    for step in saved:
        save(old, step)
    staging, owner = tmp_path / ".checkpointer/staging", old.session._directory.journal.owner

    def end() -> None:
        payload.meanwhile = lambda: None
        for options, is_left in (([], True), (["--force"], False)):
            assert 0 == command("sweep", tmp_path, *options).code
            assert is_left == any(staging.rglob(f"{owner}-*"))

    payload.meanwhile = end
    with pytest.raises(FencedError):
        save(old, 2)
    with started(tmp_path, LAST, "new", run="r", lease_s=600, format=payload) as new:
        assert saved == [record.step for record in new.session.manifest.live]
    old.close()


class NoDiscard(LocalStorage):
    """Cannot remove what another writer has staged."""

    def discard(self, owner: str) -> None:
        raise StorageError(f"{owner} has files that cannot be removed")


def test_a_takeover_goes_on_if_what_was_staged_cannot_be_removed(tmp_path: Path) -> None:
    """The term is claimed by then: an error would leave a run that this process holds and does not know of."""
    old = started(tmp_path, LAST, "old", host="node1")
    save(old, 1)
    with started(NoDiscard(tmp_path, new_owner()), LAST, "new", run=old.session.manifest.run) as new:
        save(new, 2)
        assert [1, 2] == [record.step for record in new.records]
    old.close()


class InterruptedUpload(LargeFormat):
    """Calls a function when all but the last byte is written."""

    def __init__(self) -> None:
        super().__init__()
        self.meanwhile: Callable[[], object] = lambda: None

    def write(self, state: Any, stream: Any) -> None:
        super().write(state, stream)
        self.meanwhile()
        stream.write(b" ")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["s3", "rclone"])
@pytest.mark.parametrize("policy", [LAST, SLOT], ids=["file", "slot"])
def test_the_upload_of_a_replaced_writer_on_another_host_is_gone_at_once(
    serve: Serve, name: str, policy: Policy
) -> None:
    """It was paused in a save. When it goes on that save fails, and what it had acknowledged before is there."""
    server, payload, news = serve(name), InterruptedUpload(), list[CheckpointManager]()
    url = server.fresh()
    how: dict[str, Any] = {"format": payload, "storage_options": server.storage_options}
    old = started(url, policy, "old", host="node1", **how)
    save(old, 1)

    def take_over() -> None:
        payload.meanwhile = lambda: None
        assert 1 == len(unfinished(server, url))
        news.append(started(url, policy, "new", run=old.session.manifest.run, **how))
        assert [] == unfinished(server, url)

    payload.meanwhile = take_over
    for step in (2, 3):
        with pytest.raises(FencedError):
            save(old, step)
    [new] = news
    restored = new.restore()
    assert restored is not None
    assert (1, "old") == (restored.step, restored.state["writer"])
    save(new, 2)
    assert [1, 2] == [record.step for record in new.records]
    new.close()
    assert [] == unfinished(server, url)


def states(place: Storage | Path, steps: list[int] | None = None) -> list[dict[str, Any]]:
    """Return the states of the newest run's checkpoints that count."""
    with CheckpointManager(place, format=PlainFormat()) as reader:
        records = [record for record in reader.records if steps is None or record.step in steps]
        return [restored.state for record in records if (restored := reader.restore(record.name)) is not None]


def test_a_holder_that_sends_heartbeats_is_not_replaced(tmp_path: Path) -> None:
    """The second process is refused with the ways out, and the holder goes on."""
    old = started(tmp_path, LAST, "old", host="node1")
    save(old, 1)
    term = old.session._directory.journal.term
    assert term is not None
    ended = threading.Event()
    beats = threading.Thread(target=holder._keep_beating, args=(ended, term, lambda: term.storage, str))
    beats.start()
    new = started(tmp_path, LAST, "new")
    new.session._directory.holder.lease = lease.Lease(seconds=30)
    try:
        with pytest.raises(
            RunInUseError, match=r"on host node1 .*last heartbeat came .*takeover=True.*CHECKPOINTER_TAKEOVER"
        ):
            new.restore()
    finally:
        ended.set()
        beats.join()
    save(old, 2)
    old.close()
    assert new.restore() is not None
    new.close()


@pytest.mark.parametrize("policy", [ALL, LAST], ids=["all", "last"])
def test_a_takeover_is_asked_for_by_argument_or_environment(
    tmp_path: Path, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then a live holder is fenced, too."""
    first = started(tmp_path, policy, "first")
    save(first, 1)
    second = started(tmp_path, policy, "second", takeover=True)
    assert second.restore() is not None
    with pytest.raises(FencedError, match="on this host"):
        save(first, 2)
    monkeypatch.setenv("CHECKPOINTER_TAKEOVER", "1")
    third = started(tmp_path, policy, "third")
    assert third.restore() is not None
    with pytest.raises(FencedError, match="term 3"):
        save(second, 2)
    save(third, 2)
    monkeypatch.setenv("CHECKPOINTER_TAKEOVER", "yes")
    with pytest.raises(PolicyError, match="CHECKPOINTER_TAKEOVER is 'yes'"):
        started(tmp_path, policy, "fourth")
    monkeypatch.delenv("CHECKPOINTER_TAKEOVER")
    with pytest.raises(PolicyError, match="lease_s is 0"):
        CheckpointManager(tmp_path, policy, state=dict, lease_s=0)
    assert ["first", "third"] == [found["writer"] for found in states(tmp_path)]


def test_a_fenced_save_is_never_tolerated_and_fences_the_writer_thread(tmp_path: Path) -> None:
    """Neither by tolerate_failures nor in the background."""
    old = started(tmp_path, ALL, "old", host="node1", background="wait", tolerate_failures=9)
    save(old, 1)
    old.wait()
    new = started(tmp_path, ALL, "new")
    new.restore()
    with pytest.raises(FencedError):
        save(old, 2) and old.wait()
    old.close(RuntimeError("end"))


def test_the_terms_of_a_run_are_shown(tmp_path: Path) -> None:
    """`ls` names the holder, `show --run` all terms, and a late checkpoint is listed as abandoned."""
    old = started(tmp_path, ALL, "old", host="node1")
    save(old, 1)
    new = started(tmp_path, ALL, "new")
    restored = new.restore()
    assert restored is not None
    run = restored.record.run
    late = attrs.evolve(restored.record, name="late.ckpt", step=2, serial=2, token="late")
    (tmp_path / "late.ckpt").write_bytes((tmp_path / restored.record.name).read_bytes())
    new.session._directory.journal.put(Entry(record=late))
    save(new, 2)
    listed = command("ls", tmp_path)
    why = "abandoned: another process had taken over the run"
    assert why in listed.out
    assert f"run {run} is held by process {os.getpid()} on this host" in listed.out
    shown = command("show", tmp_path, "--run", run).out
    assert re.search(r"1 +replaced +process \d+ on host node1", shown)
    assert re.search(r"2 +holds +process \d+ on this host", shown)
    new.close()
    (policy := tmp_path / "policy.yaml").write_text(ALL.to_yaml())
    assert why == command("prune", tmp_path, "-p", policy, "--abandoned", "--json").data["going"]["late.ckpt"]
    kept = command("prune", tmp_path, "-p", policy, "--json").data["kept"]["late.ckpt"]
    assert f"{why}; --abandoned removes it" == kept
    assert "is held by" not in command("ls", tmp_path).out
    states = [(one["term"], one["state"]) for one in json.loads(command("show", tmp_path, "--run", run, "--json").out)]
    assert [(1, "replaced"), (2, "released")] == states
    assert 2 == command("show", tmp_path).code


def replaced(place: Storage | Path, policy: Policy = ALL) -> tuple[CheckpointManager, CheckpointManager]:
    """Return a manager that was replaced after two saves, and the one that has replaced it and saved once."""
    old = started(place, policy, "old", host="node1")
    save(old, 1)
    save(old, 2)
    new = started(place, policy, "new")
    assert new.restore() is not None
    save(new, 3)
    return old, new


def test_a_process_that_only_looks_blocks_no_alias(tmp_path: Path) -> None:
    """The holder claims its aliases at its first save, although another manager was opened before."""
    with started(tmp_path, LAST, "first") as first:
        save(first, 1)
    onlooker = started(tmp_path, LAST, "onlooker")
    with started(tmp_path, LAST, "second") as second:
        assert second.restore() is not None
        assert save(second, 2)
    onlooker.close()


def test_a_replaced_process_renames_and_pins_nothing(tmp_path: Path) -> None:
    """A host that makes way for a file of its own is fenced, too."""
    old, new = replaced(tmp_path)
    name = new.records[-1].name
    with pytest.raises(FencedError):
        old.session.make_way(name)
    with pytest.raises(FencedError):
        old.pin("epoch=0-step=1.ckpt")
    (tmp_path / "own.ckpt").write_bytes(b"theirs")
    decision = old.session.decide({}, step=4, epoch=0)
    with pytest.raises(FencedError):
        old.session.commit(decision, tmp_path / "own.ckpt")
    assert (tmp_path / name).exists()
    new.close()


def test_a_process_that_does_not_train_pins_nothing_of_a_live_run(tmp_path: Path) -> None:
    """The training would remove the checkpoint nevertheless. Once it has ended, the pin counts, and holds no run."""
    first = started(tmp_path, LAST, "first")
    for step in (1, 2):
        save(first, step)
    (name, _) = (record.name for record in first.records)
    evaluation = CheckpointManager(tmp_path, format=PlainFormat())
    with pytest.raises(RunInUseError, match=r"trains run .* another manager of this process"):
        evaluation.pin(name)
    first.close()
    evaluation.pin(name)
    with started(tmp_path, LAST, "second") as second:
        assert second.restore() is not None
        for step in (3, 4):
            save(second, step)
        assert [1, 3, 4] == [record.step for record in second.records]
        with pytest.raises(RunInUseError):
            evaluation.unpin(name)
    evaluation.unpin(name)
    evaluation.close()
    with started(tmp_path, LAST, "third") as third:
        assert third.restore() is not None
        save(third, 5)
        assert [4, 5] == [record.step for record in third.records]


@pytest.mark.parametrize("policy", [LAST, SLOT], ids=["last", "slot"])
def test_a_pin_counts_whatever_a_paused_writer_was_about_to_do(policy: Policy) -> None:
    """The writer removes or replaces this checkpoint; it is paused before each of its operations, and goes on."""
    at = 0
    while True:
        at += 1
        inner = MemoryStorage()
        pinned: list[str] = []

        def pin(inner: MemoryStorage = inner, pinned: list[str] = pinned) -> None:
            with CheckpointManager(inner, policy, format=PlainFormat(), takeover=True) as evaluation:
                record = evaluation.records[0]
                evaluation.pin(record.name)
                pinned.append(record.token)

        storage = Pausing(inner, at, pin)
        old = started(storage, policy, "old", host="node1")
        save(old, 1, 0.3)
        save(old, 2, 0.6)
        storage.is_armed = True
        with contextlib.suppress(FencedError):
            save(old, 3, 0.2)
        storage.is_armed = False
        if not pinned:
            break
        with started(inner, policy, "new", takeover=True) as new:
            assert new.restore() is not None, at
            save(new, 9, 0.1)
            (kept,) = (record for record in new.records if record.token == pinned[0])
            assert kept.pinned, at
            verify(inner, kept)
    assert at > 5


def test_prune_removes_nothing_of_a_training_that_takes_over_meanwhile() -> None:
    """It sends no heartbeat. A training takes over before each of its operations and saves; then it goes on."""
    at, ends = 0, set()
    while True:
        at += 1
        inner = MemoryStorage()
        with started(inner, ALL, "first", host="node1") as first:
            for step in (1, 2, 3):
                save(first, step)
        made: list[CheckpointManager] = []

        def train(inner: MemoryStorage = inner, made: list[CheckpointManager] = made) -> None:
            made.append(started(inner, ALL, "new", takeover=True))
            restored = made[0].restore()
            assert restored is not None
            save(made[0], restored.record.step + 1)

        storage = Pausing(inner, at, train)
        storage.is_armed = True
        ends.add(pruned(storage))
        storage.is_armed = False
        if not made:
            break
        save(made[0], made[0].records[-1].step + 1)
        for record in made[0].records:
            verify(inner, record)
        there = {record.name for record in look_at(inner).records}
        assert {record.name for record in made[0].records} <= there, at
        assert [4, 5] == [record.step for record in made[0].records][-2:], at
        made[0].close()
    assert at > 10
    assert {"done", "RunInUseError", "AliasInUseError", "FencedError"} == ends


def pruned(storage: Storage) -> str:
    """Remove all checkpoints but the newest one, from a host of its own; return how that ended."""
    before, owners._host = owners._host, lambda: "node3_0000_1"  # type: ignore[assignment]
    owner = new_owner()
    owners._host = before
    try:
        catalog = look_at(storage)
        pruning = plan_pruning(Policy(EverySteps(1), [KeepLast(1)]), catalog.manifest(None))
        prune(catalog, pruning, Journal(storage, owner))
    except CheckpointerError as error:
        return type(error).__name__
    finally:
        release(owner)
    return "done"


def test_a_run_of_which_only_abandoned_checkpoints_are_left_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that took over has ended before its first save: the next one saves the first step again."""
    inner = MemoryStorage()
    old = started(inner, ALL, "old", host="node1", run="r")
    started(inner, ALL, "new", host="node2", run="r", takeover=True)
    with monkeypatch.context() as paused_after_its_look:
        paused_after_its_look.setattr(terms.Term, "check", lambda self: None)
        assert save(old, 1)
    third = started(inner, ALL, "third", run="r", takeover=True)
    with pytest.warns(CheckpointerWarning, match=r"training starts over, because .*step=1.ckpt .* are abandoned"):
        assert third.restore() is None
    assert save(third, 1)
    assert ["third"] == [found["writer"] for found in states(inner)]
    third.close()


def test_what_a_machine_had_begun_before_it_was_booted_again_is_finished(tmp_path: Path) -> None:
    """Nothing waits, the alias keeps its name, and a removal and a pending record that were left are finished."""
    if not machine():
        pytest.skip("this machine has no id that stays the same across boots")
    name, boot, space = owners._host().rsplit("_", 2)
    before, owners._host = owners._host, lambda: f"{name}_{boot}x_{space}"  # type: ignore[assignment]
    try:
        old = started(tmp_path, LAST, "old")
        save(old, 1)
        save(old, 2)
    finally:
        owners._host = before
    directory = old.session._directory
    first, second = old.records
    pending = attrs.evolve(second, name="half.ckpt", step=3, serial=3, token="half")
    directory.journal.announce(Entry(record=pending, status="pending", owner=directory.journal.owner))
    going = directory.journal.retiring(first)
    write_changes(
        directory.storage, Changes(owner=directory.journal.owner, entries=(going,), aliases=("last.ckpt",)), None
    )
    new = started(tmp_path, LAST, "new", lease_s=600)
    restored = new.restore()
    assert restored is not None
    assert 2 == restored.record.step
    save(new, 3)
    assert ["last.ckpt"] == [*new.policy.aliases]
    new.close()
    files = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert not files & {first.name, "half.ckpt.json"}
    assert not list((tmp_path / ".checkpointer/changes").glob("*"))


def test_what_was_abandoned_stays_so_after_one_more_takeover(tmp_path: Path) -> None:
    """A process takes over while the first writer is paused in a replacement, which it ends late. A third one comes."""
    run = tmp_path / "run"
    old = started(run, ONE_NAME, "old", "alpha", run="r")
    save(old, 1)
    directory = old.session._directory
    (first,) = old.records
    (tmp_path / "late").write_bytes(b'{"step": 2, "writer": "late"}')
    found = digest_of(LocalStorage(tmp_path, ""), "late", "xxh3-128")
    assert found is not None
    late = attrs.evolve(first, step=2, serial=2, token="late", size=found[0], digest=found[1])
    announced = Entry(record=late, status="pending", previous=first, owner=directory.journal.owner)
    write_changes(directory.storage, Changes(owner=directory.journal.owner, entries=(announced,), term=1), None)
    new = started(run, ONE_NAME, "new", "beta", run="r", takeover=True)
    assert new.restore() is not None
    (tmp_path / "late").replace(run / first.name)
    directory.journal.put(Entry(record=late))
    with started(run, ONE_NAME, "third", run="r", takeover=True) as third:
        restored = third.restore()
        assert restored is not None
        assert 1 == restored.step
    new.close()
    old.close()


class Meanwhile(MemoryStorage):
    """Calls something before each hard link, and something else after each change that follows."""

    def __init__(self, inner: MemoryStorage, before: Callable[[], object], after: Callable[[], object]) -> None:
        vars(self).update(vars(inner))
        self._before, self._after = before, after
        self.is_linked = False

    def hardlink(self, target: str, path: str) -> None:
        """See `SupportsLinks.hardlink`."""
        self._before()
        super().hardlink(target, path)
        self.is_linked = True

    def write(self, path: str, data: bytes) -> None:
        """See `Storage.write`."""
        super().write(path, data)
        if self.is_linked:
            self._after()

    def delete(self, path: str) -> None:
        """See `Storage.delete`."""
        super().delete(path)
        if self.is_linked:
            self._after()


def test_what_is_replaced_while_a_process_takes_over_is_there_at_each_moment() -> None:
    """The process copies the only checkpoint, and the old writer replaces it before: no record says what is not so."""
    inner = MemoryStorage()
    old = started(inner, ONE_NAME, "old", "alpha", run="r")
    save(old, 1)
    (first,) = old.records
    owner, written, found = old.session._directory.journal.owner, b'{"step": 2, "writer": "late"}', []
    other = MemoryStorage()
    other.write(first.name, written)
    measured = digest_of(other, first.name, "xxh3-128")
    assert measured is not None
    late = attrs.evolve(first, step=2, serial=2, token="late", size=measured[0], digest=measured[1])
    announced = Entry(record=late, status="pending", previous=first, owner=owner)
    write_changes(inner, Changes(owner=owner, entries=(announced,), term=1), None)

    def read() -> None:
        with CheckpointManager(inner, ONE_NAME, format=PlainFormat(), run="r") as reader:
            restored = reader.restore()
            assert restored is not None
            found.append(restored.step)

    storage = Meanwhile(inner, lambda: inner.write(first.name, written), read)
    new = started(storage, ONE_NAME, "new", "beta", run="r", takeover=True)
    assert {2} == {*found}
    assert new.restore() is not None
    (record,) = new.records
    assert first.name != record.name
    verify(inner, record)
    new.close()
    old.close()


def test_what_a_replaced_writer_announces_too_late_hides_nothing() -> None:
    """It saves once more, announces that the checkpoint before is removed, and is stopped before it looks.

    Its new checkpoint does not count, because it came after the takeover. So the one before has to count.
    """
    storage = MemoryStorage()
    old = started(storage, ALL, "old", "alpha", run="r")
    save(old, 1)
    (first,) = old.records
    new = started(storage, ALL, "new", "beta", run="r", takeover=True)
    assert new.restore() is not None
    directory = old.session._directory
    going = directory.journal.retiring(first)
    write_changes(storage, Changes(owner=directory.journal.owner, entries=(going,), term=1), None)

    with CheckpointManager(storage, ALL, format=PlainFormat(), run="r") as reader:
        assert [1] == [record.step for record in reader.records]
    third = started(storage, ALL, "third", "gamma", run="r", takeover=True)
    restored = third.restore()
    assert restored is not None
    assert 1 == restored.step
    for manager in (third, new, old):
        manager.close()


def test_what_an_ended_writer_announced_too_late_is_finished_by_no_process(tmp_path: Path) -> None:
    """A process of another run must not touch it: the successor replaces the same checkpoint at that moment."""
    old = started(tmp_path, ONE_NAME, "old", run="r")
    save(old, 1)
    (first,), storage, owner = old.records, old.session._directory.storage, old.session._directory.journal.owner
    new = started(tmp_path, ONE_NAME, "new", run="r", takeover=True)
    assert new.restore() is not None
    going = old.session._directory.journal.retiring(first)
    write_changes(storage, Changes(owner=owner, entries=(going,), term=1), None)
    release(owner)
    (tmp_path / first.name).write_bytes(b"replaced, and its record is about to follow")

    with started(tmp_path, Policy(EverySteps(1), [KeepAll()], name="other-{step}"), "other", run="q") as other:
        save(other, 1)
    assert new.session._directory.journal.read(first.name) is not None
    assert [] == list((tmp_path / ".checkpointer/changes").glob(f"{owner}*"))
    new.close()


def test_a_manager_that_could_not_change_to_another_run_holds_its_own_at_the_next_save(tmp_path: Path) -> None:
    """It had released its run, so another process could have taken it over without a wait."""
    other = started(tmp_path, Policy(EverySteps(1), [KeepAll()], name="other-{step}"), "other", run="q")
    save(other, 1)
    old = started(tmp_path, ALL, "old", run="r")
    save(old, 1)
    with pytest.raises(RunInUseError):
        old.restore("other-step=1.ckpt")
    save(old, 2)
    with pytest.raises(RunInUseError):
        started(tmp_path, ALL, "second", run="r")
    save(old, 3)
    for manager in (old, other):
        manager.close()


class Failing(MemoryStorage):
    """Fails to write files whose path ends with a text, while it has one."""

    end = ""

    def write(self, path: str, data: bytes) -> None:
        """See `Storage.write`."""
        if self.end and path.endswith(self.end):
            raise OSError(28, "No space left on device")
        super().write(path, data)


def test_a_replacement_without_a_record_counts_after_a_change_of_another_run() -> None:
    """The announced change proves the payload. The number of a term of another run does not make it late."""
    storage = Failing()
    with started(storage, Policy(EverySteps(1), [KeepAll()], name="other-{step}"), "other", run="q") as other:
        save(other, 1)
    for step in (1, 2, 3):
        old = started(storage, ONE_NAME, "old", run="r")
        save(old, step)
        if step < 3:
            old.close()
    storage.end = f"records/{old.records[-1].name}.json"
    save(old, 4)
    storage.end = ""
    assert old.restore("other-step=1.ckpt") is not None
    old.session._directory.holder.stop_heartbeat()

    with CheckpointManager(storage, ONE_NAME, format=PlainFormat(), run="r") as reader:
        restored = reader.restore()
        assert restored is not None
        assert 4 == restored.step
    old.close()


def test_a_run_is_left_for_another_only_if_it_can_be_released() -> None:
    """Else the process that takes it over would remove what this writer stages for the other run."""
    storage = Failing()
    with started(storage, Policy(EverySteps(1), [KeepAll()], name="other-{step}"), "other", run="q") as other:
        save(other, 1)
    old = started(storage, ALL, "old", run="r")
    save(old, 1)
    storage.end = ".end"
    with pytest.raises(OSError, match="No space left"):
        old.restore("other-step=1.ckpt")
    storage.end = ""
    save(old, 2)
    assert ["r", "r"] == [record.run for record in old.records]
    old.close()


def test_an_announcement_of_a_replaced_writer_does_not_hide_that_of_its_successor(tmp_path: Path) -> None:
    """The successor is killed while it replaces a checkpoint, and the old writer while it learns that it is fenced."""
    old = started(tmp_path, ONE_NAME, "old", "alpha", run="r")
    save(old, 1)
    new = started(tmp_path, ONE_NAME, "new", "beta", run="r", takeover=True)
    assert new.restore() is not None
    (first,) = old.records
    written = b'{"step": 2, "by": "new"}'
    (tmp_path / first.name).write_bytes(written)
    digest = digest_of(LocalStorage(tmp_path, ""), first.name, "xxh3-128")
    assert digest is not None
    for manager, term, token in ((old, 1, "old"), (new, 2, "new")):
        record = attrs.evolve(first, step=2, serial=2, token=token, term=term)
        record = attrs.evolve(record, size=digest[0], digest=digest[1]) if manager is new else record
        journal = manager.session._directory.journal
        entry = Entry(record=record, status="pending", previous=first, owner=journal.owner)
        write_changes(journal.storage, Changes(owner=journal.owner, entries=(entry,), term=term), None)
    with CheckpointManager(tmp_path, ONE_NAME, format=PlainFormat(), run="r") as reader:
        assert ["new"] == [record.token for record in reader.records]
    new.close()
    old.close()


def test_a_listing_is_not_older_than_the_announcement_that_it_is_read_with(tmp_path: Path) -> None:
    """Between both a save ends, and the checkpoint before it is announced as removed: then the new one is seen."""
    old = started(tmp_path, ALL, "old", "alpha", run="r")
    save(old, 1)
    directory = old.session._directory
    journal, (first,) = directory.journal, old.records
    second = attrs.evolve(first, name="second.ckpt", step=2, serial=2, token="second")

    class Between(LocalStorage):
        def open(self, path: str) -> Any:
            if path.startswith(".checkpointer/changes/") and not (tmp_path / "second.ckpt").exists():
                (tmp_path / "second.ckpt").write_bytes((tmp_path / first.name).read_bytes())
                journal.announce(Entry(record=second))
                going = directory.journal.retiring(first)
                write_changes(journal.storage, Changes(owner=journal.owner, entries=(going,), term=1), None)
            return super().open(path)

    new = started(Between(tmp_path, "new"), ALL, "new", run="r", takeover=True)
    restored = new.restore()
    assert restored is not None
    assert "second.ckpt" == restored.record.name
    new.close()
    old.close()


def test_a_copy_knows_what_was_abandoned(tmp_path: Path) -> None:
    """What a replaced process has saved late does not count in a copy either."""
    old, new = replaced(tmp_path / "a")
    record = new.records[-1]
    late = attrs.evolve(record, name="late.ckpt", step=9, serial=9, term=1, token="late")
    (tmp_path / "a" / "late.ckpt").write_bytes((tmp_path / "a" / record.name).read_bytes())
    new.session._directory.journal.put(Entry(record=late))
    new.close()
    old.close()
    for owner in writers_in(LocalStorage(tmp_path / "a", "")):
        release(owner)
    assert 0 == command("copy", tmp_path / "a", tmp_path / "b").code
    with CheckpointManager(tmp_path / "b", format=PlainFormat()) as reader:
        assert [1, 2, 3] == [found.step for found in reader.records]
        assert 4 == len(reader.session.manifest.own)


def test_a_claim_that_cannot_be_created_names_both_causes() -> None:
    """An empty folder, and a name that a stopped process has reserved, look the same: the error says what to do."""

    class Refusing(MemoryStorage):
        def _is_taken(self, path: str) -> bool:
            return path.endswith("/1.json")

    with pytest.raises(StorageError, match=r"start again when 15 minutes .* an empty folder has this name; then rem"):
        lease.claim_term(Refusing(), "r", "", "someone", lease.Lease(), is_new=False)


@pytest.mark.parametrize("name", ["999999999.json", "99999999999999999999.json", "7.limits", "3.json.tmp", "x.json"])
def test_a_file_among_the_terms_that_this_library_did_not_write_disturbs_nothing(tmp_path: Path, name: str) -> None:
    """Terms follow one another without a gap; limits that cannot be read are damage."""
    with started(tmp_path, ALL, "first") as first:
        save(first, 1)
    (folder,) = (tmp_path / ".checkpointer/terms").iterdir()
    (folder / name).write_bytes(b"junk")
    with started(tmp_path, ALL, "second") as second:
        assert second.restore() is not None
        save(second, 2)
        assert 2 == second.session._directory.journal.term.number  # type: ignore[union-attr]
    assert name.endswith(".limits") == ("damaged" in command("ls", tmp_path).err)


def test_limits_without_the_key_hide_no_signed_checkpoint(tmp_path: Path) -> None:
    """An unsigned file of limits is damage, and does not count."""
    key = HMACKey(b"0123456789abcdef")
    with started(tmp_path, ALL, "first", trust=key) as first:
        save(first, 1)
    (folder,) = (tmp_path / ".checkpointer/terms").iterdir()
    (folder / "9.limits").write_bytes(b'{"schema": 1, "limits": [[9, 0]]}')
    with started(tmp_path, ALL, "second", trust=key) as second:
        restored = second.restore()
        assert restored is not None
        assert 1 == restored.record.step


@pytest.mark.parametrize("damaged", [2, 3])
def test_a_checkpoint_that_came_too_late_does_not_count_if_the_limits_are_damaged(damaged: int) -> None:
    """The limits of the term before count, and no record of a lower term that is newer than the first of the term."""
    storage = MemoryStorage()
    managers = [started(storage, ALL, "old", "alpha", run="r")]
    save(managers[0], 1)
    (first,) = managers[0].records
    for step, name in enumerate(["beta", "gamma"][: damaged - 1], start=2):
        managers.append(started(storage, ALL, name, name, run="r", takeover=True))
        assert managers[-1].restore() is not None
        if step == 2:  # The first writer had looked before the takeover, and commits after it.
            storage.hardlink(first.name, "late")
            late = attrs.evolve(first, name="late", step=9, serial=2, token="late")
            managers[0].session._directory.journal.put(Entry(record=late))
        save(managers[-1], step)
    storage.write(f"{terms.TERMS}/{terms.key_of('r', '')}/{damaged}.limits", b"junk")

    with CheckpointManager(storage, ALL, format=PlainFormat(), run="r") as reader:
        assert [*range(1, damaged + 1)] == [
            record.step for record in reader.records if reader.session.manifest.counts(record)
        ]
    for manager in managers:
        manager.close()


class Pausing(MemoryStorage):
    """Runs something before the n-th operation of the one writer that uses it by this wrapper."""

    def __init__(self, inner: MemoryStorage, at: int, run: Callable[[], None]) -> None:
        vars(self).update(vars(inner))
        self._files, self._links, self._versions = inner._files, inner._links, inner._versions
        self.count, self.at, self.run = 0, at, run
        self.is_armed = False

    def _tick(self) -> None:
        if self.is_armed:
            self.count += 1
            if self.count == self.at:
                self.is_armed = False
                self.run()
                self.is_armed = True


def _ticking(name: str) -> Any:
    method = getattr(MemoryStorage, name)

    def call(self: Pausing, *args: Any) -> Any:
        self._tick()
        return method(self, *args)

    return call


for _name in ("list", "open", "write", "delete", "symlink", "hardlink"):
    setattr(Pausing, _name, _ticking(_name))


class _PausingUpload:
    def __init__(self, storage: Pausing, path: str) -> None:
        self._storage, self._inner = storage, MemoryStorage.upload(storage, path)

    def write(self, data: Any) -> int:
        return self._inner.write(data)

    def finish(self) -> None:
        self._storage._tick()
        self._inner.finish()

    def publish(self, *, replace: bool) -> None:
        self._storage._tick()
        armed, self._storage.is_armed = self._storage.is_armed, False
        self._inner.publish(replace=replace)
        self._storage.is_armed = armed

    def abort(self) -> None:
        self._inner.abort()


Pausing.upload = lambda self, path: _PausingUpload(self, path)  # type: ignore[method-assign, arg-type]


class Lagging(MemoryStorage):
    """Lists no file of changes: its listing lags behind what can be opened."""

    def list(self, prefix: str = "") -> dict[str, Stat]:
        """See `Storage.list`."""
        found = super().list(prefix)
        return found if prefix else {path: stat for path, stat in found.items() if "/changes/" not in path}


def test_the_changes_of_the_holder_are_read_although_no_listing_shows_them() -> None:
    """The old writer is paused after its look, before it replaces the one checkpoint; the new one relies on a copy."""
    inner = Lagging()
    made: list[CheckpointManager] = []

    def take_over() -> None:
        made.append(started(inner, ONE_NAME, "new"))
        assert made[0].restore() is not None

    for at in range(1, 30):
        inner, made[:] = Lagging(), []
        storage = Pausing(inner, at, take_over)
        old = started(storage, ONE_NAME, "old", host="node1")
        save(old, 1)
        storage.is_armed = True
        with contextlib.suppress(FencedError):
            save(old, 2)
        storage.is_armed = False
        if not made:
            break
        (record,) = made[0].records
        assert record.name in {found.name for found in look_at(inner).records}, at
        verify(inner, record)
        made[0].close()
    assert at > 5


class Stale(MemoryStorage):
    """Lists the whole directory as it was at one moment, as long as ``seen`` is set."""

    seen: dict[str, Stat] | None = None

    def list(self, prefix: str = "") -> dict[str, Stat]:
        """See `Storage.list`."""
        return super().list(prefix) if prefix or self.seen is None else self.seen


def test_a_listing_that_lags_loses_a_checkpoint() -> None:
    """Such a storage is not supported: the next process goes on from an older checkpoint, and abandons the newest."""
    storage = Stale()
    old = started(storage, ALL, "old", host="node1", run="r")
    save(old, 1)
    seen = storage.list()
    save(old, 2)
    storage.seen = seen
    new = started(storage, ALL, "new", run="r", takeover=True)
    restored = new.restore()
    assert restored is not None
    assert 1 == restored.step
    storage.seen = None
    save(new, 2)
    assert [("old", 1), ("new", 2)] == [(found["writer"], found["step"]) for found in states(storage)]
    new.close()


def test_a_listing_of_a_live_run_is_not_taken_for_an_empty_directory() -> None:
    """While it is read, the only checkpoint is retired for the next one: a start finds that one."""
    inner = MemoryStorage()
    first = started(inner, Policy(EverySteps(1), [KeepLast(1)]), "first")
    save(first, 1)
    for at in range(1, 12):
        storage = Pausing(inner, at, lambda at=at: save(first, at + 1))  # type: ignore[misc]
        storage.is_armed = True
        with CheckpointManager(storage, format=PlainFormat()) as reader:
            assert reader.session.locate() is not None, at
    first.close()


@pytest.mark.parametrize("policy", [LAST, SLOT, POLICIES["copies"], ALL, ONE_NAME], ids=[*POLICIES, "one name"])
@pytest.mark.parametrize("late", ["save", "attach"])
def test_a_writer_that_is_paused_before_any_operation_harms_nothing(policy: Policy, late: str) -> None:
    """Another process takes over meanwhile and saves twice; then the old one goes on, and a third one restores."""
    at, ends = 0, set()
    while True:
        at += 1
        inner = MemoryStorage()
        made: list[CheckpointManager] = []

        def take_over(inner: MemoryStorage = inner, made: list[CheckpointManager] = made) -> None:
            new = started(inner, policy, "new")
            restored = new.restore()
            assert restored is not None
            made.append(new)
            begun = restored.record.step
            for step in (begun + 1, begun + 2):
                save(new, step, 0.4 + step / 100)

        storage = Pausing(inner, at, take_over)
        old = started(storage, policy, "old", host="node1")
        save(old, 1, 0.3)
        save(old, 2, 0.6)
        storage.is_armed = True
        try:
            if late == "attach":
                old.observe({"loss": 0.1}, step=2, epoch=0, epoch_end=False)
            else:
                save(old, 3, 0.2)
            ends.add("done")
        except FencedError:
            ends.add("fenced")
        storage.is_armed = False
        if not made:
            break
        check_winner(inner, policy, made[0], at)
    assert at > 5
    assert {"done", "fenced"} == ends


def check_winner(storage: MemoryStorage, policy: Policy, new: CheckpointManager, at: int) -> None:
    """Everything that the winner has counts and is whole, before and after its next save; a third one goes on."""
    names = [record.name for record in new.records]
    assert names, at
    for _ in range(2):
        catalog = look_at(storage)
        found = {record.name: record for record in catalog.records}
        for record in new.records:
            assert record.name in found, (at, record.name, sorted(found), [*storage.list()])
            assert record.token == found[record.name].token, at
            verify(storage, record)
        newest = new.records[-1]
        targets = {new.policy.name.last_file: newest, new.policy.name.best_file: new.best}
        for alias in new.policy.aliases:
            target = targets[alias]
            assert target is not None
            with storage.open(alias) as stream, storage.open(target.name) as expected:
                assert expected.read() == stream.read(), (at, alias)
        save(new, newest.step + 1, 0.45)
    last = new.records[-1]
    new.close()
    with started(storage, policy, "third") as third:
        restored = third.restore()
        assert restored is not None
        assert ("new", last.step) == (restored.state["writer"], restored.record.step), at
        # If the old writer was fenced before it removed a checkpoint, that one is there again.
        mine = {record.name for record in new.records}
        more = [record for record in third.records if record.name not in mine]
        assert mine <= {record.name for record in third.records}, (at, mine)
        assert all(record.step <= 2 and record.term == 1 for record in more), (at, more)
