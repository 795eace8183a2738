"""Turns a decision and a state into a payload and its record."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import attrs

from checkpointer.commit.directory import Directory
from checkpointer.commit.index import HOME
from checkpointer.errors import NameTakenError, NotEnoughSpaceError, SaveError
from checkpointer.policy.decide import Save
from checkpointer.ports import FolderFormat, Format, SupportsFreeSpace, SupportsPaths, SupportsURLs
from checkpointer.records.record import Record, check_readable

__all__ = ["FOLDER", "Writer"]

FOLDER: Final = "folder"
"""Format name of a payload that a trainer wrote as a folder."""


MAX_REASON: Final = 2000
"""Characters of a reason that are kept."""

MAX_PATHS: Final = 3
"""How many values of one class a warning names."""


@attrs.frozen
class Writer:
    """Writes payloads of one format, or lets a trainer write them."""

    directory: Directory
    format: Format | FolderFormat
    save: Callable[[str], None] | None
    """Writes a checkpoint to the path it is given, instead of ``format``."""

    def write(self, decision: Save, state: Any, path: str | os.PathLike[str] | None) -> Record:
        """Write ``state``, or let ``save`` write, or adopt what lies at ``path``; return the committed record."""
        draft = self._draft(decision)
        check_readable(draft)
        transaction = self.directory.transaction
        if path is not None:
            draft = self._adopted(draft, os.fspath(path))
            check_readable(draft)
            return transaction.adopt(draft)
        last = self._last_size()
        self._check_space(last)
        replaces = self.directory.manifest.by_name.get(decision.name) if decision.replaces else None
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
        if name in self.directory.manifest.by_name or name in self.directory.policy.aliases:
            msg = f"{path} is the name of a checkpoint or alias already; let the trainer write to an unused one"
            raise NameTakenError(msg)
        is_folder = set(storage.list(name)) != {name}
        return attrs.evolve(draft, name=name, format=FOLDER if is_folder else draft.format)

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


def _short(reason: str) -> str:
    """Return what a record keeps of a reason: a rescue's is the text of any exception, of any length."""
    text = reason.encode(errors="backslashreplace").decode()
    return text if len(text) <= MAX_REASON else text[: MAX_REASON - 3] + "..."
