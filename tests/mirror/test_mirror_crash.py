"""The crash law with two tiers: stop either storage at its n-th operation; both are whole, and a restart catches up."""

from __future__ import annotations

import gc
import time
from typing import Any, Literal, NoReturn, get_args

import pytest
from support.plain_format import PlainFormat
from support.sampling import instants

from checkpointer import CheckpointManager, EverySteps, KeepBest, KeepLast, Mirror, Policy
from checkpointer.commit.index import load
from checkpointer.ports import Storage
from checkpointer.testing import Crash, CrashingStorage, MemoryStorage, die

pytestmark = [
    # The thread dies with the storage, as its process would; and closing says that the mirror is behind.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning"),
    pytest.mark.filterwarnings("ignore:the mirror:checkpointer.CheckpointerWarning"),
]

When = Literal["before", "halfway", "after"]
LOSSES = [0.4, 0.6, 0.7]
KEEP: list[KeepBest | KeepLast] = [KeepBest(1, "loss", mode="min"), KeepLast(1)]
POLICIES = {
    "best and last": Policy(EverySteps(1), KEEP),
    "last slot": Policy(EverySteps(1), [KeepBest(1, "loss", mode="min")], last="copy", best="copy"),
}


class Run:
    """A little training whose state is its step, with a mirror; either storage may die."""

    def __init__(self, here: Storage, there: Storage, policy: Policy) -> None:
        self.step = 0
        self.manager = CheckpointManager(
            here, policy, state=lambda: {"step": self.step}, format=PlainFormat(), mirror=Mirror(there, keep=KEEP)
        )

    def observe(self, loss: float) -> bool:
        self.step += 1
        return bool(self.manager.observe({"loss": loss}, step=self.step, epoch=0, epoch_end=False))

    def wait(self) -> None:
        """Until the mirror has done all there is to do, or is dead."""
        mirror: Any = self.manager._mirror
        deadline = time.monotonic() + 30
        while mirror._here is not mirror._done and mirror._thread.is_alive():
            assert time.monotonic() < deadline, self.manager.session.mirror_status
            time.sleep(0.0005)

    def die(self) -> None:
        """End as a killed process does: nothing is cleared up."""
        mirror: Any = self.manager._mirror
        mirror.stop()
        if mirror._thread is not None:
            mirror._thread.join()
        die(mirror._owner)
        die(self.manager._owner)


def run_until_crash(here: Storage, there: Storage, policy: Policy) -> int:
    """Train until a storage dies, and return the last step that was acknowledged."""
    acknowledged = 0
    run = None
    try:
        run = Run(here, there, policy)
        for loss in LOSSES:
            if run.observe(loss):
                acknowledged = run.step
            run.wait()
        run.manager.close()
    except Crash:
        pass
    if run is not None:
        run.die()
    else:
        gc.collect()  # The half-made manager takes its owner along.
    return acknowledged


def restored(storage: Storage, policy: Policy) -> int:
    """Open a directory by itself, as a reader, and return the step that it restores, or 0."""
    found = CheckpointManager(storage, policy, format=PlainFormat()).restore()
    assert found is None or {"step": found.step} == found.state
    return 0 if found is None else found.step


def count(which: str, policy: Policy) -> int:
    """Return how many operations of that storage a whole run takes."""
    here, there = (CrashingStorage(MemoryStorage()) for _ in range(2))
    run_until_crash(here, there, policy)
    return (here if which == "here" else there).operations


@pytest.mark.parametrize("when", get_args(When))
@pytest.mark.parametrize("name", POLICIES)
def test_mirror_that_dies_at_any_operation_is_whole_and_is_caught_up(name: str, when: When) -> None:
    """Every n of the mirror's storage; what is saved here goes on, and is all there."""
    policy = POLICIES[name]
    for n in instants(count("there", policy) + 1):
        here, there = MemoryStorage(), MemoryStorage()
        acknowledged = run_until_crash(here, CrashingStorage(there, at=n, when=when), policy)
        assert len(LOSSES) == acknowledged
        clue = f"the mirror died {when} operation {n}"
        assert restored(here, policy) == acknowledged, clue
        restored(there, policy)
        check_caught_up(here, there, policy, clue)


@pytest.mark.parametrize("when", get_args(When))
@pytest.mark.parametrize("name", POLICIES)
def test_process_that_dies_at_any_operation_here_leaves_both_whole(name: str, when: When) -> None:
    """Every n of the directory's storage, which the mirror reads; a new machine has all but the last save."""
    policy = POLICIES[name]
    for n in instants(count("here", policy) + 1):
        here, there = MemoryStorage(), MemoryStorage()
        acknowledged = run_until_crash(CrashingStorage(here, at=n, when=when), there, policy)
        clue = f"died {when} operation {n} here"
        assert restored(here, policy) in (acknowledged, acknowledged + 1), clue
        # Every save but the last had been mirrored before the next began.
        assert restored(there, policy) >= acknowledged - 1, clue
        check_caught_up(here, there, policy, clue)


def check_caught_up(here: Storage, there: Storage, policy: Policy, clue: str) -> None:
    """The next process makes everything right, there as here."""
    run = Run(here, there, policy)
    again = run.manager.restore()
    run.step = 0 if again is None else again.step
    assert run.observe(0.8), clue
    run.manager.close()
    assert run.step == restored(there, policy), clue
    found = CheckpointManager(there, policy, format=PlainFormat())
    assert run.manager.best is not None
    assert found.best is not None, clue
    assert run.manager.best.token == found.best.token, clue
    names = {record.name for record in found.records}
    payloads = {path for path in there.list() if path.endswith(".ckpt")} - set(policy.aliases)
    assert names == payloads, clue
    assert len(names) <= 2, f"{clue}: {names}"


class Failing(CrashingStorage):
    """A storage that fails once, at its n-th operation, as a network does."""

    def _die(self, what: str) -> NoReturn:
        msg = f"{what} failed"
        raise ConnectionError(msg)


@pytest.mark.slow
@pytest.mark.parametrize("when", get_args(When))
@pytest.mark.parametrize("name", POLICIES)
def test_mirror_that_fails_at_any_operation_is_caught_up_by_the_same_process(name: str, when: When) -> None:
    """Every n: closing tries again at once, and all is there, once, with nothing left half-way."""
    policy = POLICIES[name]
    for n in instants(count("there", policy) + 1):
        here, there = MemoryStorage(), MemoryStorage()
        run = Run(here, Failing(there, at=n, when=when), policy)
        for loss in LOSSES:
            run.observe(loss)
        run.manager.close()
        clue = f"the mirror failed {when} operation {n}"
        assert len(LOSSES) == restored(there, policy), clue
        check_caught_up(here, there, policy, clue)
        assert {"committed"} == {entry.status for entry in load(there).entries.values()}, clue
