"""Carries decisions out, in the order of the crash argument: payload and record, aliases, retirement, who is told."""

from __future__ import annotations

import os
import warnings
from typing import Any, Literal

import attrs

from checkpointer.deciding import Attach, Decision, Save, decide, decide_rescue
from checkpointer.directory import Directory
from checkpointer.errors import CheckpointerWarning
from checkpointer.mirror import Mirror
from checkpointer.ports import Listener
from checkpointer.records import Record
from checkpointer.writing import Writer

__all__ = ["Saver"]


@attrs.frozen
class Saver:
    """The effects of a decision on one directory. One thread at a time may use it: the manager sees to that."""

    directory: Directory
    writer: Writer
    listeners: tuple[Listener, ...]
    mirror: Mirror | None

    def write(self, decision: Save, state: Any, path: str | os.PathLike[str] | None) -> Record:
        """Write a payload and its record (steps 1 to 5 of `transaction`), and return the record."""
        self.directory.begin()
        decision = decision if path is not None else self._with_free_name(decision)
        return self.writer.write(decision, state, path)

    def _with_free_name(self, decision: Save) -> Save:
        """Return the decision under a name that nobody has taken since the directory was listed."""
        directory = self.directory
        while not (decision.replaces or decision.name in directory.policy.aliases or directory.is_free(decision.name)):
            again: Decision
            if decision.kind == "rescue":
                again = decide_rescue(directory.policy, decision.observation, directory.manifest, decision.reason)
            else:
                again = decide(directory.policy, decision.observation, directory.manifest, owed=decision.reason)
            assert isinstance(again, Save), "the same observation is due again"
            decision = attrs.evolve(decision, name=again.name, replaces=again.replaces)
        return decision

    def finish(self, record: Record) -> tuple[str, ...]:
        """Do what comes after the commit (steps 6 to 8), and return the names of what was retired."""
        self.directory.add(record)
        retired: tuple[str, ...] = ()
        if record.kind == "regular":
            self.directory.point_aliases()
            retired = self._retire()
        self.tell_mirror()
        self.tell("on_saved", record)
        return retired

    def attach(self, decision: Attach) -> None:
        """Give a saved step its new metrics. One whose save has failed since the decision gets none."""
        self.directory.begin()
        manifest = self.directory.manifest
        record = manifest.by_name.get(decision.name) or manifest.at_step(decision.observation.step)
        if record is None:
            return
        if record.name in self.directory.policy.aliases:
            # A slot is overwritten by the next save; with its new metrics it may be one that a rule keeps.
            record = self.directory.move_slot(record)
        record = record.attached(decision.observation)
        self.directory.rewrite(record)
        self.directory.point_aliases()
        self._retire()
        self.tell_mirror()
        self.tell("on_attached", record)

    def tell_mirror(self) -> None:
        """Say what there is to mirror now."""
        if self.mirror is not None:
            self.mirror.tell(self.directory.manifest)

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
