"""The crash law: stop the storage at its n-th operation, for every n; nothing acknowledged is lost."""

from __future__ import annotations

import gc
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
from support.plain_format import PlainFormat
from support.sampling import instants

from checkpointer import CheckpointManager, EverySteps, HMACKey, KeepBest, KeepLast, Naming, Policy, Record
from checkpointer.commit.index import read_bounded
from checkpointer.errors import CheckpointerWarning, SaveError
from checkpointer.ports import Format, Storage
from checkpointer.save.background import Busy
from checkpointer.storage import LocalStorage
from checkpointer.testing import Crash, CrashingStorage, MemoryStorage, die

When = Literal["before", "halfway", "after"]
LOSSES = [0.9, 0.4, 0.6, 0.7, 0.3]

POLICIES = {
    "best and last": Policy(EverySteps(1), [KeepBest(2, "loss", mode="min"), KeepLast(1)]),
    "last link": Policy(EverySteps(1), [KeepBest(1, "loss", mode="min")], last="link", best="link"),
    "last slot": Policy(EverySteps(1), [KeepBest(1, "loss", mode="min")], last="copy", best="copy"),
    "one name": Policy(EverySteps(1), [KeepLast(1)], name=Naming("model", version_counter=False)),
}
LARGEST = {"best and last": 3, "last link": 2, "last slot": 2, "one name": 1}


class Run:
    """A little training whose state is its step, on a storage that may die."""

    def __init__(
        self,
        storage: Storage,
        policy: Policy,
        trust: HMACKey | None = None,
        format: Format | None = None,
        *,
        background: Busy | None = None,
    ) -> None:
        self.step = 0
        self.saved: list[int] = []
        """Steps that were reported to the listeners."""
        self.manager = CheckpointManager(
            storage,
            policy,
            state=lambda: {"step": self.step},
            format=format or PlainFormat(),
            trust=trust,
            listeners=[self],  # type: ignore[list-item]
            background=background,
        )

    def on_saved(self, record: Record) -> None:
        self.saved.append(record.step)

    def on_retired(self, record: Record) -> None:
        pass

    def observe(self, loss: float) -> Any:
        self.step += 1
        return self.manager.observe({"loss": loss}, step=self.step, epoch=0, epoch_end=False)


def run_until_crash(
    storage: CrashingStorage,
    policy: Policy,
    trust: HMACKey | None = None,
    *,
    format: Format | None = None,
    losses: Sequence[float] = LOSSES,
    background: Busy | None = None,
) -> int:
    """Train until the storage dies, and return the last step that was acknowledged."""
    acknowledged = 0
    run = None
    try:
        run = Run(storage, policy, trust, format, background=background)
        for loss in losses:
            if run.observe(loss) and not background:
                acknowledged = run.step
        run.manager.close()
    except (Crash, SaveError):
        assert storage.is_dead
    if background and run is not None:
        # There it is acknowledged when it is durable; the thread is as dead as its storage.
        acknowledged = max(run.saved, default=0)
    if run is not None:
        die(run.manager._owner)
    else:
        gc.collect()  # The half-made manager takes its owner along.
    return acknowledged


def count_operations(make: Any, policy: Policy) -> int:
    """Return how many storage operations the whole run takes."""
    storage = CrashingStorage(make(), at=0, when="before")
    run_until_crash(storage, policy)
    return storage.operations


def check_survivor(
    inner: Storage,
    policy: Policy,
    acknowledged: int,
    largest: int,
    clue: str,
    trust: HMACKey | None = None,
    format: Format | None = None,
) -> None:
    """A new manager restores at least what was acknowledged, and one more save makes everything right again."""
    assert b"mine" == read_bounded(inner, "foreign.txt"), clue
    run = Run(inner, policy, trust, format)
    restored = run.manager.restore()
    if restored is None:
        assert 0 == acknowledged, clue
    else:
        assert restored.step in (acknowledged, acknowledged + 1), clue
        assert {"step": restored.step} == restored.state, clue
        run.step = restored.step
    if acknowledged and policy.last:
        # Before the next save too, because people open these files without a manager.
        assert json.loads(read_bounded(inner, "last.ckpt"))["step"] in (acknowledged, acknowledged + 1), clue
        assert json.loads(read_bounded(inner, "best.ckpt"))["step"] <= acknowledged + 1, clue
    assert run.observe(0.2), clue
    names = {record.name for record in run.manager.records}
    assert len(names) <= largest, f"{clue}: {names}"
    payloads = {p for p in inner.list() if p.endswith(".ckpt")} - set(run.manager.policy.aliases)
    assert names - set(run.manager.policy.aliases) == payloads, clue
    assert run.step == run.manager.restore().step, clue  # type: ignore[union-attr]
    if run.manager.policy.last:
        assert {"step": run.step} == json.loads(read_bounded(inner, "last.ckpt")), clue
    assert b"mine" == read_bounded(inner, "foreign.txt"), clue
    run.manager.close()
    assert not [path for path in inner.list() if "staging" in path], clue


@pytest.mark.parametrize("trust", [None, HMACKey(b"0123456789abcdef")], ids=["plain", "signed"])
@pytest.mark.parametrize("when", ["before", "halfway", "after"])
@pytest.mark.parametrize("name", POLICIES)
def test_dying_at_any_operation_in_memory_loses_nothing(name: str, when: When, trust: HMACKey | None) -> None:
    """Every n, on a storage whose operations are atomic by contract."""
    policy = POLICIES[name]

    def make() -> MemoryStorage:
        storage = MemoryStorage()
        storage.write("foreign.txt", b"mine")
        return storage

    for n in instants(count_operations(make, policy) + 1):
        inner = make()
        acknowledged = run_until_crash(CrashingStorage(inner, at=n, when=when), policy, trust)
        check_survivor(inner, policy, acknowledged, LARGEST[name], f"died {when} operation {n}", trust)


@pytest.mark.parametrize("when", ["before", "halfway", "after"])
def test_dying_while_another_run_s_checkpoint_is_written_over_leaves_it_or_the_new_one(when: When) -> None:
    """Every n: each record that is left names a payload that is whole, and there is one."""
    policy = POLICIES["one name"]
    losses = LOSSES[:2]

    def make() -> MemoryStorage:
        storage = MemoryStorage()
        run = Run(storage, policy)
        run.step = 40
        run.observe(0.1)
        run.manager.close()
        return storage

    counting = CrashingStorage(make(), at=0, when="before")
    with pytest.warns(CheckpointerWarning, match="left alone, unless their names are written again"):
        run_until_crash(counting, policy, losses=losses)
    for n in range(1, counting.operations + 1):
        inner = make()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CheckpointerWarning)
            acknowledged = run_until_crash(CrashingStorage(inner, at=n, when=when), policy, losses=losses)
        manager = CheckpointManager(inner, policy, format=PlainFormat())
        (left,) = manager.session.manifest.records
        restored = manager.restore(left.name)
        assert restored is not None
        assert "model.ckpt" == left.name, n
        assert {"step": left.step} == restored.state, n
        assert left.step in ({41, 1} if not acknowledged else {acknowledged, acknowledged + 1}), n
        manager.close()


@pytest.mark.parametrize("when", ["before", "halfway", "after"])
@pytest.mark.parametrize("name", POLICIES)
def test_dying_at_any_operation_in_the_background_loses_nothing(name: str, when: When) -> None:
    """Every n, whether the loop or the writer thread dies of it: what was reported to listeners is there."""
    policy = POLICIES[name]

    def make() -> MemoryStorage:
        storage = MemoryStorage()
        storage.write("foreign.txt", b"mine")
        return storage

    for n in range(1, count_operations(make, policy) + 1):
        inner = make()
        acknowledged = run_until_crash(CrashingStorage(inner, at=n, when=when), policy, background="wait")
        check_survivor(inner, policy, acknowledged, LARGEST[name], f"died {when} operation {n}")


@pytest.mark.parametrize("when", ["before", "halfway", "after"])
@pytest.mark.parametrize("name", POLICIES)
def test_dying_at_any_operation_on_disk_loses_nothing(tmp_path: Path, name: str, when: When) -> None:
    """Every n, on a real folder; the dead writer's staging folder is swept by the next manager."""
    from checkpointer.storage.owner import new_owner

    policy = POLICIES[name]
    count = 0

    def make() -> LocalStorage:
        nonlocal count
        count += 1
        root = tmp_path / str(count)
        root.mkdir()
        (root / "foreign.txt").write_bytes(b"mine")
        return LocalStorage(root, new_owner())

    for n in instants(count_operations(make, policy) + 1):
        inner = make()
        acknowledged = run_until_crash(CrashingStorage(inner, at=n, when=when), policy)
        owner = inner._staging.name.rpartition("-")[0]
        die(owner)
        fresh = LocalStorage(inner.local_path(""), new_owner())
        check_survivor(fresh, policy, acknowledged, LARGEST[name], f"died {when} operation {n}")
