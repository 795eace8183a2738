"""Checkpoints that others delete or cut at any moment: what is named exists, and the best of what exists is kept."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import warnings
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from support.plain_format import PlainFormat

from checkpointer import (
    Budget,
    CheckpointerWarning,
    CheckpointManager,
    EverySteps,
    KeepBest,
    KeepEvery,
    KeepLast,
    Naming,
    Policy,
    Record,
)
from checkpointer.commit.index import HOME, record_path
from checkpointer.errors import NoValidCheckpointError
from checkpointer.policy.decide import Attach
from checkpointer.storage import LocalStorage
from checkpointer.storage.digests import size_of
from checkpointer.testing import die
from checkpointer.tools.catalog import look_at

BEST = KeepBest(2, "loss", mode="min")
POLICIES = {
    "best": Policy(EverySteps(1), [BEST]),
    "best and last": Policy(EverySteps(1), [BEST, KeepLast(1)]),
    "links": Policy(EverySteps(1), [BEST], last="link", best="link"),
    "slot": Policy(EverySteps(1), [BEST], last="copy", best="copy"),
    "one name": Policy(EverySteps(1), [KeepBest(1, "loss", mode="min"), KeepLast(1)], name=Naming("model")),
    "thinned": Policy(EverySteps(1), [KeepEvery(steps=4), BEST, KeepLast(1), Budget(bytes=60)]),
}
LOSSES = st.one_of(st.none(), st.integers(0, 9).map(float))


class Losing(RuleBasedStateMachine):
    """A run whose files others delete and cut; the model is what lies on the disk before and after each save."""

    def __init__(self) -> None:
        super().__init__()
        self.parent = Path(tempfile.mkdtemp(prefix="checkpointer-ghosts-"))
        self.folder = self.parent / "run"
        self.step = 0

    def teardown(self) -> None:
        """Leave nothing."""
        if hasattr(self, "manager"):
            die(self.manager._owner)
        shutil.rmtree(self.parent)

    @initialize(name=st.sampled_from(sorted(POLICIES)))
    def begin(self, name: str) -> None:
        """Choose a policy, and start the first process."""
        self.policy = POLICIES[name]
        self.start()

    def start(self) -> None:
        """A new process: from its first moment on it names only what is there."""
        state = {"w": 1}
        self.manager = CheckpointManager(self.folder, self.policy, state=lambda: state, format=PlainFormat())
        self.check_named()

    # What exists

    def storage(self) -> LocalStorage:
        """The directory, as others see it."""
        return LocalStorage(self.folder, "")

    def existing(self) -> dict[str, Record]:
        """Return what is on record, and whose payload is whole, of the run and on its line, by token."""
        manifest = self.manager.session.manifest
        found = look_at(self.storage()).records if self.folder.exists() else ()
        ours = (manifest.run, manifest.label)
        return {r.token: r for r in found if (r.run, r.label) == ours and manifest.counts(r)}

    def exists(self, record: Record) -> bool:
        """Return whether a payload of the record's size is there."""
        return size_of(self.storage(), record.name, record.size) == record.size

    # A training

    @rule(loss=LOSSES)
    def observe(self, loss: float | None) -> None:
        """Train on, and report; what exists is ranked, and the best of it is kept."""
        self.step += 1
        before = self.existing()
        decision = self.manager.observe(
            {} if loss is None else {"loss": loss}, step=self.step, epoch=0, epoch_end=False
        )
        after = self.existing()
        if not decision:
            assert before.keys() == after.keys()
            if loss is not None:
                better = [r for r in before.values() if r.kind == "regular" and r.metrics.get("loss", 10.0) <= loss]
                assert len(better) >= BEST.k, f"{loss} was declined for {better}"
            return
        self.check_retired(before, after)
        self.check_named()
        self.check_aliases()

    def check_retired(self, before: dict[str, Record], after: dict[str, Record]) -> None:
        """What went is not the best of what existed, nor is the newest gone."""
        written = [r for token, r in after.items() if token not in before]
        assert [self.step] == [r.step for r in written]
        there = [r for r in (*before.values(), *written) if r.kind == "regular" and "loss" in r.metrics]
        best = self.policy.best_of(sorted(there, key=lambda r: r.serial))
        assert best is None or best.token in after, f"{best} went for {after}"
        rule = self.policy.best_rule
        assert rule is not None
        if not self.policy.limits and self.policy.last != "copy":
            kept = rule.top(sorted(there, key=lambda r: r.serial))
            assert {r.token for r in kept} <= after.keys(), f"of {kept} not all live"

    def check_named(self) -> None:
        """Best, last and the aliases exist; so does what the commands print."""
        for record in (self.manager.best, self.manager.last):
            assert record is None or self.exists(record), f"{record} is not there"
        if not self.folder.exists():
            return
        catalog = look_at(self.storage())
        assert all(self.exists(record) for record in catalog.records)
        assert all(target == "" or self.exists(catalog.find(alias)) for alias, target in catalog.aliases.items())

    def check_aliases(self) -> None:
        """Each alias leads to a checkpoint, and `last` to the newest."""
        for path in self.folder.iterdir():
            assert path.exists(), f"{path} leads to nothing"
        if self.policy.last:
            newest = self.manager.session.manifest.history[-1]
            assert newest.size == (self.folder / self.manager.policy.name.last_file).stat().st_size

    @rule(loss=st.integers(0, 9).map(float))
    def attach(self, loss: float) -> None:
        """Report a late metric of a step, whatever has become of it."""
        records = self.manager.records
        if records and records[-1].kind == "regular":
            decision = self.manager.observe({"loss": loss}, step=records[-1].step, epoch=0, epoch_end=False)
            best = self.manager.best
            assert not isinstance(decision, Attach) or best is None or self.exists(best)

    @precondition(lambda self: self.step)
    @rule()
    def rescue(self) -> None:
        """Save because of a signal."""
        if self.manager.rescue("SIGTERM", step=self.step):
            self.check_named()

    @rule(killed=st.booleans())
    def restart(self, killed: bool) -> None:
        """End the process, or have it killed, and restore the newest that exists."""
        if killed:
            die(self.manager._owner)
        else:
            self.manager.close()
        self.start()
        self.restore(None)

    @precondition(lambda self: self.manager.best is not None)
    @rule()
    def restore_best(self) -> None:
        """Go back to the best that exists."""
        self.restore("best")

    def restore(self, which: str | None) -> None:
        existing = self.existing()
        try:
            restored = self.manager.restore(which)
        except NoValidCheckpointError:
            assert not existing
            return
        if restored is not None:
            assert self.exists(restored.record)
            self.step = max(self.step, restored.step) if which is None else restored.step
        else:
            assert not existing

    # Others

    def names(self, data: st.DataObject) -> str | None:
        records = self.manager.session.manifest.records
        return data.draw(st.sampled_from([r.name for r in records])) if records else None

    @rule(data=st.data())
    def delete_payload(self, data: st.DataObject) -> None:
        """To free some room."""
        if name := self.names(data):
            with contextlib.suppress(FileNotFoundError):
                (self.folder / name).unlink()

    @rule(data=st.data(), size=st.integers(0, 5))
    def cut_payload(self, data: st.DataObject, size: int) -> None:
        """A disk was full when it was copied."""
        if name := self.names(data):
            with contextlib.suppress(FileNotFoundError):
                os.truncate(self.folder / name, size)

    @rule(data=st.data())
    def delete_record(self, data: st.DataObject) -> None:
        """To tidy up."""
        if name := self.names(data):
            with contextlib.suppress(FileNotFoundError):
                (self.folder / record_path(name)).unlink()

    @rule()
    def delete_all_payloads(self) -> None:
        """To free much room."""
        for path in self.folder.glob("*.ckpt") if self.folder.exists() else ():
            path.unlink()

    @rule()
    def delete_home(self) -> None:
        """Because it looks like a cache."""
        shutil.rmtree(self.folder / HOME, ignore_errors=True)

    @rule()
    def delete_folder(self) -> None:
        """All of it."""
        shutil.rmtree(self.folder, ignore_errors=True)


def test_what_is_named_exists_and_the_best_of_it_is_kept() -> None:
    """Some thousand steps in random order, on a disk."""
    with warnings.catch_warnings():
        # What is gone is said, over and over.
        warnings.simplefilter("ignore", CheckpointerWarning)
        run_state_machine_as_test(Losing, settings=settings(max_examples=60, stateful_step_count=30, deadline=None))
