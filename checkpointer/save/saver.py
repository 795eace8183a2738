"""Carries decisions out, in the order of the crash argument: payload and record, aliases, retirement, listeners."""

from __future__ import annotations

import os
import uuid
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, Final, Literal

import attrs

from checkpointer.commit.directory import Directory
from checkpointer.commit.index import HOME
from checkpointer.errors import (
    CheckpointerError,
    CheckpointerWarning,
    NameTakenError,
    NotEnoughSpaceError,
    SaveError,
)
from checkpointer.policy.decide import Attach, Decision, Save, decide, decide_rescue
from checkpointer.ports import FolderFormat, Format, Listener, SupportsFreeSpace, SupportsPaths, SupportsURLs
from checkpointer.records.manifest import Manifest
from checkpointer.records.record import Record, check_readable

__all__ = ["FOLDER", "Saver"]

FOLDER: Final = "folder"
"""Format name of a payload that a trainer wrote as a folder."""

MAX_REASON: Final = 2000
"""Characters of a reason that are kept."""

MAX_PATHS: Final = 3
"""How many values of one class a warning names."""


@attrs.frozen
class Saver:
    """The effects of a decision on one directory. One thread at a time may use it: the executor ensures that."""

    directory: Directory
    format: Format | FolderFormat
    save: Callable[[str], None] | None
    """Writes a checkpoint to the path it is given, instead of ``format``."""
    listeners: tuple[Listener, ...]
    on_change: Callable[[Manifest], None] | None
    """Called with the records after each change, as for a mirror; must return at once."""

    def write(self, decision: Save, state: Any, path: str | os.PathLike[str] | None) -> Record:
        """Write a payload and its record (steps 1 to 5 of `checkpointer.commit.transaction`); return the record.

        The payload is ``state``, or what ``save`` writes, or what a trainer has written to ``path``.
        """
        self.directory.begin()
        decision = decision if path is not None else self._with_free_name(decision)
        draft = self._draft(decision)
        check_readable(draft)
        transaction = self.directory.transaction
        if path is not None:
            draft = self._adopted(draft, os.fspath(path))
            check_readable(draft)
            return transaction.adopt(draft, replaces=self._rescued(draft))
        last = self._last_size()
        self._check_space(last)
        there = self.directory.manifest.by_name.get if decision.replaces else self.directory.lost
        replaces = there(decision.name)
        over_alias = decision.name in self.directory.policy.aliases
        write = self._write_path(state)
        if write is not None:
            if not isinstance(self.directory.storage, SupportsPaths):
                return self._write_by_url(draft, write)
            return transaction.commit_path(
                draft,
                write,
                replaces=replaces,
                over_alias=over_alias,
                own_name=lambda: self.directory.own_name(draft),
            )
        payload = self.format
        assert not isinstance(payload, FolderFormat), "it is no folder"
        commit = partial(
            transaction.commit,
            draft,
            lambda stream: payload.write(state, stream),
            replaces=replaces,
            over_alias=over_alias,
            expected=last,
        )
        try:
            return commit()
        except FileNotFoundError:
            # The directory or the staged file was removed during the write. The second try makes it anew.
            return commit()

    def _with_free_name(self, decision: Save) -> Save:
        """Return the decision under a name that nobody has taken since the directory was listed."""
        directory = self.directory
        if decision.name in directory.policy.aliases and directory.spare_aliases():
            decision = self._again(decision)
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

    def _write_path(self, state: Any) -> Callable[[str], None] | None:
        """Return what writes to a path, be it the trainer or a format of folders; None for a format of files."""
        if self.save is not None:
            return self.save
        self._warn_of_refused(state)
        payload = self.format
        return (lambda path: payload.write_folder(state, path)) if isinstance(payload, FolderFormat) else None

    def _draft(self, decision: Save) -> Record:
        return self.directory.manifest.draft(
            decision.name,
            decision.observation,
            format=self.format.name,
            contents=self.directory.policy.contents,
            kind=decision.kind,
            reason=_short(decision.reason),
            token=uuid.uuid4().hex,
        )

    def _adopted(self, draft: Record, path: str) -> Record:
        storage = self.directory.storage
        name = path
        if isinstance(storage, SupportsPaths):
            name = os.path.relpath(path, storage.local_path("")).replace(os.sep, "/")
        elif isinstance(storage, SupportsURLs):
            name = path.removeprefix(storage.url(""))
        if name.startswith(("..", "/", HOME)) or name == ".":
            msg = f"{path} is not in {storage}; let the trainer write inside the manager's directory"
            raise SaveError(msg)
        draft = attrs.evolve(draft, name=name)
        is_taken = name in self.directory.manifest.by_name and self._rescued(draft) is None
        if is_taken or name in self.directory.policy.aliases:
            msg = f"{path} is the name of a checkpoint or alias already; let the trainer write to an unused one"
            raise NameTakenError(msg)
        is_folder = set(storage.list(name)) != {name}
        return attrs.evolve(draft, format=FOLDER if is_folder else draft.format)

    def _rescued(self, draft: Record) -> Record | None:
        """Return the rescue that has the draft's name and is of the same step: a regular checkpoint replaces it."""
        taken = self.directory.manifest.by_name.get(draft.name)
        if taken is None or (taken.kind, draft.kind) != ("rescue", "regular"):
            return None
        return taken if (taken.run, taken.step) == (draft.run, draft.step) else None

    def _write_by_url(self, draft: Record, write: Callable[[str], None]) -> Record:
        """Let what writes to a path write to a name that nobody has: never over an alias or another checkpoint."""
        storage = self.directory.storage
        if not isinstance(storage, SupportsURLs):
            what = "save=" if self.save is not None else f"format={self.format.name!r}"
            msg = f"{what} needs a directory with paths or URLs, and {storage} has neither"
            raise SaveError(msg)
        name = self.directory.free_name(draft)
        return self.directory.transaction.commit_named(attrs.evolve(draft, name=name), lambda: write(storage.url(name)))

    def _last_size(self) -> int | None:
        """Return the size (bytes) of the last checkpoint with the same contents: the next one has about as many."""
        contents = self.directory.policy.contents
        return next((r.size for r in reversed(self.directory.manifest.own) if r.contents == contents), None)

    def _check_space(self, last: int | None) -> None:
        storage = self.directory.storage
        free = storage.free_space() if isinstance(storage, SupportsFreeSpace) else None
        if last is not None and free is not None and free < last:
            msg = (
                f"{storage} has {free} bytes free, and the last checkpoint took {last}; nothing was written. "
                "Free some space, or keep fewer checkpoints"
            )
            raise NotEnoughSpaceError(msg)

    def _warn_of_refused(self, state: Any) -> None:
        paths: dict[str, list[str]] = {}
        for path, kind in self.format.refused(state).items():
            paths.setdefault(kind, []).append(path)
        for kind, places in paths.items():
            more = f" and {len(places) - MAX_PATHS} more" if len(places) > MAX_PATHS else ""
            are = "are" if len(places) > 1 else "is a"
            msg = (
                f"{', '.join(places[:MAX_PATHS])}{more} {are} {kind}, which a safe load refuses: restore() will need "
                "weights_only=False, or torch.serialization.add_safe_globals. Save tensors, numbers, text and "
                "containers of them instead"
            )
            self.directory.say_once(f"refused {kind}", msg)

    def finish(self, record: Record) -> tuple[str, ...]:
        """Do what comes after the commit (steps 6 to 8), and return the names of what was retired."""
        self.directory.add(record)
        retired: tuple[str, ...] = ()
        is_sure = self._look(record)
        if record.kind == "regular":
            self.directory.point_aliases()
            retired = self._retire() if is_sure else ()
        else:
            self._point_to_rescue(record)
        self.changed()
        self.tell("on_saved", record)
        return retired

    def _point_to_rescue(self, rescue: Record) -> None:
        """Let ``last`` name a rescue. A regular checkpoint that has no name but the alias gets its own name first."""
        directory = self.directory
        slot = directory.manifest.by_name.get(directory.policy.name.last_file) if directory.policy.last else None
        try:
            if slot is not None:
                directory.move_slot(slot)
        except (OSError, CheckpointerError) as error:
            msg = f"{slot} keeps the alias {directory.policy.name.last_file} ({error}); {rescue.name} itself is saved"
            warnings.warn(msg, CheckpointerWarning, stacklevel=4)
            return
        directory.point_aliases()

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


def _short(reason: str) -> str:
    """Return what a record keeps of a reason: a rescue's is the text of any exception, of any length."""
    text = reason.encode(errors="backslashreplace").decode()
    return text if len(text) <= MAX_REASON else text[: MAX_REASON - 3] + "..."
