"""What one run knows of a directory: its records, its alias names, and which preparations are done."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import attrs

from checkpointer.commit.aliases import Aliases
from checkpointer.commit.journal import Journal
from checkpointer.commit.signing import refuse_unsigned
from checkpointer.commit.writer_marks import clear_ended, mark
from checkpointer.errors import warn
from checkpointer.policy.policy import Policy
from checkpointer.ports import Storage, SupportsSweep
from checkpointer.records.manifest import Manifest
from checkpointer.records.record import Record


@attrs.define(kw_only=True)
class Contents:
    """The state that the parts of a `checkpointer.commit.directory.Directory` share."""

    journal: Journal
    aliases: Aliases
    policy: Policy
    """The policy of the user, with alias names that are free."""
    manifest: Manifest = attrs.field(factory=Manifest, init=False)
    """The records as this run sees them."""
    writers: Iterable[str]
    """Owners whose marks were in the directory when it was opened."""
    num_signed: int
    is_claimed: bool
    """Whether the run is decided: it was named, restored, or has saved."""
    is_on_line: bool = attrs.field(default=False, init=False)
    """Whether this process has saved or restored."""
    is_prepared: bool = attrs.field(default=False, init=False)
    """Whether the storage was checked and swept for writing."""
    is_begun: bool = attrs.field(default=False, init=False)
    """Whether the aliases are claimed for this run and line."""
    _said: set[str] = attrs.field(factory=set, init=False)

    @property
    def storage(self) -> Storage:
        """Where the files are."""
        return self.journal.storage

    def check_key(self) -> None:
        """Raise `UntrustedError` if the directory is signed, and there is no key to change it with."""
        refuse_unsigned(self.num_signed, self.storage, self.journal.trust)

    def prepare(self, *, marks: bool = True) -> None:
        """Check that the storage can be written to, sweep it, and leave this writer's mark; later calls do nothing."""
        self.check_key()
        if self.is_prepared:
            return
        if isinstance(self.storage, SupportsSweep):
            self.storage.prepare()
            self.storage.sweep()
        clear_ended(self.storage, self.writers)
        self.is_prepared = True
        if marks:
            mark(self.storage, self.journal.owner)

    def settle_aliases(self, *, slots: bool = True, claims: bool) -> None:
        """Choose alias names that are free; see `Aliases.settle`."""
        self.policy = self.aliases.settle(self.manifest, self.warn_once, slots=slots, claims=claims)

    def spare_aliases(self) -> bool:
        """If other programs have replaced alias files, choose other alias names; return whether that is so."""
        if not (self.is_begun and self.journal.is_near):
            return False
        replaced = [name for name in self.policy.aliases if self.aliases.is_blocked(name, self.manifest, slots=True)]
        if not replaced:
            return False
        slots = [self.manifest.by_name[alias] for alias in replaced if alias in self.manifest.by_name]
        self.manifest = self.manifest.without_payload(*slots, there=replaced)
        self.aliases.forget()
        self.settle_aliases(claims=True)
        return True

    def set_aside(self, record: Record) -> None:
        """Stop counting a damaged checkpoint, without touching its files."""
        if record.name in self.manifest.by_name:
            self.manifest = self.manifest.without_payload(record, there=[record.name])
        else:
            self.add_foreign(record.name)

    def note(self, metrics: frozenset[str]) -> None:
        """Remember which metrics were reported."""
        if not self.manifest.seen.issuperset(metrics):
            self.manifest = attrs.evolve(self.manifest, seen=self.manifest.seen.union(metrics))

    def add_foreign(self, *names: str) -> None:
        """Count these names as taken by files of others."""
        if not self.manifest.foreign.issuperset(names):
            self.manifest = attrs.evolve(self.manifest, foreign=self.manifest.foreign.union(names))

    def warn_once(self, key: str, msg: str, say: Callable[[str], None] = warn) -> None:
        """Warn, unless there was a message with this key before; ``say`` may log it instead."""
        if key not in self._said:
            self._said.add(key)
            say(msg)
