"""Finds and removes what a killed save has left under final names, on a storage where nothing can be staged.

On an object store, ranks and trainers write the files of a folder under their final names. The argument why no
acknowledged checkpoint is removed with those of a killed save has two sides. A save that writes under a final name
takes these steps:

1. *Reserve*: its writer creates the pending record of an unused name, by a request that fails if the record exists.
   Until this record is removed, no other writer writes files of that name, because it could not reserve it.
2. *Write*: the writer and its ranks write the files.
3. *Commit*: the writer replaces the record by the committed one.
4. *Check*: the writer looks for the claim of the run's next term. If it exists, the writer raises `FencedError`.
5. *Acknowledge*: the save returns.

If the save fails before step 3, its writer announces the name in its file of changes, checks its term as in step 4, and
removes the files. It removes the record at its next save: then all its ranks have ended the write that failed.

A process removes the files of a save that was killed in these steps. Except for the writer itself, no other code
removes a pending record of such a save:

A. *Claim*: it creates the claim of the run's next term. After that it lists the directory, and reads what other writers
   have announced.
B. *Choose*: it takes the pending records of its run and label, if the writer has certainly ended, or if the record has
   a lower term, which step 4 checks. It leaves a name that another writer has announced, unless that one has ended.
C. *Announce*: it writes the names into its file of changes. Then it looks for the claim of a higher term, and if it
   exists, removes nothing.
D. *Read again*: it leaves a record that is committed or of another save now.
E. *Remove*: it removes the files, and what the storage has of unfinished uploads.
F. *Release*: it removes the record if the writer has certainly ended. Else the name stays reserved, because ranks of
   that writer may still write files. The next process then removes these.

It cannot be the save of the record itself that was acknowledged. If its writer has ended, step D decides. Else step 4
has not seen the claim of step A, so step 3 came before step A, and step D sees the committed record.

It cannot be another save of the same name. That one must have reserved the name after step D, so the record was removed
between D and E. Only two processes remove it. One is its writer, which announced the name and checked its term before
that: either this check came before step A, and step B leaves the name, or the writer removes nothing. The other one is
a process with a higher term in step F. If it claimed its term before step C, step C removes nothing. If it claimed it
later, its step B sees what step C has announced, and leaves the name.

A copy of a folder to such a storage is a save, too. Its record has a digest from the beginning, and its writer may hold
the term of another run. So it is removed only if its writer has certainly ended and the digest differs.
"""

from __future__ import annotations

from collections.abc import Iterable

from checkpointer.commit.changes import Changes
from checkpointer.commit.journal import Journal
from checkpointer.ports import Storage, SupportsPaths, SupportsUploads
from checkpointer.records.digest_algorithms import DIGESTS, OF_FILES
from checkpointer.records.record import Entry, Record


def no_digest(algorithm: str) -> str:
    """Return the digest of a payload that is not written yet. No payload has it."""
    return f"{OF_FILES}{algorithm}:{'0' * len(DIGESTS[algorithm]().hexdigest())}"


def is_begun(record: Record) -> bool:
    """Return whether the writer of this record has written under the final name, and checks its term afterwards."""
    return record.digest in map(no_digest, DIGESTS)


def is_replaced(journal: Journal, entry: Entry) -> bool:
    """Return whether a save under a final name can no longer be acknowledged, because its run has a higher term."""
    held, record = journal.term, entry.record
    if held is None or entry.status != "pending" or not is_begun(record):
        return False
    return (record.run, record.label) == (held.run, held.label) and 0 < record.term < held.number


def announced_by_others(journal: Journal, changes: Iterable[Changes], *, force: bool) -> frozenset[str]:
    """Return the names that another writer has announced, and may still change."""
    alive = (one for one in changes if one.owner != journal.owner and not journal.has_stopped(one.owner, force=force))
    return frozenset().union(*(one.names for one in alive))


def has_named_files(storage: Storage, record: Record) -> bool:
    """Return whether a save may have written files under its final name, instead of staging them."""
    if isinstance(storage, SupportsPaths):
        return False
    return _is_unwritten(record) or any(path != record.name for path in storage.list(record.name))


def remove_files(storage: Storage, record: Record) -> None:
    """Remove what a save has written under its final name (step E)."""
    if isinstance(storage, SupportsUploads):
        storage.abort_uploads(record.name)
    for path in storage.list(record.name):
        # A copy of one file is staged, so a file of the very name is not its own.
        if path != record.name or _is_unwritten(record):
            storage.delete(path)


def _is_unwritten(record: Record) -> bool:
    return not record.size and not record.digest.partition(":")[2].strip("0")
