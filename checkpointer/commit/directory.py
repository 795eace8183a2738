"""One run's view of one directory: its records, its aliases, and what was left half-way by earlier processes."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import uuid
import warnings
from collections.abc import Callable, Container, Iterable

import attrs

from checkpointer.clock import SystemClock
from checkpointer.commit import index
from checkpointer.commit.aliases import Aliases
from checkpointer.commit.missing import missing_text
from checkpointer.commit.signing import HMACKey, refuse_unsigned
from checkpointer.commit.transaction import Transaction, marker_path
from checkpointer.commit.writer_marks import clear_ended, is_marked, mark, unmark, writers_in
from checkpointer.errors import CheckpointerWarning, NameTakenError, RecordError, StorageError
from checkpointer.policy.decide import Reasons, own_name
from checkpointer.policy.policy import Policy
from checkpointer.ports import Clock, Storage, SupportsLinks, SupportsPaths, SupportsSweep, SupportsURLs
from checkpointer.records.codec import as_number
from checkpointer.records.manifest import Manifest
from checkpointer.records.record import SCHEMA, Entry, Line, Observation, Record, check_readable
from checkpointer.storage.opening import access_advice
from checkpointer.storage.owner import is_live

__all__ = ["Directory"]

_log = logging.getLogger("checkpointer")

INDEX_EVERY = 64
"""The index is written anew after this many changes, or a tenth of the records if that is more."""

LOOK_EVERY_S = 60.0
"""Where a look costs a request, seconds between two that a declined observation makes."""


class Directory:
    """Keeps manifest and storage in step: every change of one is a change of the other.

    Args:
        storage: Where the files are.
        owner: Id of this writer.
        policy: What is asked for; `policy` is the same with the alias names that are really free.
        run: Id of the run to go on with; None for a new one.
        label: Tells managers apart that share the directory.
        writes: Whether to claim aliases and clear up after dead writers now; a reader changes nothing.
        trust: Signs what is written; what it has not signed is damaged.
        clock: Tells when a payload takes long.
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
    ) -> None:
        self.storage = storage
        self.transaction = Transaction(storage, owner, trust, clock or SystemClock())
        self.policy = policy
        self.claimed = run is not None
        self._prepared = False
        self._begun = False
        self._on_line = False
        self._said: set[str] = set()
        self._is_near = isinstance(storage, SupportsLinks)
        self._looked_s = -math.inf
        self._judged = Reasons(policy, Manifest())
        listing = _listing(storage, trust)
        self.damaged = listing.damaged
        self._aliases = Aliases(self.transaction, policy, listing)
        self._signed = sum(bool(entry.signature) for entry in listing.entries.values())
        self._unindexed = listing.reads
        self._writers = writers_in(storage, listing.files)
        self.below = index.directories_below(listing.files, index.RECORDS)
        if writes:
            self._prepare()
        found = self.transaction.recover(listing, write=writes)
        self._left = list(found.left)
        known = (*found.records, *found.missing)
        half_way = {entry.record.name for entry in self._left} - {record.name for record in known}
        manifest = Manifest(
            records=found.records,
            run=run or uuid.uuid4().hex[:12],
            label=label,
            foreign=listing.foreign | half_way,
            seen=frozenset(metric for record in known for metric in record.metrics),
        )
        self.manifest = manifest.without_payload(*found.missing, there=listing.sizes).on_newest_line(manifest.run)
        self._settle_aliases(slots=False, claim=writes)
        self._settle_aliases(slots=True, claim=False)
        if writes:
            # Last, because on a full disk the aliases' files can be replaced, and this one is new.
            mark(self.storage, owner)

    def look(self) -> Manifest:
        """Return the manifest, as it is now."""
        return self.manifest

    @property
    def view(self) -> Manifest:
        """The manifest; before this run has saved or restored, as the newest run under the label sees it."""
        manifest = self.manifest  # Once: with background= another thread goes on with it.
        if self.claimed or manifest.own:
            return manifest
        return self._as_next_process()

    def _as_next_process(self) -> Manifest:
        """Return the manifest as the next process will see it that goes on with the newest run under the label."""
        # If no payload is there at all, the run is the one whose payloads are gone: a restore says so.
        manifest = self.manifest
        for records in (manifest.records, manifest.aside):
            labelled = [record for record in records if record.label == manifest.label]
            if labelled:
                return manifest.on_newest_line(labelled[-1].run)
        return manifest

    @property
    def missing_text(self) -> str:
        """What to say of payloads that were gone at the start; empty if none was."""
        view = self.view
        return missing_text(self.policy, view.everywhere, view, view.aside) if view.aside else ""

    def widened(self, elsewhere: Iterable[Record]) -> Manifest:
        """Return the view with what does not count here: what only a mirror holds gets the names it would get here.

        What is aside may be on the mirror, or have come back.
        """
        here = {record.token for record in (*self.manifest.records, *self.manifest.aside)}
        taken = set(self.manifest.taken.union(self.policy.aliases))
        found = []
        for record in elsewhere:
            if record.token not in here:
                name = record.name if record.name not in taken else self.own_name(record, taken)
                taken.add(name)
                found.append(attrs.evolve(record, name=name))
        self.manifest = attrs.evolve(self.manifest, elsewhere=tuple(found))
        view, wide = self.view.everywhere, self.manifest.everywhere
        if self._on_line:
            return wide
        # Before this process has saved or restored, a run is where its newest record is, wherever that is.
        labelled = [record for record in wide.records if record.label == wide.label]
        if not self.claimed and not view.own and labelled:
            view = view.seen_by(labelled[-1].run, labelled[-1].line)
        return view.seen_by(view.run, view.own[-1].line) if view.own else view

    def created(self, clock: Clock) -> float:
        """Return when a time trigger began to count if nothing was ever saved: the first writer's start."""
        path = f"{index.HOME}/directory.json"
        created = self._read_created(path)
        if created is not None:
            return created
        now = clock.time()
        if self._prepared:
            try:
                self.storage.write(path, f'{{"schema": {SCHEMA}, "created": {now!r}}}'.encode())
            except OSError:
                # Another writer may have put it there at this very moment.
                created = self._read_created(path)
                if created is None:
                    raise
                return created
        return now

    def _read_created(self, path: str) -> float | None:
        with contextlib.suppress(FileNotFoundError, RecordError):
            data = index.parse_json(index.read_bounded(self.storage, path), path)
            created = as_number(data.get("created")) if isinstance(data, dict) else None
            if created is not None and math.isfinite(created):
                return created
        return None

    # Before the first change

    def prepare(self) -> None:
        """Check that the storage can be written to, sweep it, and leave a mark; later calls do nothing."""
        self.check_key()
        if not self._prepared:
            self._prepare()
            mark(self.storage, self.transaction.owner)

    def _prepare(self) -> None:
        self.check_key()
        if isinstance(self.storage, SupportsSweep):
            self.storage.prepare()
            self.transaction.sweep()
        clear_ended(self.storage, self._writers)
        self._prepared = True

    def check_key(self) -> None:
        """Raise `UntrustedError` if the directory is signed, and there is no key to change it with."""
        refuse_unsigned(self._signed, self.storage, self.transaction.trust)

    def begin(self) -> None:
        """Take over what belongs to this run, now that it is about to change something; later calls do nothing."""
        self.prepare()
        if self._begun:
            return
        others = len(self.manifest.records) - len(self.manifest.own)
        if others and not self.claimed:
            but = "" if self.policy.name.version_counter else ", unless their names are written again"
            msg = (
                f"{self.storage} holds {others} checkpoints of other runs; they are left alone{but}. "
                "To go on with a run call restore() first"
            )
            self.say_once("not empty", msg)
        self.claimed = self._on_line = True
        self._finish_left()
        self._settle_aliases(slots=True, claim=True)
        self._free_slot()
        self._begun = True

    def is_free(self, name: str) -> bool:
        """Return whether nothing on the storage has this name by now; else it is remembered as taken."""
        if self.storage.list(name) or (self.transaction.has_record(name) and self.lost(name) is None):
            self.manifest = attrs.evolve(self.manifest, foreign=self.manifest.foreign | {name})
            return False
        return True

    def lost(self, name: str) -> Record | None:
        """Return the record of a payload that is gone, if another may be saved under its name."""
        return None if self.policy.name.version_counter else self.manifest.lost(name)

    def _finish_left(self) -> None:
        """Finish what an earlier process of this very run left half-way, on whatever host it ran."""
        left = []
        for listed in self._left:
            entry = self.transaction.refreshed(listed)
            if entry is None:
                continue
            record = entry.record
            if entry.status == "committed":
                known = self.manifest.by_name.get(record.name)
                if known is None or known.token != record.token:
                    self.manifest = self.manifest.with_record(record)
            elif (record.run, record.label) == (self.manifest.run, self.manifest.label) and not is_live(entry.owner):
                self.transaction.finish(entry, write=True)
            else:
                left.append(entry)
        self._left = left

    # Changes

    def note(self, metrics: Iterable[str]) -> None:
        """Remember which metrics were reported."""
        seen = self.manifest.seen.union(metrics)
        if seen != self.manifest.seen:
            self.manifest = attrs.evolve(self.manifest, seen=seen)

    def add(self, record: Record) -> None:
        """Take in a record that was committed."""
        self.manifest = self.manifest.with_record(record)
        self._aliases.forget(record.name)  # A slot has taken the alias's place.
        self._changed()

    def copy_in(self, record: Record, source: Storage, path: str, *, replaces: Record | None = None) -> Record:
        """Commit a copy of what lies at ``path`` of another storage, under its own name if that is free."""
        name = replaces.name if replaces else self.free_name(record)
        return self.transaction.copy_in(attrs.evolve(record, name=name), source, path, replaces=replaces)

    def rewrite(self, record: Record) -> None:
        """Change what a record says; its payload stays."""
        check_readable(record)
        self.prepare()
        self.transaction.put(Entry(record=record))
        self.add(record)

    def look_before_retiring(self, *, sure: Record | None = None, spare: Container[str] = ()) -> None:
        """Set aside what is gone, if others are about to be retired for it; ``sure`` was written a moment ago."""
        names = () if sure is not None and sure.kind != "regular" else self._reasons().surplus
        going = [self.manifest.by_name[name] for name in names if name not in spare]
        if going or self._is_near:
            self._look_instead_of(going, sure)
        if self._is_near:
            self._claim_again()

    def look_before_replacing(self, name: str) -> bool:
        """Set aside what is gone, if the checkpoint of this name is about to go for it; return whether it is."""
        return self._look_instead_of([self.manifest.by_name[name]])

    def look_before_declining(self, now: Observation) -> bool:
        """Set aside what is gone, if the observation is declined for it; return whether it is.

        Where a look costs a request, there is one a minute at most: an observation may be declined at every step.
        """
        if not self._is_near and now.time < self._looked_s + LOOK_EVERY_S:
            return False
        self._looked_s = now.time
        with contextlib.suppress(OSError):
            return self._look_instead_of([self.manifest.draft("", now)])
        return False

    def is_gone(self, record: Record) -> bool:
        """Return whether a checkpoint was deleted, as far as that costs no request; then it is set aside."""
        return self._is_near and self.look_for([record])

    def _look_instead_of(self, going: Iterable[Record], sure: Record | None = None) -> bool:
        """Look at what is kept in the place of others; where that costs a request, only at the best."""
        looks = [r for r in self._reasons().relied_on(going) if sure is None or r.token != sure.token]
        return self.look_for(looks if self._is_near else looks[:1])

    def look_for(self, records: Iterable[Record]) -> bool:
        """Set aside all that is gone, if one of these records is; return whether it is."""
        if all(self._exists(record) for record in records):
            return False
        files = self.storage.list()
        sizes = index.Listing(entries={}, damaged={}, files=files).sizes
        doubtful = [
            record
            for record in self.manifest.records
            if sizes.get(record.name) != record.size or index.record_path(record.name) not in files
        ]
        gone = [r for r in doubtful if not self._exists(r) or not self.transaction.has_record(r.name)]
        if gone:
            before, self.manifest = self.manifest, self.manifest.without_payload(*gone, there=sizes)
            unrecorded = [record for record in gone if self.transaction.has_payload(record)]
            missing = [record for record in gone if record not in unrecorded]
            text = missing_text(self.policy, before, self.manifest, missing, unrecorded)
            warnings.warn(text, CheckpointerWarning, stacklevel=5)
        self._claim_again()
        return bool(gone)

    def _exists(self, record: Record) -> bool:
        """Return whether a checkpoint is there; its record is looked for where that costs no request."""
        if not self.transaction.has_payload(record):
            return False
        return not self._is_near or bool(self.storage.list(index.record_path(record.name)))

    def _claim_again(self) -> None:
        """Write the mark of this writer and claim the aliases anew, if their files were deleted."""
        if self._prepared and not is_marked(self.storage, self.transaction.owner):
            with contextlib.suppress(StorageError):  # No save depends on it.
                mark(self.storage, self.transaction.owner)
        marks = map(marker_path, self.policy.aliases)
        if self._begun and not all(self.storage.list(mark) for mark in marks):
            self._aliases.forget()
            self._settle_aliases(slots=True, claim=True)
        self.spare_aliases()

    def spare_aliases(self) -> bool:
        """Take other alias names if others have put files where ours were; return whether that is so."""
        replaced = self._aliases.replaced(self.policy, self.manifest) if self._begun and self._is_near else []
        if not replaced:
            return False
        slots = [self.manifest.by_name[alias] for alias in replaced if alias in self.manifest.by_name]
        self.manifest = self.manifest.without_payload(*slots, there=replaced)
        self._aliases.forget()
        self._settle_aliases(slots=True, claim=True)
        return True

    def retire(self, *, spare: Container[str] = ()) -> list[Record]:
        """Remove what no rule keeps, and is not to be spared, and return it."""
        names = self._reasons().surplus
        unwanted = [self.manifest.by_name[name] for name in names if name not in spare]
        retired = [r for r in self.transaction.retire(unwanted) if r.name in self.manifest.by_name]
        # Payloads that would not go keep their names: a new checkpoint must not be taken for them.
        self.manifest = self.manifest.without(*(r.name for r in retired))
        if not self.manifest.foreign.issuperset(self.transaction.unfinished):
            foreign = self.manifest.foreign.union(self.transaction.unfinished)
            self.manifest = attrs.evolve(self.manifest, foreign=foreign)
        for _ in retired:
            self._changed()
        return retired

    def _reasons(self) -> Reasons:
        """Return why checkpoints live; worked out once for the look and the retirement after it."""
        if self._judged.policy is not self.policy or self._judged.manifest is not self.manifest:
            self._judged = Reasons(self.policy, self.manifest)
        return self._judged

    def set_aside(self, record: Record) -> None:
        """Count a checkpoint that turned out to be bad no more, without touching it."""
        if record.name in self.manifest.by_name:
            self.manifest = self.manifest.without_payload(record, there=[record.name])
        else:
            self.manifest = attrs.evolve(self.manifest, foreign=self.manifest.foreign | {record.name})

    def disown(self, record: Record) -> None:
        """Remove a record whose payload is another's file: the name stays taken."""
        self.storage.delete(index.record_path(record.name))
        manifest = self.manifest.without(record.name)
        self.manifest = attrs.evolve(manifest, foreign=manifest.foreign | {record.name})

    def resume(self, record: Record, *, protect: bool) -> None:
        """Go on from this record; ``protect`` keeps it whatever the rules say. Writes nothing."""
        if record.name not in self.manifest.by_name:
            self.manifest = self.manifest.with_record(record)  # Its payload has come back.
        self._say_what_a_restart_does(record.step, lambda newest: newest.serial > record.serial)
        self._turn_to(attrs.evolve(self.manifest.resumed_at(record), resumed=record.name if protect else ""))

    def resume_run(self, run: str, line: Line, step: int, source: str = "") -> None:
        """Go on with a run whose host was at ``step`` of this line; ``source`` is kept. Writes nothing."""
        self._say_what_a_restart_does(step, lambda newest: newest.step > step)
        self._turn_to(attrs.evolve(self.manifest.resumed_from(run, line, step), resumed=source))

    def _say_what_a_restart_does(self, step: int, is_beyond: Callable[[Record], bool]) -> None:
        """Log that until the next save only this process knows where the run went back to."""
        newest = self._as_next_process().newest
        if self._prepared and newest is not None and is_beyond(newest):
            _log.warning(
                "going on from step %d: until the next save, a restart goes on from %s (step %d) again",
                step,
                newest.name,
                newest.step,
            )

    def see(self, run: str, line: Line) -> None:
        """Be the directory of this run and line from now on, unless it is already. Writes nothing."""
        if (run, line) != (self.manifest.run, self.manifest.line):
            self._turn_to(self.manifest.seen_by(run, line))

    def _turn_to(self, manifest: Manifest) -> None:
        self.claimed = self._on_line = True
        self.manifest = manifest
        # Whose the aliases and slots are is another question now; it is settled before the next change.
        self._begun = False
        self._aliases.forget()
        self._settle_aliases(slots=True, claim=False)

    def close(self) -> None:
        """Write the index, give the aliases free, remove the mark of this writer and its staging area."""
        if self._prepared:
            with contextlib.suppress(OSError):
                self._write_index()
                self.transaction.release(self.policy.aliases)
            unmark(self.storage, self.transaction.owner)
            with contextlib.suppress(OSError):
                if isinstance(self.storage, SupportsSweep):
                    self.storage.close()

    # Aliases

    def point_aliases(self) -> None:
        """Let ``last`` and ``best`` name what they should, as the records have it."""
        self.manifest = self._aliases.point(self.policy, self.manifest)

    def _settle_aliases(self, *, slots: bool, claim: bool) -> None:
        self.policy = self._aliases.settle(self.manifest, self.say_once, slots=slots, claim=claim)

    def _free_slot(self) -> None:
        """Move a checkpoint that must stay out from under the alias, which is about to be written again."""
        slot = self.manifest.by_name.get(self.policy.name.last_file)
        if not self.policy.last or slot is None:
            return
        must_stay = slot.pinned or slot.name == self.manifest.resumed or not self.manifest.counts(slot)
        if must_stay or self.policy.last == "link":
            self.move_slot(slot)

    def own_name(self, record: Record, taken: Container[str] | None = None) -> str:
        """Return the name that the template gives a checkpoint, whatever alias it is written under now."""
        return own_name(self.policy, record, self.manifest, taken)

    def free_name(self, record: Record) -> str:
        """Return the record's name if it is free here, else one that its template gives it."""
        name = record.name
        is_taken = self.manifest.is_taken(name) or name in self.policy.aliases
        while is_taken or not self.is_free(name):
            name, is_taken = self.own_name(record), False
        return name

    def move_slot(self, slot: Record) -> Record | None:
        """Give a checkpoint that was written under the alias a name of its own; None if its payload is gone."""
        if self.look_for([slot]):
            return None
        while True:
            name = self.free_name(slot)
            try:
                moved = self.transaction.relocate(slot, name)
                break
            except NameTakenError:
                # Another manager was faster.
                self.manifest = attrs.evolve(self.manifest, foreign=self.manifest.foreign | {name})
            except FileNotFoundError:
                self.look_for([slot])
                if self._exists(slot):
                    raise
                return None  # It was removed since the look above.
        resumed = name if self.manifest.resumed == slot.name else self.manifest.resumed
        self.manifest = attrs.evolve(self.manifest.without(slot.name).with_record(moved), resumed=resumed)
        return moved

    def make_way(self, name: str, stem: str) -> str | None:
        """Rename whatever has the name, with its record if it has one; return its new name, None if nothing is there.

        Raises:
            StorageError: If the storage has no paths to rename.
        """
        record = self.manifest.by_name.get(name)
        if record is not None and self.look_for([record]):
            record = None
        if record is None and not self.storage.list(name):
            self._rename_missing(name, stem)
            return None
        if not isinstance(self.storage, SupportsPaths):
            msg = f"{name} cannot be renamed: {self.storage} has no paths"
            raise StorageError(msg)
        self.prepare()
        new = self._unused_name(stem)
        if record is None:
            os.rename(self.storage.local_path(name), self.storage.local_path(new))
            # The folder that holds both is synced with the next record.
            self.manifest = attrs.evolve(self.manifest, foreign=(self.manifest.foreign - {name}) | {new})
            return new
        moved = self.transaction.move(record, new)
        resumed = new if self.manifest.resumed == name else self.manifest.resumed
        self.manifest = attrs.evolve(self.manifest.without(name).with_record(moved), resumed=resumed)
        self._aliases.forget()
        self._changed()
        return new

    def _rename_missing(self, name: str, stem: str) -> None:
        """Let a record whose payload is gone make way for another payload of its name."""
        missing = next((record for record in self.manifest.aside if record.name == name), None)
        if missing is None:
            return
        self.prepare()
        moved = attrs.evolve(missing, name=self._unused_name(stem))
        self.transaction.put(Entry(record=moved))
        self.storage.delete(index.record_path(name))
        self.manifest = self.manifest.without(name).without_payload(moved)

    def _unused_name(self, stem: str) -> str:
        new = self.policy.name.free_name(stem, self.manifest.taken.union(self.policy.aliases))
        while not self.is_free(new):
            new = self.policy.name.free_name(stem, self.manifest.taken.union(self.policy.aliases))
        return new

    # The index, and what is said once

    def _changed(self) -> None:
        self._unindexed += 1
        if self._unindexed >= max(INDEX_EVERY, len(self.manifest.records) // 10):
            with contextlib.suppress(OSError):
                self._write_index()

    def _write_index(self) -> None:
        if self._unindexed:
            index.save(self.storage, index.load(self.storage, self.transaction.trust))
            self._unindexed = 0

    def say_once(self, key: str, msg: str) -> None:
        """Warn, unless something was said under this key before."""
        if key not in self._said:
            self._said.add(key)
            warnings.warn(msg, CheckpointerWarning, stacklevel=4)

    def location(self, name: str) -> str:
        """Return the full path or URL of a payload."""
        if isinstance(self.storage, SupportsPaths):
            return self.storage.local_path(name)
        return f"{self.storage}/{name}"

    def address(self, name: str) -> str:
        """Return what a trainer opens a payload by: as `location`, but with the password of a URL."""
        return self.storage.url(name) if isinstance(self.storage, SupportsURLs) else self.location(name)


def _listing(storage: Storage, trust: HMACKey | None) -> index.Listing:
    try:
        return index.load(storage, trust)
    except StorageError:
        raise
    except OSError as error:
        msg = f"cannot use {storage}: {error}; {access_advice(storage, error)}"
        raise StorageError(msg) from error
