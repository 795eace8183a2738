"""Carries decisions out in the order of the crash argument: payload and record, aliases, retirement, listeners."""

from __future__ import annotations

import os
import uuid
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any, Final, Literal

import attrs

from checkpointer._display import size_text, some_of
from checkpointer._secrets import Secrets
from checkpointer.commit.directory import Directory
from checkpointer.commit.index import HOME
from checkpointer.commit.transaction import Files, WritePath
from checkpointer.errors import (
    CheckpointerError,
    NameTakenError,
    NotEnoughSpaceError,
    SaveError,
    warn,
)
from checkpointer.policy.decide import Attach, Decision, Save, decide, decide_rescue
from checkpointer.ports import (
    FolderFormat,
    Format,
    Listener,
    SupportsFileDigests,
    SupportsFreeSpace,
    SupportsPaths,
    SupportsURLs,
    Writable,
)
from checkpointer.records.manifest import Manifest
from checkpointer.records.record import Record, check_readable

FOLDER: Final = "folder"
"""Format name of a payload that a trainer wrote as a folder."""
MAX_REASON: Final = 2000
"""Most characters of a reason in a record."""
MAX_PATHS: Final = 3
"""Most values of one class that a warning names."""
WriteState = Callable[[Any, Writable], None]
"""Writes a state to a stream: see `Format.write`."""


@attrs.frozen
class Saver:
    """The effects of a decision on one directory. The executor ensures that one thread at a time uses it."""

    directory: Directory
    format: Format | FolderFormat
    save: Callable[[str], None] | None
    """Writes a checkpoint to a path, instead of ``format``."""
    listeners: tuple[Listener, ...]
    on_change: Callable[[Manifest], None] | None
    """Called with the records after each change, as for a mirror; must return at once."""

    def adopt(self, decision: Save, path: str | os.PathLike[str]) -> Record:
        """Write the record of what a trainer has written to ``path``, and return it."""
        self.directory.begin()
        draft = self._adopted(self._draft(decision), os.fspath(path))
        check_readable(draft)
        return self.directory.transaction.adopt(draft, replaces=self._rescued(draft))

    def write(self, decision: Save, state: Any, *, by: WriteState | None = None) -> Record:
        """Write a payload and its record (steps 1 to 5 of `checkpointer.commit.transaction`); return the record.

        The payload is ``state``, or what ``save`` writes. ``by`` writes the state in place of the format's own
        ``write``.
        """
        directory = self.directory
        directory.begin()
        transaction = directory.transaction
        decision = self._with_free_name(decision)
        draft = self._draft(decision)
        check_readable(draft)
        last_size = self._last_size()
        self._check_space(last_size)
        there = directory.manifest.by_name.get if decision.replaces else directory.names.lost
        replaces = there(decision.name)
        over_file = self._yields(decision)
        over_alias = decision.name in directory.policy.aliases or over_file
        write = self._write_path(state)
        if write is not None:
            if not isinstance(directory.storage, SupportsPaths):
                return self._write_by_url(draft, write)
            taken = {*directory.manifest.taken, *directory.policy.aliases, decision.name} if over_file else None
            own_name = partial(directory.names.own, draft, taken)
            return transaction.commit_path(draft, write, replaces=replaces, over_alias=over_alias, own_name=own_name)
        payload = self.format
        assert not isinstance(payload, FolderFormat), "_write_path handles it"
        commit = partial(
            transaction.commit,
            draft,
            partial(by or payload.write, state),
            replaces=replaces,
            over_alias=over_alias,
            expected=last_size,
        )
        try:
            return commit()
        except FileNotFoundError:
            # The directory or the staged file was removed during the write: by a process that has taken over the run,
            # or by another program. Then the second try makes it again.
            directory.journal.check_term()
            return commit()
        except NameTakenError:
            # Another writer has taken the name since it was looked for.
            again = attrs.evolve(decision, replaces=False)
            if decision.replaces or over_alias or directory.names.is_free(decision.name):
                raise
            return self.write(again, state, by=by)

    def _with_free_name(self, decision: Save) -> Save:
        """Return the decision under a name that no other writer has taken since the directory was listed."""
        directory, aliases = self.directory, self.directory.policy.aliases
        if decision.name in aliases and directory.contents.spare_aliases():
            decision, aliases = self._decide_again(decision), directory.policy.aliases
        if decision.replaces and decision.name not in aliases and self._is_lost(decision.name):
            decision = self._decide_again(decision)
        while not (decision.replaces or decision.name in aliases or self._yields(decision)):
            if directory.names.is_free(decision.name):
                break
            decision = self._decide_again(decision)
        return decision

    def _yields(self, decision: Save) -> bool:
        """Return whether a file without a record has the decided name, and may be replaced; a rescue replaces none."""
        return decision.kind == "regular" and self.directory.names.yields(decision.name)

    def _is_lost(self, name: str) -> bool:
        """Return whether the checkpoint that is to be replaced is gone."""
        directory = self.directory
        if name not in directory.manifest.by_name:  # With background= it may have been lost since the decision.
            return True
        return directory.policy.name.version_counter and directory.looks.before_replacing(name)

    def _decide_again(self, decision: Save) -> Save:
        """Return the decision with the name that follows from the records as they are now."""
        directory, now = self.directory, decision.observation
        again: Decision
        if decision.kind == "rescue":
            again = decide_rescue(directory.policy, now, directory.manifest, decision.reason)
        else:
            again = decide(directory.policy, now, directory.manifest, owed=decision.reason)
        if not isinstance(again, Save):  # A rule of the user may decide otherwise now.
            return attrs.evolve(decision, name=directory.names.own(directory.manifest.draft("", now)), replaces=False)
        return attrs.evolve(decision, name=again.name, replaces=again.replaces)

    def _write_path(self, state: Any) -> WritePath | None:
        """Return a function that writes to a path, from the trainer or a folder format; None for a file format."""
        payload = self.format
        if self.save is None:
            self._warn_of_refused(state)
            if isinstance(payload, SupportsFileDigests):
                return partial(payload.write_digested, state, algorithm=self.directory.journal.algorithm)
            if not isinstance(payload, FolderFormat):
                return None
        write = self.save or partial(payload.write_folder, state)  # type: ignore[union-attr]

        def write_undigested(path: str) -> None:
            write(path)  # A trainer's function may return anything.

        return write_undigested

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
        """Return the rescue of the draft's name and step, because a regular checkpoint may replace it."""
        taken = self.directory.manifest.by_name.get(draft.name)
        if taken is None or (taken.kind, draft.kind) != ("rescue", "regular"):
            return None
        return taken if (taken.run, taken.step) == (draft.run, draft.step) else None

    def _write_by_url(self, draft: Record, write: WritePath) -> Record:
        """Let the trainer write to a URL with an unused name, never over an alias or another checkpoint."""
        storage = self.directory.storage
        if not isinstance(storage, SupportsURLs):
            what = "save=" if self.save is not None else f"format={self.format.name!r}"
            msg = f"{what} needs a directory with paths or URLs, and {storage} has neither"
            raise SaveError(msg)
        name = self.directory.names.free(draft)

        def write_there() -> Files | None:
            with Secrets(storage.url(""), {}).hidden():  # The trainer's own errors may repeat the URL.
                return write(storage.url(name))

        return self.directory.transaction.commit_named(attrs.evolve(draft, name=name), write_there)

    def _last_size(self) -> int | None:
        """Return the size (bytes) of the last checkpoint with the same contents, as an estimate for the next one."""
        contents = self.directory.policy.contents
        return next((r.size for r in reversed(self.directory.manifest.own) if r.contents == contents), None)

    def _check_space(self, last_size: int | None) -> None:
        storage = self.directory.storage
        free = storage.free_space() if isinstance(storage, SupportsFreeSpace) else None
        if last_size is not None and free is not None and free < last_size:
            msg = (
                f"{storage} has {size_text(free)} free, and the last checkpoint took {size_text(last_size)}; nothing "
                "was written. Free some space, or keep fewer checkpoints"
            )
            raise NotEnoughSpaceError(msg)

    def _warn_of_refused(self, state: Any) -> None:
        paths = defaultdict(list)
        for path, kind in self.format.refused(state).items():
            paths[kind].append(path)
        for kind, places in paths.items():
            are = "are" if len(places) > 1 else "is a"
            msg = (
                f"{some_of(places, MAX_PATHS)} {are} {kind}, which a safe load refuses: restore() will need "
                "weights_only=False, or torch.serialization.add_safe_globals. Save tensors, numbers, text and "
                "containers of them instead"
            )
            self.directory.contents.warn_once(f"refused {kind}", msg)

    def finish(self, record: Record) -> tuple[str, ...]:
        """Take steps 6 to 9, which follow the commit, and return the names of the retired checkpoints."""
        self.directory.add(record)
        is_sure = self._look(record)
        is_regular = record.kind == "regular"
        points = is_regular or self._move_slot(record)
        retired = self._conclude(points=points, retires=is_regular and is_sure)
        self.changed()
        self.notify("on_saved", record)
        return retired

    def _move_slot(self, rescue: Record) -> bool:
        """Before ``last`` names a rescue, give a regular checkpoint that has no name but the alias its own name."""
        directory = self.directory
        slot = directory.manifest.by_name.get(directory.policy.name.last_file) if directory.policy.last else None
        try:
            if slot is not None:
                directory.names.move_slot(slot)
        except (OSError, CheckpointerError) as error:
            msg = f"{slot} keeps the alias {directory.policy.name.last_file} ({error}); {rescue.name} itself is saved"
            warn(msg)
            return False
        return True

    def attach(self, decision: Attach) -> None:
        """Add new metrics to the record of a saved step. If its save has failed meanwhile, do nothing."""
        directory = self.directory
        directory.begin()
        record = directory.manifest.by_name.get(decision.name) or directory.manifest.at_step(decision.observation.step)
        if record is not None and directory.looks.is_gone(record):
            record = None
        if record is not None and record.name in directory.policy.aliases:
            # The next save overwrites a slot. With its new metrics a rule may keep it, so it gets its own name.
            record = directory.names.move_slot(record)
        if record is None:
            return
        record = record.attached(decision.observation)
        directory.rewrite(record)
        self._conclude(retires=self._look())
        self.changed()
        self.notify("on_attached", record)

    def _look(self, sure: Record | None = None) -> bool:
        """Set aside what is gone; return whether the storage has answered, so that checkpoints may be retired."""
        try:
            self.directory.looks.before_retiring(sure=sure)
        except OSError as error:
            msg = (
                f"no old checkpoint is removed, because the kept ones could not be checked ({error}); "
                "the next save tries again"
            )
            warn(msg)
            return False
        return True

    def changed(self) -> None:
        """Call ``on_change`` with the records as they are now."""
        if self.on_change is not None:
            self.on_change(self.directory.manifest)

    def _conclude(self, *, points: bool = True, retires: bool) -> tuple[str, ...]:
        retired = self.directory.conclude(points=points, retires=retires)
        for record in retired:
            self.notify("on_retired", record)
        return tuple(record.name for record in retired)

    def notify(self, event: Literal["on_opened", "on_saved", "on_attached", "on_retired"], what: Any) -> None:
        """Call the listeners (step 9). An error of a listener does not end the training."""
        for listener in self.listeners:
            try:
                getattr(listener, event, lambda _: None)(what)
            except Exception as error:
                on = f" on {what.name}" if isinstance(what, Record) else ""
                msg = f"{type(listener).__name__}.{event} failed{on}: {error!r}; the checkpoint is fine"
                warn(msg)


def _short(reason: str) -> str:
    """Shorten a reason for the record, because the reason of a rescue is the text of an exception."""
    text = reason.encode(errors="backslashreplace").decode()
    return text if len(text) <= MAX_REASON else text[: MAX_REASON - 3] + "..."
