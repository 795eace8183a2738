"""Copies a directory of checkpoints to another storage: verified on the way, resumable, aliases included."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from typing import Literal

import attrs

from checkpointer._display import count_text, size_text, some_of
from checkpointer.commit.aliases import duplicate, mark
from checkpointer.commit.created import CREATED
from checkpointer.commit.index import read_bounded
from checkpointer.commit.journal import Journal
from checkpointer.commit.recovery import settle
from checkpointer.commit.signing import HMACKey, refuse_unsigned
from checkpointer.commit.terms import TERMS
from checkpointer.commit.transaction import Transaction
from checkpointer.commit.writer_marks import refuse_if_live
from checkpointer.errors import CorruptError, NameTakenError, NotEnoughSpaceError, RecordError, StorageError
from checkpointer.ports import Storage, SupportsFreeSpace, SupportsLinks, SupportsSweep
from checkpointer.records.record import Record, commit_order
from checkpointer.storage.local import cannot_write
from checkpointer.storage.local_upload import FULL
from checkpointer.storage.owner import is_dead
from checkpointer.storage.progress import CountingStorage
from checkpointer.storage.same_place import SamePlaceError, refuse_same
from checkpointer.tools.catalog import Catalog, look_at


@attrs.frozen(kw_only=True)
class Copying:
    """The plan of a copy."""

    missing: tuple[Record, ...]
    """Checkpoints that the destination does not have, oldest first."""
    there: tuple[Record, ...] = ()
    """Checkpoints that the destination has already."""
    aliases: tuple[tuple[str, str, Literal["link", "copy"]], ...] = ()
    """Each alias, what it stands for, and how it is made."""
    retired: tuple[Record, ...] = ()
    """Checkpoints that a running process has retired before they were copied."""

    @property
    def bytes(self) -> int:
        """Bytes to copy."""
        return sum(record.size for record in self.missing)


def plan_copying(source: Catalog, target: Catalog, records: Sequence[Record] | None = None) -> Copying:
    """Compare two directories. Checkpoints with the same token and digest are the same; None takes all ``records``."""
    wanted = tuple(source.records if records is None else records)
    copies = {(record.token, record.digest) for record in target.records}
    missing = tuple(record for record in wanted if (record.token, record.digest) not in copies)
    names = (record.name for record in (*target.records, *_in_the_way(target, wanted)))
    taken = target.foreign.union(names, target.aliases)
    half_way = {entry.record.name for entry in target.unfinished}
    in_the_way = [record.name for record in missing if record.name in taken and record.name not in half_way]
    if in_the_way:
        msg = (
            f"{target.place} has other files under the names {some_of(in_the_way, 3)}; nothing was copied. "
            "Copy to an empty directory"
        )
        raise NameTakenError(msg)
    by_name = {record.name: record for record in wanted}
    aliases = tuple(
        (alias, name, "link" if os.path.islink(source.location(alias)) else "copy")
        for alias, name in source.aliases.items()
        if name in by_name and (alias not in taken or _goes_on(target, alias, by_name[name]))
    )
    there = tuple(record for record in wanted if (record.token, record.digest) in copies)
    return Copying(missing=missing, there=there, aliases=aliases)  # type: ignore[arg-type]


def _in_the_way(target: Catalog, wanted: Sequence[Record]) -> list[Record]:
    """Return the records there without a payload that cannot be given theirs: others, or those whose name is used."""
    copies = {(record.token, record.digest, record.name) for record in wanted}
    used = {name for path in target.files for name in (path, *(path[:i] for i, char in enumerate(path) if char == "/"))}
    return [r for r in target.missing if r.name in used or (r.token, r.digest, r.name) not in copies]


def _goes_on(target: Catalog, alias: str, record: Record) -> bool:
    """Return whether an alias there names an older checkpoint of the same run, or this very one."""
    named = next((other for other in target.records if other.name == target.aliases.get(alias)), None)
    if named is None or (named.run, named.label) != (record.run, record.label):
        return False
    return commit_order(named) <= commit_order(record)


def copy(
    source: Catalog,
    storage: Storage,
    owner: str,
    *,
    records: Sequence[Record] | None = None,
    trust: HMACKey | None = None,
    on_plan: Callable[[Copying], object] = lambda plan: None,
    on_bytes: Callable[[int], object] = lambda count: None,
    on_bad: Callable[[Record, CorruptError], object] | None = None,
) -> Copying:
    """Copy checkpoints to another storage, each by the steps of a commit, so that each is there whole or not at all.

    A copy that was interrupted goes on where it was: what the destination has already is left alone. Runs, serials,
    metrics and pins are those of the source, so that a training can go on from the copy.

    Args:
        source: What to copy, from `checkpointer.tools.catalog.look_at`.
        storage: The destination, opened with ``owner``.
        owner: Id of this writer, from `checkpointer.storage.owner.new_owner`.
        records: Which checkpoints; None takes all.
        trust: The key of signed records, for both sides.
        on_plan: Called with the plan before anything is copied.
        on_bytes: Called with the number of bytes after each read.
        on_bad: Called with a checkpoint that is not what its record says, and with the error. It is left out, and the
            others are copied. None: the error is raised.

    Returns:
        What was done.

    Raises:
        StorageError: If both are the same place.
        NotEnoughSpaceError: If the destination has too little space. Nothing was changed.
        NameTakenError: If it has something else under such a name. Nothing was changed.
        AliasInUseError: If a process writes to the destination, or may do so on another machine. Nothing was changed.
        CorruptError: If a payload is not what its record says, and there is no ``on_bad``. It is not copied; what was
            before it is. If a running process has retired the checkpoint meanwhile, it is left out instead.
        UntrustedError: If records on either side are signed, and there is no key. Nothing was changed.

    Example:
        >>> from checkpointer import CheckpointManager, EverySteps, KeepLast, Policy
        >>> from checkpointer.testing import MemoryStorage
        >>> here, there = MemoryStorage(), MemoryStorage()
        >>> with CheckpointManager(here, Policy(EverySteps(1), [KeepLast(1)]), state=lambda: {"w": 1}) as manager:
        ...     decision = manager.observe({}, step=1, epoch=0)
        >>> [record.name for record in copy(look_at(here), there, "me").missing]
        ['epoch=0-step=1.ckpt']
        >>> copy(look_at(here), there, "me").missing
        ()
    """
    try:
        refuse_same(source.storage, storage)
    except SamePlaceError as error:
        msg = f"{source.place} is the directory itself, so there is nothing to copy; name another place"
        raise StorageError(msg) from error
    refuse_unsigned(source.signed, source.place, trust)
    journal = Journal(storage, owner, trust)
    target = look_at(storage, trust)
    refuse_unsigned(target.signed, target.place, trust)
    refuse_if_live(storage, target.place)
    plan = plan_copying(source, target, records)
    _check_space(plan, storage)
    on_plan(plan)
    if isinstance(storage, SupportsSweep):
        storage.prepare()
        storage.sweep()
    if _clear(source, target, plan, journal):
        target = look_at(storage, trust)
        plan = plan_copying(source, target, records)
    plan = _copy_payloads(source, target, plan, journal, on_bytes, on_bad)
    limits = [path for path in source.files if path.startswith(f"{TERMS}/") and path.endswith(".limits")]
    for path in (CREATED, *limits):
        if path in source.files and path not in target.files:
            with contextlib.suppress(FileNotFoundError, RecordError):  # It is a folder, or a link that leads nowhere.
                storage.write(path, read_bounded(source.storage, path))
    by_name = {record.name: record for record in source.records}
    for alias, name, how in plan.aliases:
        if target.aliases.get(alias) == name:
            continue
        with journal.changing(aliases=[alias]):
            duplicate(storage, by_name[name].name, alias, how if isinstance(storage, SupportsLinks) else "copy")
        mark(journal, alias, by_name[name].label, "")
    return plan


def _copy_payloads(
    source: Catalog,
    target: Catalog,
    plan: Copying,
    journal: Journal,
    on_bytes: Callable[[int], object],
    on_bad: Callable[[Record, CorruptError], object] | None,
) -> Copying:
    """Copy the payloads and records; return the plan without what is bad, or was retired by a running process."""
    counted = CountingStorage(source.storage, on_bytes)
    without_payload = {record.name: record for record in target.missing}
    transaction, now = Transaction(journal), source
    retired: list[Record] = []
    bad: list[Record] = []
    for record in plan.missing:
        if now is not source and now.lacks(record):
            retired.append(record)
            continue
        try:
            transaction.copy_in(record, counted, record.name, replaces=without_payload.get(record.name))
        except (CorruptError, OSError) as error:
            now = source.again()
            if now.lacks(record):
                retired.append(record)
            elif on_bad is not None and isinstance(error, CorruptError):
                on_bad(record, error)
                bad.append(record)
            elif isinstance(error, OSError) and error.errno in FULL:
                raise cannot_write(target.place, error) from error
            else:
                raise
    gone = {record.name for record in (*retired, *bad)}
    return attrs.evolve(
        plan,
        missing=tuple(record for record in plan.missing if record.name not in gone),
        aliases=tuple(alias for alias in plan.aliases if alias[1] not in gone),
        retired=tuple(retired),
    )


def _check_space(plan: Copying, storage: Storage) -> None:
    free = storage.free_space() if isinstance(storage, SupportsFreeSpace) else None
    if free is not None and free < plan.bytes:
        msg = (
            f"{storage} has {size_text(free)} free, and {count_text(len(plan.missing), 'checkpoint')} need "
            f"{size_text(plan.bytes)}; nothing was copied. Free some space, or copy fewer"
        )
        raise NotEnoughSpaceError(msg)


def _clear(source: Catalog, target: Catalog, plan: Copying, journal: Journal) -> bool:
    """Finish what an interrupted copy of the same checkpoints left; return whether there was any."""
    tokens = {record.token for record in plan.missing}
    left = [entry for entry in target.unfinished if entry.status == "pending" and entry.record.token in tokens]
    for entry in left:
        if not is_dead(entry.owner):
            msg = (
                f"{entry.record.name} is being copied to {target.place} by another process, or was by one on another "
                "machine; wait for its end, or remove its record"
            )
            raise StorageError(msg)
        if settle(journal, entry, write=True) is None:
            # Files of a folder are copied one by one: those with the size of the source's are from that copy.
            for path, stat in target.files.items():
                own = source.files.get(path) if path.startswith(f"{entry.record.name}/") else None
                if own is not None and own.size == stat.size:
                    journal.storage.delete(path)
    return bool(left)
