"""Carries decisions out, in the order of the crash argument: payload and record, aliases, retirement, who is told."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any, Literal

import attrs

from checkpointer.commit.directory import Directory
from checkpointer.errors import CheckpointerWarning
from checkpointer.policy.decide import Attach, Decision, Save, decide, decide_rescue
from checkpointer.ports import Listener
from checkpointer.records.manifest import Manifest
from checkpointer.records.record import Record
from checkpointer.save.payload import Writer

__all__ = ["Saver"]


@attrs.frozen
class Saver:
    """The effects of a decision on one directory. One thread at a time may use it: the manager sees to that."""

    directory: Directory
    writer: Writer
    listeners: tuple[Listener, ...]
    on_change: Callable[[Manifest], None] | None
    """Called with the records after each change, as for a mirror; must return at once."""

    def write(self, decision: Save, state: Any, path: str | os.PathLike[str] | None) -> Record:
        """Write a payload and its record (steps 1 to 5 of `transaction`), and return the record."""
        self.directory.begin()
        decision = decision if path is not None else self._with_free_name(decision)
        return self.writer.write(decision, state, path)

    def _with_free_name(self, decision: Save) -> Save:
        """Return the decision under a name that nobody has taken since the directory was listed."""
        directory = self.directory
        if decision.replaces and decision.name not in directory.policy.aliases and self._is_lost(decision.name):
            decision = self._again(decision)
        while not (decision.replaces or decision.name in directory.policy.aliases or directory.is_free(decision.name)):
            decision = self._again(decision)
        return decision

    def _is_lost(self, name: str) -> bool:
        """Return whether the checkpoint that is to be replaced is gone."""
        directory = self.directory
        if name not in directory.manifest.by_name:  # With background= it may have been lost since the decision.
            return True
        return directory.policy.name.version_counter and directory.look_before_replacing(name)

    def _again(self, decision: Save) -> Save:
        """Return the decision as it is now that the records are others."""
        directory, now = self.directory, decision.observation
        again: Decision
        if decision.kind == "rescue":
            again = decide_rescue(directory.policy, now, directory.manifest, decision.reason)
        else:
            again = decide(directory.policy, now, directory.manifest, owed=decision.reason)
        if not isinstance(again, Save):  # A rule of one's own may think otherwise by now.
            return attrs.evolve(decision, name=directory.own_name(directory.manifest.draft("", now)), replaces=False)
        return attrs.evolve(decision, name=again.name, replaces=again.replaces)

    def finish(self, record: Record) -> tuple[str, ...]:
        """Do what comes after the commit (steps 6 to 8), and return the names of what was retired."""
        self.directory.add(record)
        retired: tuple[str, ...] = ()
        is_sure = self._look(record)
        if record.kind == "regular":
            self.directory.point_aliases()
            retired = self._retire() if is_sure else ()
        self.changed()
        self.tell("on_saved", record)
        return retired

    def attach(self, decision: Attach) -> None:
        """Give a saved step its new metrics. One whose save has failed since the decision gets none."""
        self.directory.begin()
        manifest = self.directory.manifest
        record = manifest.by_name.get(decision.name) or manifest.at_step(decision.observation.step)
        if record is not None and self.directory.is_gone(record):
            record = None
        if record is not None and record.name in self.directory.policy.aliases:
            # A slot is overwritten by the next save; with its new metrics it may be one that a rule keeps.
            record = self.directory.move_slot(record)
        if record is None:
            return
        record = record.attached(decision.observation)
        self.directory.rewrite(record)
        is_sure = self._look()
        self.directory.point_aliases()
        if is_sure:
            self._retire()
        self.changed()
        self.tell("on_attached", record)

    def _look(self, sure: Record | None = None) -> bool:
        """Set aside what is gone; return whether the storage has answered, so that something may be retired."""
        try:
            self.directory.look_before_retiring(sure=sure)
        except OSError as error:
            msg = f"nothing is retired, because what would be kept could not be looked at ({error}); the next save will"
            warnings.warn(msg, CheckpointerWarning, stacklevel=4)
            return False
        return True

    def changed(self) -> None:
        """Call ``on_change`` with the records as they are now."""
        if self.on_change is not None:
            self.on_change(self.directory.manifest)

    def _retire(self) -> tuple[str, ...]:
        retired = self.directory.retire()
        for record in retired:
            self.tell("on_retired", record)
        return tuple(record.name for record in retired)

    def tell(self, event: Literal["on_opened", "on_saved", "on_attached", "on_retired"], what: Any) -> None:
        """Tell the listeners (step 8)."""
        for listener in self.listeners:
            try:
                getattr(listener, event, lambda _: None)(what)
            except Exception as error:  # A broken tracker must not end the training.
                on = f" on {what.name}" if isinstance(what, Record) else ""
                msg = f"{type(listener).__name__}.{event} failed{on}: {error!r}; the checkpoint is fine"
                warnings.warn(msg, CheckpointerWarning, stacklevel=5)
