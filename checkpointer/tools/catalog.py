"""Looks at a directory and changes nothing: checkpoints, aliases, damaged records, unfinished writes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import attrs

from checkpointer._display import some_of
from checkpointer.commit import index
from checkpointer.commit.journal import Journal
from checkpointer.commit.payload_names import location
from checkpointer.commit.recovery import recover
from checkpointer.commit.signing import UNCHECKED, HMACKey, check_signature
from checkpointer.commit.terms import by_key
from checkpointer.errors import CorruptError, NotFoundError, RecordError, UntrustedError
from checkpointer.ports import Stat, Storage, SupportsPaths
from checkpointer.records.manifest import Manifest
from checkpointer.records.record import Entry, Record, commit_order
from checkpointer.storage.opening import advising
from checkpointer.tools.query import name_like

_ALIASES = f"{index.HOME}/aliases/"


@attrs.frozen(kw_only=True)
class Catalog(index.Listing):
    """The content of a directory when `look_at` read it."""

    place: str
    """The path or URL, without a password."""
    storage: Storage = attrs.field(repr=False)
    records: tuple[Record, ...]
    """Every committed checkpoint whose payload is there, of all runs, in commit order."""
    missing: tuple[Record, ...] = ()
    """Records whose payload is gone, or has another size: they do not count."""
    aliases: Mapping[str, str]
    """Each alias that is there, and the name of the checkpoint it stands for; empty if that is not known."""
    unfinished: tuple[Entry, ...] = ()
    """Records of writes and removals that were left half-way, or go on right now."""

    @property
    def has_records(self) -> bool:
        """Whether there is any record, readable or not."""
        return bool(self.records or self.missing or self.damaged or self.unfinished)

    @property
    def is_unchecked(self) -> bool:
        """Whether records are signed, and no signature was checked, because no key was given."""
        return self.trust is UNCHECKED

    @property
    def is_mixed(self) -> bool:
        """Whether files that are not signed are among the signed ones, and no key was given. They are damaged."""
        return self.is_unchecked and any(isinstance(error, UntrustedError) for error in self.damaged.values())

    def again(self) -> Catalog:
        """Return the directory as it is now."""
        return attrs.evolve(look_at(self.storage, self.trust), place=self.place)

    def current(self, name: str) -> Record | None:
        """Return the record that has a name; None if it was retired, or is being removed."""
        return next((one for one in (*self.records, *self.missing) if one.name == name), None)

    def lacks(self, record: Record) -> bool:
        """Return whether a running process has retired or replaced a checkpoint of an earlier look."""
        found = self.current(record.name)
        if found is None:
            return index.record_path(record.name) not in self.damaged
        return (found.token, found.digest) != (record.token, record.digest)

    @contextlib.contextmanager
    def naming_retired(self, record: Record) -> Iterator[None]:
        """If the block fails because a running process has retired this checkpoint, say so."""
        try:
            yield
        except (CorruptError, OSError) as error:
            if not self.again().lacks(record):
                raise
            msg = f"a running process has retired {record.name} meanwhile; choose a checkpoint that is there now"
            raise NotFoundError(msg) from error

    @cached_property
    def terms(self) -> Mapping[str, Sequence[str]]:
        """The files of the terms of each run and label, by `checkpointer.commit.terms.key_of`."""
        return by_key(self.files)

    @property
    def below(self) -> list[str]:
        """The folders below that have records of their own."""
        return index.directories_below(self.files)

    @cached_property
    def runs(self) -> tuple[tuple[str, str], ...]:
        """Each run and label, in the order of their newest checkpoints."""
        return tuple(dict.fromkeys((r.run, r.label) for r in reversed(self.records)))[::-1]

    def named(self, run: str | None) -> tuple[tuple[str, str], ...]:
        """Return the runs and labels that an id stands for, the newest last; None stands for all.

        An id is that of a run, or ``RUN/LABEL`` for one label of a run. If it is both, it is the label's.

        Raises:
            NotFoundError: If there is none.
        """
        labelled = tuple(one for one in self.runs if one[1] and run == "/".join(one))
        found = labelled or tuple(one for one in self.runs if run in (None, one[0], "/".join(one)))
        if run is not None and not found:
            there = ", ".join(self.id_of(*one) for one in self.runs) or "none"
            msg = f"{self.place} has no checkpoint of run {run!r}; there are: {there}"
            raise NotFoundError(msg)
        return found

    def of(self, run: str | None) -> list[Record]:
        """Return the checkpoints of the runs and labels that an id stands for, in commit order."""
        runs = frozenset(self.named(run))
        return [record for record in self.records if (record.run, record.label) in runs]

    def id_of(self, run: str, label: str) -> str:
        """Return the id by which `named` finds only this run and label."""
        return run if self.named(run) == ((run, label),) else f"{run}/{label}"

    def manifest(self, run: str | None = None, label: str | None = None) -> Manifest:
        """Return the records as a run sees them; None stands for the run, or the label, of the newest checkpoint."""
        own = [r for r in self.records if run in (None, r.run) and label in (None, r.label)]
        if not own:
            if run is None and label is None:
                return Manifest(foreign=self.foreign, aside=self.missing)
            there = ", ".join(self.id_of(*one) for one in self.runs) or "none"
            msg = f"{self.place} has no checkpoint of run {run!r} and label {label!r}; there are: {there}"
            raise NotFoundError(msg)
        seen = frozenset(metric for record in self.records for metric in record.metrics)
        manifest = Manifest(
            records=self.records,
            aside=self.missing,
            label=own[-1].label,
            foreign=self.foreign,
            seen=seen,
            limits=self.limits,
        )
        return manifest.on_newest_line(own[-1].run)

    @property
    def with_missing(self) -> Catalog:
        """The same directory, with the records that have no payload among the others."""
        records = sorted((*self.records, *self.missing), key=commit_order)
        return attrs.evolve(self, records=tuple(records), missing=())

    def find(self, which: str, run: str | None = None) -> Record:
        """Return the checkpoint of that name, alias or step; without its extension is fine.

        Args:
            which: Its name, alias or step.
            run: Look only among the checkpoints of this run, as for `named`.

        Raises:
            NotFoundError: If there is none, and the message has the closest name; or if there are several.
            CorruptError: If its payload is gone.
            RecordError: If its record is damaged.
        """
        records = self.of(run)
        exact = {self.aliases[which]} if which in self.aliases else set()
        targets = exact or {target for alias, target in self.aliases.items() if _stem(alias) == which}
        for what, found in (
            ("the name", [record for record in records if record.name == which]),
            ("the alias", [record for record in records if record.name in targets]),
            ("the name", [record for record in records if _stem(record.name) == which]),
            ("step", self._at_step(which, records)),
        ):
            if len(found) > 1:
                raise self._several(what, which, found)
            if found:
                return found[0]
        if which == "last" and records and (newest := self.manifest(*self.named(run)[-1]).newest) is not None:
            return newest
        if any(which in (record.name, record.name.rpartition(".")[0], str(record.step)) for record in self.missing):
            msg = f"the payload of {which} is gone, or has another size than its record says"
            raise CorruptError(msg)
        refusal = self.damaged.get(index.record_path(which))
        if refusal is not None:
            raise refusal
        if "" in targets:
            msg = f"{which} is an alias, and which checkpoint it stands for is not known here; name the checkpoint"
            raise NotFoundError(msg)
        raise name_like(which, records)

    def _at_step(self, which: str, records: Sequence[Record]) -> list[Record]:
        """Return the checkpoints of a step: those that count in their run, else those that are abandoned."""
        found = [record for record in records if which.isdecimal() and record.step == int(which)]
        if len(found) < 2:
            return found
        counted = {run: self.manifest(*run) for run in {(record.run, record.label) for record in found}}
        return [record for record in found if counted[record.run, record.label].counts(record)] or found

    def _several(self, what: str, which: str, found: Sequence[Record]) -> NotFoundError:
        """Return the error for something that several checkpoints have."""
        runs = {(record.run, record.label) for record in found}
        names = some_of([f"{record.name} (run {self.id_of(record.run, record.label)})" for record in found])
        hint = "name one of them" + (", or pass --run" if len(runs) > 1 else "")
        return NotFoundError(f"{self.place} has {len(found)} checkpoints of {what} {which}: {names}; {hint}")

    def location(self, name: str) -> str:
        """Return the full path or URL of a file."""
        return location(self.storage, name)

    def aliases_of(self, record: Record) -> list[str]:
        """Return the aliases that stand for a checkpoint."""
        return [alias for alias, target in self.aliases.items() if target == record.name]


def _stem(name: str) -> str:
    return name.rpartition(".")[0]


def look_at(storage: Storage, trust: HMACKey | None = None) -> Catalog:
    """Read the records and the listing of a directory. Nothing is written, locked, claimed, loaded or unpickled.

    Args:
        storage: Where to look, as `checkpointer.storage.open_storage` returns it.
        trust: The key of a signed directory, as for `checkpointer.commit.index.load`.

    Raises:
        SchemaError: If a record was written by a newer version of this library.
        StorageError: If the place cannot be read.
    """
    for _ in range(2):
        with advising(storage, "read"):
            listing = index.load(storage, trust)
        found = recover(Journal(storage, "", listing.trust), listing)
        if not found.missing:
            break  # Else a live run may have retired them since they were listed.
    records = tuple(sorted(found.records, key=commit_order))
    return Catalog(
        **attrs.asdict(listing, recurse=False),
        place=str(storage),
        storage=storage,
        records=records,
        aliases=_aliases(storage, listing, records, listing.trust),
        missing=tuple(sorted(found.missing, key=commit_order)),
        unfinished=(*found.left, *found.announced),
    )


def _aliases(
    storage: Storage, listing: index.Listing, records: Sequence[Record], trust: HMACKey | None
) -> dict[str, str]:
    """Return the aliases that this library made and that are still there."""
    sizes = {record.name: record.size for record in records}
    # A folder has files, and a link or copy of one has them too.
    tops = {path.partition("/")[0] for path in listing.files}
    aliases: dict[str, str] = {}
    for path in listing.files:
        if not path.startswith(_ALIASES):
            continue
        with contextlib.suppress(FileNotFoundError, RecordError):
            data = index.parse_json(index.read_bounded(storage, path), path)
            check_signature(data, path, trust)
            alias = data.get("alias") if isinstance(data, dict) else None
            if not isinstance(alias, str) or path != f"{_ALIASES}{index.json_name(alias)}":
                continue  # This library did not write it.
            if alias not in sizes and (alias in listing.files or alias in tops):
                there = listing.files.get(alias)
                copied = data.get("target") if there is not None and _is_same(storage, there, data, sizes) else None
                aliases[alias] = copied if copied in sizes else _target(storage, alias, listing, records)
    return dict(sorted(aliases.items(), reverse=True))


def _is_same(storage: Storage, there: Stat, marker: dict[str, Any], sizes: Mapping[str, int]) -> bool:
    """Return whether the file of an adopted alias is the one that was looked at, or its copy by ``cp -a``.

    On a disk its version is its time and its inode. A copy of the directory has other inodes.
    """
    version = marker.get("version")
    if version == there.version != "":
        return True
    if not isinstance(version, str) or not isinstance(storage, SupportsPaths):
        return False
    return there.size == sizes.get(marker.get("target", "")) and version.split("-")[0] == there.version.split("-")[0]


def _target(storage: Storage, alias: str, listing: index.Listing, records: Sequence[Record]) -> str:
    """Return the name of the checkpoint that an alias stands for; empty if only reading it would show that."""
    if isinstance(storage, SupportsPaths):
        return _local_target(storage, alias, records)
    there = listing.files.get(alias)
    if there is None or not there.version or there.modified_s is not None:
        return ""  # A time does not show of which checkpoint it is a copy.
    # A copy that the server made has the tag of its original.
    return next((r.name for r in reversed(records) if listing.files.get(r.name) == there), "")


def _local_target(storage: SupportsPaths, alias: str, records: Sequence[Record]) -> str:
    path = storage.local_path(alias)
    real, root = os.path.realpath(path), os.path.realpath(storage.local_path(""))
    target = os.path.relpath(real, root).replace(os.sep, "/")
    if target != alias:
        return target if any(record.name == target for record in records) else ""
    with contextlib.suppress(OSError):
        there = os.lstat(path)
        for record in reversed(records):
            with contextlib.suppress(OSError):
                if record.size == there.st_size and os.path.samestat(there, os.lstat(storage.local_path(record.name))):
                    return record.name
    return ""
