"""Looks at the storage, so that no checkpoint is retired, replaced or declined in favor of one that was deleted.

The message says what is gone, and what becomes the newest and the best.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Container, Iterable, Sequence

from checkpointer._display import some_of
from checkpointer.commit.aliases import marker_path
from checkpointer.commit.contents import Contents
from checkpointer.commit.index import Listing, record_path
from checkpointer.commit.writer_marks import is_marked, mark
from checkpointer.errors import StorageError, warn
from checkpointer.policy.decide import Reasons
from checkpointer.policy.policy import Policy
from checkpointer.records.manifest import Manifest
from checkpointer.records.record import Observation, Record

LOOK_EVERY_S = 60.0
"""Least seconds between two looks for a declined observation, if a look costs a request."""


class Looks:
    """Each method sets aside what is gone, and looks only at the checkpoints that the next change relies on."""

    def __init__(self, contents: Contents) -> None:
        self._contents = contents
        self._reasons = Reasons(contents.policy, contents.manifest)
        self._looked_s = -math.inf

    @property
    def reasons(self) -> Reasons:
        """Why each checkpoint is kept."""
        return self.reasons_of(self._contents.manifest)

    def reasons_of(self, manifest: Manifest) -> Reasons:
        """Return why each checkpoint is kept; computed once for the look and for the retirement after it."""
        policy = self._contents.policy
        if self._reasons.policy is not policy or self._reasons.manifest is not manifest:
            self._reasons = Reasons(policy, manifest)
        return self._reasons

    def before_retiring(self, *, sure: Record | None = None, spare: Container[str] = ()) -> None:
        """Look at what is kept instead of those that are about to be retired; ``sure`` was written a moment ago."""
        contents = self._contents
        names = () if sure is not None and sure.kind != "regular" else self.reasons.surplus
        going = [contents.manifest.by_name[name] for name in names if name not in spare]
        if going or contents.journal.is_near:
            self._look_instead_of(going, sure)
        if contents.journal.is_near:
            self._claim_again()

    def before_replacing(self, name: str) -> bool:
        """Look at what is kept instead of the checkpoint of this name; return whether one is gone."""
        return self._look_instead_of([self._contents.manifest.by_name[name]])

    def before_declining(self, now: Observation) -> bool:
        """Look at what makes the rules decline the observation; return whether one is gone.

        If a look costs a request, there is at most one a minute, because each step may be declined.
        """
        contents = self._contents
        if not contents.journal.is_near and now.time < self._looked_s + LOOK_EVERY_S:
            return False
        self._looked_s = now.time
        with contextlib.suppress(OSError):
            return self._look_instead_of([contents.manifest.draft("", now)])
        return False

    def is_gone(self, record: Record) -> bool:
        """Return whether a checkpoint was deleted; False if the look would cost a request."""
        return self._contents.journal.is_near and self.any_gone([record])

    def _look_instead_of(self, going: Iterable[Record], sure: Record | None = None) -> bool:
        """Look at what is kept instead of others. If a look costs a request, look only at the best."""
        looks = [r for r in self.reasons.relied_on(going) if sure is None or r.token != sure.token]
        return self.any_gone(looks if self._contents.journal.is_near else looks[:1])

    def any_gone(self, records: Iterable[Record]) -> bool:
        """Return whether one of these records is gone; then look at all records."""
        if all(self.exists(record) for record in records):
            return False
        contents = self._contents
        files = contents.storage.list()
        sizes = Listing(entries={}, damaged={}, files=files).sizes
        doubtful = [
            record
            for record in contents.manifest.records
            if sizes.get(record.name) != record.size or record_path(record.name) not in files
        ]
        gone = [r for r in doubtful if not self.exists(r) or not contents.journal.has_record(r.name)]
        if gone:
            before, contents.manifest = contents.manifest, contents.manifest.without_payload(*gone, there=sizes)
            unrecorded = [record for record in gone if contents.journal.has_payload(record)]
            missing = [record for record in gone if record not in unrecorded]
            text = missing_text(contents.policy, before, contents.manifest, missing, unrecorded)
            warn(text)
        self._claim_again()
        return bool(gone)

    def exists(self, record: Record) -> bool:
        """Return whether a payload exists; where it costs no request, whether its record does, too."""
        if not self._contents.journal.has_payload(record):
            return False
        return not self._contents.journal.is_near or bool(self._contents.storage.list(record_path(record.name)))

    def _claim_again(self) -> None:
        """Write this writer's mark and its alias markers again, if they were deleted."""
        contents = self._contents
        storage, owner = contents.storage, contents.journal.owner
        if contents.is_prepared and not is_marked(storage, owner):
            with contextlib.suppress(StorageError):  # No save depends on it.
                mark(storage, owner)
        if contents.is_begun and not all(storage.list(marker_path(alias)) for alias in contents.policy.aliases):
            contents.aliases.forget()
            contents.settle_aliases(claims=True)
        contents.spare_aliases()


# The message


def few_names(records: Sequence[Record]) -> str:
    """Return the names of the first three records, and how many more there are."""
    return some_of([record.name for record in records], 3)


def missing_text(
    policy: Policy, before: Manifest, now: Manifest, missing: Sequence[Record], unrecorded: Sequence[Record] = ()
) -> str:
    """Return the message about checkpoints that do not count any more.

    The payload of the ``missing`` ones is gone or has another size; the record of the ``unrecorded`` ones was deleted.
    """
    texts = []
    if missing:
        are, have, their, do = _agreeing(missing)
        texts += [f"{few_names(missing)} {are} gone, or {have} another size than {their}, and {do} not count"]
    if unrecorded:
        _, have, _, do = _agreeing(unrecorded)
        texts += [f"{few_names(unrecorded)} {have} a payload but no record any more, and {do} not count"]
    tokens = {record.token for record in (*missing, *unrecorded)}
    pairs = {
        "newest": (before.newest, now.newest),
        "best": (policy.best_of(before.history), policy.best_of(now.history)),
    }
    for what, (was, is_now) in pairs.items():
        if was is not None and was.token in tokens:
            texts += [f"the {what} is {is_now.name} now, not {was.name}" if is_now else f"there is no {what} one now"]
    return "; ".join(texts)


def _agreeing(records: Sequence[Record]) -> tuple[str, str, str, str]:
    """Return the parts of a sentence that agree with the number of records."""
    return ("is", "has", "its record says", "does") if len(records) == 1 else ("are", "have", "their records say", "do")
