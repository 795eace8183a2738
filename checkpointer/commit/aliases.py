"""The aliases of one run in one directory: which names are free, which manager owns them, and what they point to."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Final, Literal

import attrs

from checkpointer.commit.index import HOME, Listing, json_name, read_bounded, record_path
from checkpointer.commit.journal import Journal, aborting
from checkpointer.commit.signing import check_signature, signed
from checkpointer.errors import AliasInUseError, RecordError, warn
from checkpointer.policy.policy import Policy
from checkpointer.ports import Stat, Storage, SupportsCopy, SupportsLinks, SupportsPaths
from checkpointer.records.codec import parse_json
from checkpointer.records.manifest import Manifest
from checkpointer.records.record import SCHEMA, Record
from checkpointer.storage.digests import algorithm_of, digest_of
from checkpointer.storage.owner import is_live

_CHUNK: Final = 4 << 20


@attrs.define
class Aliases:
    """Chooses alias names that replace no file of others, and points them to checkpoints."""

    journal: Journal
    asked: Policy
    """The policy with the alias names that the user chose."""
    listing: Listing
    """The contents of the directory when it was opened."""
    _pointed: dict[str, str] = attrs.field(factory=dict, init=False)
    """Token of the checkpoint that each alias points to."""
    _made: dict[str, Stat] = attrs.field(factory=dict, init=False)
    """The file of each alias when it was made or found to be ours, where a look costs no request."""
    yielding: set[str] = attrs.field(factory=set, init=False)
    """Files of another program that the next checkpoint or alias of their name replaces, because the user wants it."""
    poisoned: frozenset[str] = frozenset()
    """Names that another writer has announced to change, and may still change."""
    _claimed: set[str] = attrs.field(factory=set, init=False)
    """Names that this manager owns, even if their markers are deleted."""

    def settle(self, manifest: Manifest, warn_once: Callable[[str, str], None], *, slots: bool, claims: bool) -> Policy:
        """Return the policy with alias names that are free.

        With ``slots`` a checkpoint of another run makes a name taken, too. With ``claims`` this manager claims the
        names, and warns if one differs from the name that the user chose.
        """
        naming = self.asked.name
        for field in ("last", "best"):
            if not getattr(self.asked, field):
                continue
            stem = getattr(self.asked.name, field)
            name = naming.free_name(stem, _Blocked(self, manifest, slots))
            naming = attrs.evolve(naming, **{field: name.removesuffix(naming.suffix)})  # type: ignore[arg-type]
            # A marker is written at the first save only, when the alias is announced.
            if claims and claim(self.journal, name, manifest.label, marks=slots):
                self._claimed.add(name)
            # Without a counter a host may still let a file be replaced: see `Names.let_replace`.
            if claims and name != stem + naming.suffix and (slots or naming.version_counter):
                warn_once(name, f"{stem}{naming.suffix} is not this run's; the alias is {name} instead")
        return attrs.evolve(self.asked, name=naming)

    def plan(self, policy: Policy, manifest: Manifest) -> list[Pointing]:
        """Return which aliases have to point to another checkpoint."""
        found = []
        for alias, how in policy.aliases.items():
            is_last = alias == policy.name.last_file
            target = manifest.newest if is_last else policy.best_of(manifest.history)
            if target is None:
                self._remove_dangling(alias)
            elif target.name != alias and self._pointed.get(alias) != target.token:
                slot = manifest.by_name.get(alias) or next((r for r in manifest.aside if r.name == alias), None)
                found.append(Pointing(alias, how, target, slot))
        return found

    def point(self, pointings: Iterable[Pointing]) -> list[str]:
        """Point aliases to their checkpoints (step 7); return the names of the slots that they have replaced.

        The change must be announced.
        """
        replaced = []
        for one in pointings:
            try:
                duplicate(self.journal.storage, one.target.name, one.alias, one.how)
                if one.slot is not None:  # A newer checkpoint is committed, and the alias has replaced this one.
                    self.journal.delete(one.slot.name)
            except OSError as error:
                msg = f"the alias {one.alias} could not be made ({error}); {one.target.name} itself is saved"
                warn(msg)
                continue
            self._pointed[one.alias] = one.target.token
            self.yielding.discard(one.alias)
            self._remember(one.alias)
            if one.slot is not None:
                replaced.append(one.alias)
        return replaced

    def _remove_dangling(self, alias: str) -> None:
        """Remove a link if its target is gone. A copy is a whole checkpoint, and stays."""
        storage = self.journal.storage
        if isinstance(storage, SupportsLinks) and storage.list(alias):
            try:
                storage.open(alias).close()
            except FileNotFoundError:
                self.forget(alias)
                with contextlib.suppress(OSError):
                    storage.delete(alias)
            except OSError:  # A folder.
                return

    def forget(self, alias: str | None = None) -> None:
        """Count an alias, or all, as pointing to nothing, because its file or its owner has changed."""
        if alias is None:
            self._pointed.clear()
        else:
            self._pointed.pop(alias, None)
            self._remember(alias)

    def is_blocked(self, alias: str, manifest: Manifest, *, slots: bool) -> bool:
        """Return whether the alias would replace a file of others; with ``slots`` also a checkpoint of another run."""
        if alias in self.poisoned:
            return True
        record = manifest.by_name.get(alias)
        if record is None and slots:
            entry = self.journal.find(alias)
            record = entry.record if entry is not None and entry.status == "committed" else None
        if record is not None and (record.run, record.label) != (manifest.run, manifest.label):
            return slots
        if record_path(alias) in self.listing.damaged:
            return True
        if alias in self.yielding or not self._is_taken(alias, manifest):
            return False
        if alias not in self._claimed and record is None and not read_marker(self.journal, alias):
            return True
        return not self._is_ours(alias, manifest)

    def has_foreign_marker(self, alias: str) -> bool:
        """Return whether a folder, or a file of another user, is where the marker of an alias belongs.

        If a look costs a request, the answer is False; then the write of the marker fails.
        """
        if not self.journal.is_near:
            return False
        try:
            read_bounded(self.journal.storage, marker_path(alias))
        except FileNotFoundError:
            return False
        except RecordError:
            return True
        return False

    def _is_taken(self, alias: str, manifest: Manifest) -> bool:
        listed = self.journal.storage.list
        if self.journal.is_near:
            return bool(listed(alias))
        # If the storage ignores case, only the storage can say whether a name is taken.
        folded = alias.casefold()
        foreign = manifest.foreign
        return alias in foreign or (any(name.casefold() == folded for name in foreign) and bool(listed(alias)))

    def _is_ours(self, alias: str, manifest: Manifest) -> bool:
        """Return whether the file at an alias is a checkpoint, or a link or copy of one.

        If a look costs a request, only the size counts that the file had when the directory was opened.
        """
        if not self.journal.is_near:
            found = self.listing.files.get(alias)
            known = self._known(manifest)
            return found is None or alias in self._claimed or any(record.size == found.size for record in known)
        there = self.journal.storage.list(alias).get(alias)
        if there is None:
            return False  # A folder: an alias of a folder is a link.
        if self._made.get(alias) != there:
            if not self._leads_to_checkpoint(alias, manifest):
                return False
            self._made[alias] = there
        return True

    def _leads_to_checkpoint(self, alias: str, manifest: Manifest) -> bool:
        """Return whether a file is a link within the directory, or has the bytes of a checkpoint."""
        storage = self.journal.storage
        slot = manifest.by_name.get(alias) if alias not in self._made else None
        if slot is not None and self.journal.has_payload(slot):
            return True
        alike = [*self._known(manifest)]
        if isinstance(storage, SupportsPaths):
            path = storage.local_path(alias)
            if os.path.islink(path):
                target = os.path.normpath(os.path.join(os.path.dirname(alias), os.readlink(path)))
                return not target.startswith((os.sep, os.pardir + os.sep))
            alike = [record for record in alike if record.size == os.path.getsize(path)]
            if any(_is_same_file(path, storage.local_path(r.name)) for r in alike if r.name != alias):
                return True
        digests = {record.digest for record in alike}
        with contextlib.suppress(FileNotFoundError):
            found = [digest_of(storage, alias, algorithm) for algorithm in {*map(algorithm_of, digests)}]
            return any(digest in digests for _, digest in filter(None, found))
        return True  # A link whose target is gone.

    def _known(self, manifest: Manifest) -> Iterator[Record]:
        """Yield each record that an alias may be a copy of, with the retired and replaced ones that are listed."""
        entries = self.listing.entries.values()
        replaced = (entry.previous for entry in entries if entry.previous is not None)
        return chain(manifest.records, manifest.aside, (entry.record for entry in entries), replaced)

    def _remember(self, alias: str) -> None:
        there = self.journal.storage.list(alias).get(alias) if self.journal.is_near and alias in self._claimed else None
        if there is not None:
            self._made[alias] = there


def _is_same_file(path: str, other: str) -> bool:
    try:
        return os.path.samefile(path, other)
    except OSError:
        return False


@attrs.frozen
class Pointing:
    """One alias that has to point to another checkpoint."""

    alias: str
    how: Literal["link", "copy"]
    target: Record
    slot: Record | None
    """The checkpoint that lies under the alias, and is retired for it."""


@attrs.frozen
class _Blocked:
    """The alias names that are not free, as a container that is searched name by name."""

    aliases: Aliases
    manifest: Manifest
    slots: bool

    def __contains__(self, alias: object) -> bool:
        name = str(alias)
        is_blocked = self.aliases.is_blocked(name, self.manifest, slots=self.slots)
        return is_blocked or self.aliases.has_foreign_marker(name)


def duplicate(storage: Storage, source: str, path: str, how: Literal["link", "copy", "hardlink"]) -> None:
    """Give a payload a second name, in one step.

    ``"link"`` makes a symlink if it can. ``"copy"`` makes a hard link or copy; a folder has no hard links, so it gets a
    symlink. ``"hardlink"`` never makes a symlink, because the old name will hold something else.
    """
    ways: list[Callable[[str, str], None]] = []
    if isinstance(storage, SupportsLinks):
        ways += [storage.symlink, storage.hardlink] if how == "link" else [storage.hardlink]
    if isinstance(storage, SupportsCopy):
        ways.append(storage.copy)
    if isinstance(storage, SupportsLinks) and how != "hardlink":
        ways.append(storage.symlink)
    refused: list[OSError] = []
    for way in ways:
        try:
            way(source, path)
        except IsADirectoryError:  # A folder has the second name, so another way does not help.
            raise
        except NotImplementedError:
            continue
        except OSError as error:
            refused.append(error)
            continue
        return
    with aborting(storage.upload(path)) as upload:
        try:
            stream = storage.open(source)
        except IsADirectoryError as error:  # A folder has no other way.
            raise (refused[0] if refused else error) from error
        with stream:
            while chunk := stream.read(_CHUNK):
                upload.write(chunk)
        upload.finish()
        upload.publish(replace=True)


# Markers: a small file for each alias that names its owner


def marker_path(alias: str) -> str:
    """Return the path of the file that names the owner of an alias."""
    return f"{HOME}/aliases/{json_name(alias)}"


def claim(journal: Journal, alias: str, label: str, *, marks: bool) -> bool:
    """Check that ``alias`` is free; with ``marks`` mark it as owned by this manager, if it holds its run.

    Returns whether it is marked now.

    Raises:
        AliasInUseError: If another live manager owns it.
    """
    marker, term = read_marker(journal, alias), journal.term
    other = marker.get("owner", "")
    if term is None and marker.get("label") == label:
        return False  # The other one may hold the run that this manager is about to go on with: that comes first.
    if other != journal.owner and is_live(other) and not (term is not None and term.has_replaced(other)):
        journal.check_term()
        pid = other.split("~")[1]
        msg = (
            f"the alias {alias!r} in {journal.storage} is kept by another live manager (process {pid}). If both train "
            "the same run, stop one of them; if they are two trainings, give this one another label and alias: "
            "label='b', Naming(last='last-b')"
        )
        raise AliasInUseError(msg)
    if term is None or not marks:
        return False
    mark(journal, alias, label, journal.owner)
    return True


def release(journal: Journal, aliases: Iterable[str]) -> None:
    """Mark this manager's aliases as owned by no manager; the links themselves stay."""
    for alias in aliases:
        marker = read_marker(journal, alias)
        if marker.get("owner") == journal.owner:
            mark(journal, alias, marker.get("label", ""), "")


def mark(journal: Journal, alias: str, label: str, owner: str, *, copy: tuple[str, Stat | None] = ("", None)) -> None:
    """Write the marker of an alias; an empty owner stands for no manager.

    ``copy``: the checkpoint whose bytes the file has that is there, and that file, if it was not made by a manager.
    """
    marker = {"schema": SCHEMA, "alias": alias, "label": label, "owner": owner}
    target, there = copy
    if there is not None and there.version:
        marker |= {"target": target, "version": there.version}
    journal.storage.write(marker_path(alias), json.dumps(signed(marker, journal.trust)).encode())


def read_marker(journal: Journal, alias: str) -> dict[str, str]:
    """Return the text values of a marker; empty if there is none that can be trusted."""
    path = marker_path(alias)
    try:
        data = parse_json(read_bounded(journal.storage, path), path)
        check_signature(data, path, journal.trust)
    except (FileNotFoundError, RecordError):
        return {}
    return {k: v for k, v in data.items() if isinstance(v, str)} if isinstance(data, dict) else {}
