"""Opens any checkpoint at a path or URL: a managed directory, a file, a Hugging Face directory."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final

import attrs

from checkpointer import CheckpointManager, HMACKey, Policy, Record
from checkpointer._display import some_of
from checkpointer._secrets import Secrets, shown_place
from checkpointer.commit.index import HOME, RECORDS, directories_below, record_path
from checkpointer.errors import CorruptError, NotFoundError, RestoreError, UnsafePayloadError, reading
from checkpointer.formats import format_of, open_format
from checkpointer.formats.inspection.find_weights import weights_of
from checkpointer.formats.inspection.memory_state import StateContents
from checkpointer.formats.inspection.payload import DCP, INDEX, MAX_JSON_BYTES, open_contents, open_files, open_stream
from checkpointer.formats.inspection.tensors import Tensors
from checkpointer.formats.inspection.torch_file import TorchContents
from checkpointer.formats.torch_file import TorchFormat
from checkpointer.ports import Storage
from checkpointer.restore.verified import open_verified
from checkpointer.storage import open_storage
from checkpointer.storage.owner import temporary_owner

_WEIGHTS: Final = (".ckpt", ".pt", ".pth", ".bin", ".safetensors")
_log: Final = logging.getLogger("checkpointer.torch")


@attrs.frozen
class _InspectingFormat(TorchFormat):
    """Returns what a function makes of a payload's contents, without unpickling."""

    make: Callable[[Tensors], Any]

    def read(self, stream: BinaryIO, *, weights_only: bool, map_location: Any) -> Any:
        return _Made(self.make(open_stream(stream, "the payload")))


@attrs.frozen
class _Made:
    value: Any


@attrs.frozen(kw_only=True)
class Opener:
    """Opens any checkpoint: a file, a managed directory's newest, a Hugging Face directory."""

    which: str | int | None = None
    policy: Policy | None = None
    run: str | None = None
    trust: HMACKey | None = None
    storage_options: Mapping[str, Any] | None = None
    weights_only: bool = True
    make: Callable[[Tensors], Any] | None = None
    """Makes the result from the contents of a payload; None: the state, as it was saved."""
    of_folder: Callable[[Storage, str], Any] | None = None
    """Makes the result from a folder of files in a storage; None: as from any payload, or its weights."""

    def open(self, path: str | os.PathLike[str]) -> tuple[Any, str]:
        """Return the result, and the path or URL of the checkpoint as it may be shown.

        A checkpoint that has a record is verified. If nothing can be read, the `RestoreError` lists what exists.
        """
        place = os.fspath(path)
        with Secrets(place, self.storage_options or {}).hidden():
            result, source = self._open(place)
        return result, shown_place(source)

    def record_of(self, path: str | os.PathLike[str]) -> Record | None:
        """Return the record of the checkpoint that `open` reads; None if it has none. Its payload is not read."""
        place = os.fspath(path)
        with Secrets(place, self.storage_options or {}).hidden():
            is_folder, parent, name = self._split(place)
            managed = self._managed(place, is_folder, parent, name)
            return None if managed is None else _found(self._manager(managed[0]), managed[1])

    def _open(self, place: str) -> tuple[Any, str]:
        is_folder, parent, name = self._split(place)
        managed = self._managed(place, is_folder, parent, name)
        if managed is not None:
            return self._restore(*managed)
        return self._open_folder(place) if is_folder else (self._read(self._storage(parent), name, place), place)

    def _split(self, place: str) -> tuple[bool, str, str]:
        is_folder, parent, name = _split(place)
        return self._is_folder(place) if is_folder is None else is_folder, parent, name

    def _managed(self, place: str, is_folder: bool, parent: str, name: str) -> tuple[str, str | int | None] | None:
        """Return the managed directory that is meant and which checkpoint of it; None for files without a record."""
        try:
            if self._storage(parent).list(record_path(name)):
                return parent, name
        except OSError as error:
            if not is_folder:
                msg = f"{place} cannot be looked at: {error}"
                raise RestoreError(msg) from error
        return (place, self.which) if is_folder and self._storage(place).list(RECORDS) else None

    def _storage(self, place: str) -> Storage:
        with temporary_owner() as owner:
            return open_storage(place, owner, self.storage_options)

    def _is_folder(self, url: str) -> bool:
        try:
            return bool(self._storage(url).list())
        except NotADirectoryError:
            return False

    def _open_folder(self, place: str) -> tuple[Any, str]:
        storage = self._storage(place)
        names = [path for path in storage.list() if "/" not in path]
        with open_contents(storage, "") if DCP in names else open_files(storage, "", names) as contents:
            if contents.parts:
                return self._made(contents, storage, ""), place
        if below := directories_below(storage.list(), RECORDS):
            msg = (
                f"{place} has no checkpoint of its own, and these directories below have: {some_of(below)}; name one "
                "of them"
            )
            raise NotFoundError(msg)
        there = ", ".join(sorted(names)[:8]) or "no file"
        msg = (
            f"{place} has no weights: neither checkpoints of this library nor a file of weights, such as "
            f"model.safetensors or pytorch_model.bin; it has {there}"
        )
        raise NotFoundError(msg)

    def _made(self, contents: Tensors, storage: Storage, folder: str) -> Any:
        is_dcp = bool(storage.list(f"{folder}/{DCP}".lstrip("/")))
        return (
            (self.make or _weights)(contents) if self.of_folder is None or is_dcp else self.of_folder(storage, folder)
        )

    def _manager(self, directory: str) -> CheckpointManager:
        options: dict[str, Any] = {"trust": self.trust, "storage_options": self.storage_options, "run": self.run}
        if self.make is not None:
            options["format"] = _InspectingFormat(self.make)
        return CheckpointManager(directory, self.policy, **options)

    def _restore(self, directory: str, which: str | int | None) -> tuple[Any, str]:
        manager = self._manager(directory)
        record, storage = _found(manager, which), self._storage(directory)
        # A folder that a trainer wrote is not read by a format.
        if record is not None and record.format != "dcp" and set(storage.list(record.name)) - {record.name}:
            with open_verified(storage, record) as contents:
                return self._made(contents, storage, record.name), f"{directory}/{record.name}"
        restored = manager.restore(which, contents="any", weights_only=self.weights_only)
        if restored is None:
            msg = f"{directory} has no checkpoint{f' of run {self.run!r}' if self.run else ''}"
            raise NotFoundError(msg)
        state = restored.state
        if isinstance(state, _Made):
            state = state.value
        elif self.make is not None:
            state = self.make(StateContents(state))
        return state, f"{directory}/{restored.record.name}"

    def _read(self, storage: Storage, path: str, where: str) -> Any:
        try:
            with storage.open(path) as stream:
                if self.make is not None:
                    return self.make(open_stream(stream, where))
                payload = format_of(stream, open_format("torch"))
                return payload.read(stream, weights_only=self.weights_only, map_location="cpu")
        except FileNotFoundError as error:
            folder = path.rpartition("/")[0]
            beside = [name for name in sorted(storage.list(folder))[:200] if name.endswith(_WEIGHTS)]
            there = [name for name in beside if not name.startswith(HOME)]
            msg = f"{where} is not there; beside it: {some_of(there) if there else 'no weights at all'}"
            raise NotFoundError(msg) from error
        except RestoreError as error:
            if self.make is not None:  # The message names the file already.
                raise
            msg = f"{where}: {error}"
            raise type(error)(msg) from error


def _found(manager: CheckpointManager, which: str | int | None) -> Record | None:
    """Return the record that a restore would try first; None if there is none. Then a restore says why."""
    with contextlib.suppress(NotFoundError):
        return manager.session.find(which)
    return None


def open_foreign(place: str | os.PathLike[str], *, weights_only: bool = True) -> tuple[Any, str]:
    """Read another program's checkpoint as a safe load does, or without unpickling if that refuses it.

    In the second case an object that only unpickling would make is an `Unread`. A folder is a mapping of its files.
    """
    opener = Opener(of_folder=FolderFiles.of, weights_only=weights_only)
    if not weights_only:
        return opener.open(place)
    try:
        return opener.open(place)
    except (UnsafePayloadError, CorruptError) as error:
        try:
            return Opener(make=_whole).open(place)
        except CorruptError:
            raise error from None


@attrs.frozen
class FolderFiles(Mapping[str, Any]):
    """The content of a folder's files by their names. Each is read when it is asked for, and nothing is unpickled."""

    _storage: Storage
    _folder: str
    _names: tuple[str, ...]

    @classmethod
    def of(cls, storage: Storage, folder: str) -> FolderFiles:
        """Return the files of a folder in a storage; shards count as the one file that their index is of."""
        prefix = f"{folder}/" if folder else ""
        files = sorted(path.removeprefix(prefix) for path in storage.list(folder))
        joined = [name.removesuffix(INDEX) for name in files if name.endswith(INDEX)]
        return cls(storage, folder, tuple(name for name in (*files, *joined) if not name.startswith(HOME)))

    def __getitem__(self, name: str) -> Any:
        if name not in self._names:
            raise KeyError(name)
        path = f"{self._folder}/{name}".lstrip("/")
        if name.endswith(".json"):
            with reading(path), self._storage.open(path) as stream:
                return json.loads(stream.read(MAX_JSON_BYTES))
        if name.endswith(".safetensors") or f"{name}{INDEX}" in self._names:
            # The files beside it say how shards are joined, and which weights are tied.
            beside = path.removesuffix(name.rpartition("/")[2])
            files = [file for file in self._storage.list(beside.rstrip("/")) if "/" not in file.removeprefix(beside)]
            with open_files(self._storage, self._folder, files) as contents:
                return _weights(contents, name)
        with open_contents(self._storage, path) as contents:
            return _whole(contents)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _weights(contents: Tensors, part: str | None = None) -> dict[str, Any]:
    found = weights_of(contents, part)
    return {name: found.read(name) for name in found.tensors}


def _whole(contents: Tensors) -> Any:
    if not isinstance(contents, TorchContents):
        return _weights(contents)
    if contents.calls:
        _log.info("not unpickled: %s", some_of(contents.calls))
    return contents.state()


def is_place(which: Any) -> bool:
    """Return whether a path or URL is meant, and not a name: a path that exists, a ``Path``, or a URL."""
    if isinstance(which, os.PathLike):
        return True
    return isinstance(which, str) and ("://" in which or os.path.exists(os.path.expanduser(which)))


def own_name(place: str | os.PathLike[str], directory: Any) -> str | None:
    """Return the name that a path or URL has within a directory; None if it is elsewhere."""
    if not isinstance(directory, (str, os.PathLike)):
        return None
    is_folder, parent, name = _split(os.fspath(place))
    is_checkpoint = not is_folder or os.path.isfile(os.path.join(parent, record_path(name)))
    return name if is_checkpoint and _absolute(parent) == _absolute(os.fspath(directory)) else None


def _split(place: str) -> tuple[bool | None, str, str]:
    """Return whether it is a folder (None: only the storage knows), and its parent and name."""
    if "://" in place:
        parent, _, name = place.rstrip("/").rpartition("/")
        return None, parent, name
    path = Path(place).expanduser()
    if path.is_symlink() and not path.is_dir():
        path = path.parent / os.readlink(path)  # An alias: the record is that of its target.
    return path.is_dir(), str(path.parent), path.name


def _absolute(place: str) -> str:
    return place.rstrip("/") if "://" in place else os.path.realpath(os.path.expanduser(place))
