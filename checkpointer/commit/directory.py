"""One run's view of one directory: its records, its aliases, and the unfinished writes of earlier processes."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Container, Iterator

import attrs

from checkpointer._display import some_of
from checkpointer.clock import SystemClock
from checkpointer.commit import index
from checkpointer.commit.aliases import Aliases, release
from checkpointer.commit.contents import Contents
from checkpointer.commit.deleted_by_others import Looks
from checkpointer.commit.holder import Holder
from checkpointer.commit.journal import Journal
from checkpointer.commit.lease import Lease
from checkpointer.commit.lower_terms import take_over
from checkpointer.commit.payload_names import Names
from checkpointer.commit.recovery import finish_run, recover, retire
from checkpointer.commit.run_to_continue import Lines
from checkpointer.commit.signing import HMACKey, refuse_unsigned
from checkpointer.commit.transaction import Transaction
from checkpointer.commit.writer_marks import mark, unmark, writers_in
from checkpointer.errors import ConflictError, FencedError, UntrustedError, warn
from checkpointer.policy.policy import Policy, noted
from checkpointer.ports import Clock, Storage, SupportsSweep
from checkpointer.records.manifest import Manifest
from checkpointer.records.record import Entry, Record, check_readable
from checkpointer.storage.opening import advising
from checkpointer.storage.owner import is_dead, is_of_host

INDEX_EVERY = 64
"""The index is written again after this many changes, or a tenth of the records if that is more."""


class Directory:
    """Changes records and storage together, so that they agree.

    Args:
        storage: Where the files are.
        owner: Id of this writer.
        policy: The policy of the user. The attribute `policy` has alias names that are free.
        run: Id of the run to go on with; None starts a new one.
        label: Distinguishes managers that share the directory.
        writes: Whether to claim run and aliases, and finish the writes of ended writers. A reader changes nothing.
        trust: Signs each record; a record without its signature counts as damaged.
        clock: Decides when a transfer is slow enough to be logged.
        lease: When the run may be taken over from another process.
        open_again: Opens the storage again. The heartbeat's thread uses that one.
        status: Returns what a heartbeat says of the training, one line.
    """

    def __init__(
        self,
        storage: Storage,
        owner: str,
        policy: Policy,
        *,
        run: str | None,
        label: str,
        writes: bool,
        trust: HMACKey | None = None,
        clock: Clock | None = None,
        lease: Lease | None = None,
        open_again: Callable[[], Storage] | None = None,
        status: Callable[[], str] = str,
    ) -> None:
        self.storage = storage
        self.journal = journal = Journal(storage, owner, trust)
        self.writes = writes
        again = open_again or (lambda: storage)
        self.holder = Holder(journal, noted(policy), lease or Lease(), again, status)
        self._is_sure = False
        if writes and run is not None:
            if trust is None:  # A claim is a change, so a signed directory is refused before it.
                refuse_unsigned(_listing(journal).signed, storage, trust)
            self.holder.claim(run, label, is_new=False)
        listing = _listing(journal)
        self.below = index.directories_below(listing.files, index.RECORDS)
        self.contents = contents = Contents(
            journal=journal,
            aliases=Aliases(journal, policy, listing),
            policy=policy,
            writers=writers_in(storage, listing.files),
            num_signed=listing.signed,
            is_claimed=run is not None,
        )
        contents.manifest = Manifest(run=run or uuid.uuid4().hex[:12], label=label)
        self.transaction = Transaction(journal, clock or SystemClock())
        self.looks = Looks(contents)
        self.names = Names(contents, self.looks)
        self.lines = Lines(contents, self.names)
        if writes:
            contents.prepare(marks=False)
        self._take_in(listing)
        contents.settle_aliases(slots=False, claims=writes)
        contents.settle_aliases(claims=False)
        if writes:
            # Last, because on a full disk the alias files can be replaced, but the mark is a new file.
            mark(storage, owner)

    def _take_in(self, listing: index.Listing) -> None:
        """See the records of a listing as the run does."""
        contents, journal, manifest = self.contents, self.journal, self.manifest
        if journal.term is not None:
            journal.term.check_listed(listing.files)
        self.damaged = listing.damaged
        self._num_unindexed = listing.reads
        term = journal.term
        found = recover(journal, listing, run=(term.run, term.label) if term is not None else None)
        self._left = found.left
        self._ended = {
            (entry.record.run, entry.record.label): None
            for entry in (*found.left, *found.announced)
            if is_dead(entry.owner) or is_of_host(entry.owner, journal.owner)
        }
        known = (*found.records, *found.missing)
        others = [one for one in listing.changes if one.owner != journal.owner]
        announced = [one for one in others if not journal.has_stopped(one.owner)]
        left = [entry for entry in found.left if entry.owner != journal.owner]
        pending = {entry.record.name for entry in left if not journal.has_stopped(entry.owner)}
        contents.aliases.poisoned = poisoned = frozenset(pending.union(*(one.names for one in announced)))
        unfinished = {entry.record.name for entry in found.left} - {record.name for record in known}
        manifest = attrs.evolve(
            manifest,
            records=found.records,
            aside=(),
            foreign=(listing.foreign - contents.aliases.yielding) | unfinished | poisoned,
            seen=manifest.seen.union(*(record.metrics for record in known)),
            term=term.number if term is not None else 0,
            limits=listing.limits,
        )
        manifest = manifest.without_payload(*found.missing, there=listing.sizes)
        contents.manifest = manifest if contents.is_on_line else manifest.on_newest_line(manifest.run)
        if term is not None and term.number > 1:
            take_over(contents, self.names, announced, term)

    def hold(self, run: str) -> bool:
        """Claim the next term of a run, unless this writer holds one; return whether the directory was read again.

        Raises:
            RunInUseError: If another process trains the run.
        """
        contents, term = self.contents, self.journal.term
        if term is not None and term.run == run:
            term.check()
            return False
        is_new = run == self.manifest.run and not contents.is_claimed and not self.manifest.own
        self.holder.claim(run, self.manifest.label, is_new=is_new)
        assert self.journal.term is not None, "claimed above"
        contents.manifest = attrs.evolve(self.manifest, term=self.journal.term.number)
        if is_new and self.journal.term.number == 1:
            return False
        self._read_again()
        return True

    def look_again(self) -> bool:
        """Read the directory once more, because a live run may change it; return False if that was done before."""
        if self._is_sure:
            return False
        self._is_sure = True
        self._read_again()
        return True

    def _read_again(self) -> None:
        contents = self.contents
        contents.aliases.listing = listing = _listing(self.journal)
        contents.aliases.forget()
        self._take_in(listing)
        contents.is_begun = False

    @property
    def manifest(self) -> Manifest:
        """The records as this run sees them."""
        return self.contents.manifest

    @property
    def policy(self) -> Policy:
        """The policy in force."""
        return self.contents.policy

    def begin(self) -> None:
        """Take over the aliases and unfinished writes of this run before its first change; later calls do nothing."""
        contents = self.contents
        contents.prepare()
        self.hold(self.manifest.run)
        if contents.is_begun:
            return
        others = len(self.manifest.records) - len(self.manifest.own)
        if others and not contents.is_claimed:
            but = "" if self.policy.name.version_counter else ", unless their names are written again"
            msg = (
                f"{self.storage} holds {others} checkpoints of other runs; they are left alone{but}. "
                "This process begins a new run. To go on with one of these restore a checkpoint before the first save"
            )
            contents.warn_once("not empty", msg)
        contents.is_claimed = contents.is_on_line = True
        if self.writes:
            own = (self.manifest.run, self.manifest.label)  # What is left of it, another process has announced.
            for run in [one for one in self._ended if one != own]:
                with contextlib.suppress(ConflictError):
                    finish_run(self.storage, self.journal.trust, run)
        self._left = tuple(entry for listed in self._left for entry in self._look_again(listed))
        with self.journal.changing(aliases=self.policy.aliases):
            contents.settle_aliases(claims=True)
        self._free_slot()
        contents.is_begun = True

    def _look_again(self, listed: Entry) -> list[Entry]:
        """See how an unfinished write has ended meanwhile; return the entry if it has not."""
        contents, record = self.contents, listed.record
        entry = self.journal.find(record.name)
        if entry is None:
            if not self.storage.list(record.name):
                contents.manifest = attrs.evolve(self.manifest, foreign=self.manifest.foreign - {record.name})
            return []
        known = self.manifest.by_name.get(record.name)
        if entry.status == "committed" and (known is None or known.token != entry.record.token):
            contents.manifest = self.manifest.with_record(entry.record)
        return [] if entry.status == "committed" else [entry]

    def _free_slot(self) -> None:
        """If a checkpoint under the alias must stay, give it another name before the alias is written."""
        slot = self.manifest.by_name.get(self.policy.name.last_file)
        if not self.policy.last or slot is None:
            return
        must_stay = slot.pinned or slot.name == self.manifest.resumed or not self.manifest.counts(slot)
        if must_stay or self.policy.last == "link":
            self.names.move_slot(slot)

    def add(self, record: Record) -> None:
        """Add a committed record."""
        self.contents.manifest = self.manifest.with_record(record)
        if record.name in self.contents.aliases.poisoned:
            self.contents.add_foreign(record.name)
        self.contents.aliases.forget(record.name)  # The record may be a slot, under the alias's name.
        self._count_changes(1)

    def copy_in(self, record: Record, source: Storage, path: str, *, replaces: Record | None = None) -> Record:
        """Copy in the payload at ``path`` of another storage, under its own name if that is free."""
        name = replaces.name if replaces else self.names.free(record)
        draft = attrs.evolve(record, name=name, term=self.manifest.term)
        copy = self.transaction.copy_in(draft, source, path, replaces=replaces)
        self.add(copy)
        return copy

    def rewrite(self, record: Record) -> None:
        """Replace a record; its payload stays."""
        check_readable(record)
        self.contents.prepare()
        with self.journal.changing(aliases=[record.name]):
            self.journal.put(Entry(record=record))
        self.add(record)

    def conclude(self, *, points: bool = True, retires: bool = True, spare: Container[str] = ()) -> list[Record]:
        """Point the aliases, and remove the checkpoints that no rule keeps, without those to ``spare`` (steps 6 to 8).

        Returns:
            The checkpoints that do not count any more.
        """
        contents, journal = self.contents, self.journal
        pointings = contents.aliases.plan(self.policy, self.manifest) if points else []
        slots = [one.slot for one in pointings if one.slot is not None]
        later = self.manifest.without(*(slot.name for slot in slots))
        surplus = self.looks.reasons_of(later).surplus if retires else ()
        waiting = [entry.record for entry in journal.unfinished.values() if entry.status == "retired"]
        going = {record.name: record for record in waiting} | {
            name: later.by_name[name] for name in surplus if name not in spare
        }
        entries = [journal.retiring(record) for record in (*going.values(), *slots)]
        try:
            with journal.changing(*entries, aliases=[one.alias for one in pointings]) as failed:
                replaced = contents.aliases.point(pointings)
                retire(journal, going.values(), failed)
        except ConflictError:
            raise
        except OSError as error:
            what = " and ".join(filter(None, [some_of([one.alias for one in pointings]), some_of([*going])]))
            msg = (
                f"{what} stay as they are, because the change could not be announced ({error}); "
                "the next save tries again"
            )
            warn(msg)
            return []
        retired = [record for record in going.values() if record.name in self.manifest.by_name]
        contents.manifest = self.manifest.without(*replaced, *going)
        # If a payload could not be deleted, its name stays taken: a new checkpoint must not be mistaken for it.
        contents.add_foreign(*journal.unfinished)
        self._count_changes(len(retired))
        return retired

    def close(self) -> None:
        """Write the index, release the aliases, remove this writer's mark and its staging folder."""
        if not self.contents.is_prepared:
            return
        term = self.journal.term
        if term is None or not term.fenced:
            with contextlib.suppress(OSError, FencedError, UntrustedError):
                self._write_index()
                with self.journal.changing(aliases=self.policy.aliases if term is not None else ()):
                    release(self.journal, self.policy.aliases)
        self.holder.let_go()
        unmark(self.storage, self.journal.owner)
        with contextlib.suppress(OSError):
            if isinstance(self.storage, SupportsSweep):
                self.storage.close()

    def _count_changes(self, changes: int) -> None:
        self._num_unindexed += changes
        if self._num_unindexed >= max(INDEX_EVERY, len(self.manifest.records) // 10):
            with contextlib.suppress(OSError):
                self._write_index()

    def _write_index(self) -> None:
        if self._num_unindexed:
            index.save(self.storage, index.load(self.storage, self.journal.trust))
            self._num_unindexed = 0


@contextlib.contextmanager
def held(directory: Directory, run: str) -> Iterator[None]:
    """Hold a run while its records are changed, and no longer than that if this manager does not train it.

    Raises:
        RunInUseError: If another process trains the run.
    """
    term = directory.journal.term
    if term is not None and term.run == run:
        yield
        return
    directory.contents.prepare()
    directory.hold(run)
    try:
        yield
    finally:
        directory.holder.let_go()
        directory.journal.term = None


def _listing(journal: Journal) -> index.Listing:
    storage, before = journal.storage, journal.term.before if journal.term is not None else ""
    with advising(storage, "use"):
        listing = index.load(storage, journal.trust, writers=[before] if before else [])
    journal.trust = listing.trust
    return listing
