"""Opens a checkpoint of anybody's, wherever it lies: a managed directory, a file, a Hugging Face directory."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import attrs

from checkpointer import CheckpointManager, HMACKey, Policy, Record
from checkpointer.errors import CorruptError, NotFoundError, RestoreError
from checkpointer.formats import open_format
from checkpointer.index import HOME, RECORDS, read_bounded, record_path
from checkpointer.owner import new_owner, release
from checkpointer.ports import Storage
from checkpointer.restoring import verify
from checkpointer.storage import LocalStorage, open_storage

__all__ = ["Found", "is_place", "open_place", "own_name", "request_file"]

_WHOLE: Final = ("model.safetensors", "pytorch_model.bin")
"""Files of a Hugging Face directory with all weights, in the order in which it prefers them ..."""
_INDEXES: Final = tuple(f"{name}.index.json" for name in _WHOLE)
"""... and those that say in which files they lie."""
_WEIGHTS: Final = (".ckpt", ".pt", ".pth", ".bin", ".safetensors")


@attrs.frozen
class Found:
    """What a checkpoint holds."""

    state: Any
    where: str
    """The path or URL, for messages."""


@attrs.frozen(kw_only=True)
class _Opener:
    """How to open and read."""

    which: str | int | None
    policy: Policy | None
    trust: HMACKey | None
    storage_options: Mapping[str, Any] | None
    weights_only: bool

    def open(self, place: str) -> Found:
        is_folder, parent, name = _split(place)
        if is_folder is None:
            is_folder = bool(self._list(place))
        if is_folder:
            return self._open_folder(place)
        storage = self._storage(parent)
        try:
            if storage.list(record_path(name)):
                return self._restore(parent, name)
        except OSError as error:
            msg = f"{place} cannot be looked at: {error}"
            raise RestoreError(msg) from error
        return Found(self.read(storage, name, place), place)

    def _storage(self, place: str) -> Storage:
        owner = new_owner()
        try:
            return open_storage(place, owner, self.storage_options)
        finally:
            release(owner)

    def _list(self, place: str) -> Mapping[str, Any]:
        try:
            return self._storage(place).list()
        except NotADirectoryError:
            return {}

    def _open_folder(self, place: str) -> Found:
        storage = self._storage(place)
        if storage.list(RECORDS):
            return self._restore(place, self.which)
        return Found(self._read_folder(storage, "", place), place)

    def _restore(self, directory: str, which: str | int | None) -> Found:
        options = {"trust": self.trust, "storage_options": self.storage_options}
        manager = CheckpointManager(directory, self.policy, **options)  # type: ignore[arg-type]
        record = _record_of(manager, which)
        storage = self._storage(directory)
        if record is not None and _is_trainers_folder(storage, record):
            verify(storage, record)
            where = f"{directory}/{record.name}"
            return Found(self._read_folder(storage, f"{record.name}/", where), where)
        restored = manager.restore(which, contents="any", weights_only=self.weights_only)
        if restored is None:
            msg = f"{directory} has no checkpoint"
            raise NotFoundError(msg)
        return Found(restored.state, f"{directory}/{restored.record.name}")

    def _read_folder(self, storage: Storage, prefix: str, where: str) -> Any:
        names = {path.removeprefix(prefix) for path in storage.list(prefix.rstrip("/"))}
        for name, index in zip(_WHOLE, _INDEXES, strict=True):
            if name in names:
                return self.read(storage, prefix + name, f"{where}/{name}")
            if index in names:
                return self._read_shards(storage, prefix, index, where)
        told = ", ".join(sorted(name for name in names if not name.startswith(HOME))[:8]) or "nothing"
        msg = (
            f"{where} has no weights: neither checkpoints of this library nor {', '.join((*_WHOLE, *_INDEXES))}; "
            f"it has {told}"
        )
        raise NotFoundError(msg)

    def _read_shards(self, storage: Storage, prefix: str, index: str, where: str) -> dict[str, Any]:
        try:
            files = json.loads(read_bounded(storage, prefix + index))["weight_map"]
            names = {str(key): str(name) for key, name in files.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            msg = f"{where}/{index} is no index of shards: {error!r}"
            raise CorruptError(msg) from error
        state: dict[str, Any] = {}
        for name in sorted(set(names.values())):
            if "/" in name or name.startswith("."):
                msg = f"{where}/{index} names the shard {name!r}, which is not in its directory"
                raise CorruptError(msg)
            state.update(self.read(storage, prefix + name, f"{where}/{name}"))
        absent = [key for key in names if key not in state]
        if absent:
            msg = f"{where}/{index} names {absent[0]!r} and {len(absent) - 1} more that no shard has"
            raise CorruptError(msg)
        return state

    def read(self, storage: Storage, path: str, where: str) -> Any:
        payload = open_format("safetensors" if path.endswith(".safetensors") else "torch")
        try:
            with storage.open(path) as stream:
                return payload.read(stream, weights_only=self.weights_only, map_location="cpu")
        except FileNotFoundError as error:
            beside = ", ".join(_beside(storage, path)) or "no weights at all"
            msg = f"{where} is not there; beside it: {beside}"
            raise NotFoundError(msg) from error
        except RestoreError as error:
            msg = f"{where}: {error}"
            raise type(error)(msg) from error


def open_place(
    place: str | os.PathLike[str],
    which: str | int | None = None,
    *,
    policy: Policy | None = None,
    trust: HMACKey | None = None,
    storage_options: Mapping[str, Any] | None = None,
    weights_only: bool = True,
) -> Found:
    """Read the checkpoint at a path or URL: a file, a managed directory's ``which``, a Hugging Face directory.

    What has a record is verified.

    Raises:
        RestoreError: If there is none, or it cannot be read; the message says what is there.
    """
    opener = _Opener(
        which=which, policy=policy, trust=trust, storage_options=storage_options, weights_only=weights_only
    )
    return opener.open(os.fspath(place))


def is_place(which: Any) -> bool:
    """Return whether a path or URL is meant, and not a name: a path that is there, a ``Path``, or a URL."""
    if isinstance(which, os.PathLike):
        return True
    return isinstance(which, str) and ("://" in which or os.path.exists(os.path.expanduser(which)))


def own_name(place: str | os.PathLike[str], directory: Any) -> str | None:
    """Return the name that a path or URL has within a directory; None if it is not there."""
    if not isinstance(directory, (str, os.PathLike)):
        return None
    is_folder, parent, name = _split(os.fspath(place))
    return name if not is_folder and _absolute(parent) == _absolute(os.fspath(directory)) else None


def request_file(directory: Any) -> str | None:
    """Return the file that asks for a save; None where nobody can put one, or looking would take long."""
    if not isinstance(directory, LocalStorage):
        if not isinstance(directory, (str, os.PathLike)) or "://" in os.fspath(directory):
            return None
        directory = LocalStorage(directory, "")
    return str(directory.local_path(f"{HOME}/save-now"))


def _split(place: str) -> tuple[bool | None, str, str]:
    """Return whether it is a folder (None: that has to be asked), and its parent and name."""
    if "://" in place:
        parent, _, name = place.rstrip("/").rpartition("/")
        return None, parent, name
    path = Path(place).expanduser()
    if path.is_symlink() and not path.is_dir():
        path = path.parent / os.readlink(path)  # An alias: its record is that of what it names.
    return path.is_dir(), str(path.parent), path.name


def _absolute(place: str) -> str:
    return place.rstrip("/") if "://" in place else os.path.realpath(os.path.expanduser(place))


def _record_of(manager: CheckpointManager, which: str | int | None) -> Record | None:
    if which is None or which == "last":
        return manager.last
    if which == "best":
        return manager.best
    return next((record for record in reversed(manager.records) if which in (record.name, record.step)), None)


def _is_trainers_folder(storage: Storage, record: Record) -> bool:
    return record.format != "dcp" and set(storage.list(record.name)) - {record.name} != set()


def _beside(storage: Storage, path: str) -> Iterator[str]:
    folder = path.rpartition("/")[0]
    for name in sorted(storage.list(folder))[:200]:
        if name.endswith(_WEIGHTS) and not name.startswith(HOME):
            yield name
