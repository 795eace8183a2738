"""The DCP folder: what ``torch.distributed.checkpoint`` writes and reads, each process its own shards."""

from __future__ import annotations

import contextlib
import functools
import io
import math
import os
import pickle
import socket
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO, Final, Protocol, cast, runtime_checkable

import attrs
import torch
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter
from torch.distributed.checkpoint._nested_dict import flatten_state_dict, set_element  # type: ignore[attr-defined]
from torch.distributed.checkpoint._traverse import traverse_state_dict
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.stateful import Stateful
from torch.utils._pytree import tree_map

from checkpointer.errors import (
    CheckpointerError,
    CorruptError,
    NamingError,
    RestoreError,
    SaveError,
    UnsafePayloadError,
    portable,
)
from checkpointer.formats.dcp_digests import Check, DigestingWriter, VerifyingReader
from checkpointer.formats.dtypes import holds
from checkpointer.formats.pickler import by_value, check_summed, check_whole, refuse_shards_in
from checkpointer.formats.snapshot import Snapshots
from checkpointer.formats.stored import check_stored
from checkpointer.formats.torch_file import TorchFormat
from checkpointer.ports import Snapshotting, Taken
from checkpointer.records.names import check_name

_PRIMITIVES: Final = (str, bytes, int, float, complex, type(None))

_WITHIN_A_VALUE: Final = (
    "hold parts of, and torch.distributed.checkpoint writes the value around it whole, from one process: it looks for "
    "tensors in dicts and lists alone, so put the tensor into one"
)

_STORAGE_ONLY: Final = ("retry",)
"""Options that are the storage's own, not fsspec's."""

_ALGORITHM: Final = "xxh3-128"
"""The digest of shards if no record says which one it needs."""

MAX_LIST: Final = 1_000_000
MAX_PROBLEMS: Final = 10
_STEPS: Final = {
    *("set_up_storage_writer", "set_up_planner", "create_local_plan", "prepare_local_plan", "write_data", "finish"),
    *("read_metadata", "read_data"),
}
"""Methods that DCP calls on a rank while the others wait."""

_METADATA_GLOBALS: Final = {
    ("torch", "Size"): torch.Size,
    **{
        (module, name): (lambda *parts: "/".join(parts))
        for module in ("pathlib", "pathlib._local")  # The latter is Python 3.13's.
        for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
    },
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _StorageInfo,
    **{
        ("torch.distributed.checkpoint.metadata", name): getattr(dcp_metadata, name)
        for name in (*dcp_metadata.__all__, "_MEM_FORMAT_ENCODING")
    },
}
"""All that DCP's own metadata names."""


@attrs.frozen
class FolderContents:
    """What a folder holds, before its tensors are read."""

    tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    """The shape and the dtype of each tensor, by name."""
    value: Callable[[str], Any]
    """Reads one value that is not a tensor, by name, without communication."""
    whole: Callable[[], dict[str, Any]]
    """Returns a template of whole tensors for all that the folder holds."""


@runtime_checkable
class Target(Protocol):
    """A template that depends on what a folder holds. All ranks read, each what its target wants."""

    def wanted(self, folder: FolderContents) -> dict[str, Any]:
        """Return the tensors to read into, under names of the folder; not all names have to be there."""
        ...

    def result(self, state: dict[str, Any]) -> Any:
        """Return what a load returns, from what `wanted` returned, which is filled now."""
        ...


class DcpFormat:
    """Writes and reads DCP folders; ``torch.distributed.checkpoint`` itself reads them without this library.

    Args:
        group: The process group whose ranks write and read together; None for this process alone.
        template: Returns the state to load into, sharded as the training wants it now, or a `Target`; None makes whole
            tensors.
        storage_options: What fsspec needs besides a URL.

    Example:
        >>> import tempfile, torch
        >>> folder = tempfile.mkdtemp() + "/step=1.dcp"
        >>> DcpFormat().write_folder({"w": torch.ones(2)}, folder)
        >>> DcpFormat().read_folder(folder, weights_only=True, map_location="cpu")
        {'w': tensor([1., 1.])}
    """

    name = "dcp"
    extension = ".dcp"

    def __init__(
        self,
        group: Any = None,
        template: Callable[[], Any] | None = None,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        self._group = group
        self._template = template
        self._options = {key: value for key, value in (storage_options or {}).items() if key not in _STORAGE_ONLY}
        if group is None:
            # `no_dist` says already that it is alone. Not around each call, because filters are not a thread's own.
            warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")

    def write_folder(self, state: Any, path: str) -> None:
        """See `FolderFormat.write_folder`.

        Raises:
            SaveError: If the state is not a dict, the storage of a tensor was freed or cut, the process group is gone,
                or without one a tensor is a shard; or if a rank does not see the folder that the first rank has made.
        """
        self.write_digested(state, path, algorithm=_ALGORITHM)

    def write_digested(self, state: Any, path: str, *, algorithm: str) -> Mapping[str, tuple[int, str]]:
        """See `SupportsFileDigests.write_digested`. Only the first rank gets the digests of all files."""
        writer = _UrlWriter(path, **self._options) if "://" in path else _Writer(path)
        writer.digest_by(algorithm)
        plain: dict[str, Any] = {}
        error: Exception | None = None
        try:
            plain = tree_map(lambda leaf: by_value(leaf, takes_shards=True), self._checked(state))
        except Exception as failure:  # Within DCP's own steps, which send it to the other ranks.
            error = failure
        with _as_they_are(SaveError):
            save(plain, storage_writer=writer, planner=_SavePlanner(error), **self._who(SaveError))
            self._who(SaveError)  # It may have been alone: the groups are destroyed in another thread.
        return writer.files

    def snapshots(self, copies: int) -> Snapshotting:
        """See `SupportsSnapshots.snapshots`: ``state_dict`` of stateful objects is called in the loop."""
        return _PlainSnapshots(Snapshots(copies, takes_shards=self._group is not None), self._checked)

    def read_folder(self, path: str, *, weights_only: bool, map_location: Any) -> Any:
        """See `FolderFormat.read_folder`; with a template ``map_location`` is ignored.

        Raises:
            RestoreError: If the template lacks what the folder has, or the other way round.
        """
        return self._read(path, None, weights_only=weights_only, map_location=map_location)

    def read_verified(
        self,
        path: str,
        *,
        files: Mapping[str, tuple[int, str]],
        algorithm: str,
        everything: bool,
        weights_only: bool,
        map_location: Any,
    ) -> Any:
        """See `SupportsFileDigests.read_verified`: each rank verifies what it reads, and a share of what no rank reads.

        Raises:
            CorruptError: If a file is gone, or other bytes were read than were written. The message names the tensors.
            RestoreError: As `read_folder`, or if a rank does not see the folder that the first rank sees.
        """
        check = Check(files=files, algorithm=algorithm, everything=everything)
        return self._read(path, check, weights_only=weights_only, map_location=map_location)

    def _read(self, path: str, check: Check | None, *, weights_only: bool, map_location: Any) -> Any:
        reader = _UrlReader(path, **self._options) if "://" in path else Reader(path)
        reader.weights_only, reader.check = weights_only, check
        state = _whole(reader.read_metadata()) if self._template is None else self._template()
        target = state if isinstance(state, Target) else None
        error: Exception | None = None
        if target is not None:
            try:
                state = target.wanted(reader.contents())
            except Exception as failure:
                state, error = {}, failure
        # An error on one rank has to be raised within DCP's own steps, which send it to the others.
        planner = _Planner(weights_only=weights_only, is_exact=target is None, error=error)
        reader.load_into(state, planner, **self._who(RestoreError))
        if target is not None:
            return target.result(state)
        if self._template is not None:
            return state
        device = torch.device(map_location or "cpu")
        return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf, state)

    def _checked(self, state: Any) -> dict[str, Any]:
        """Return the state with each ``state_dict`` in place; raise if a tensor would be stored in part or not at all."""
        plain = _plain(state)
        check_tensor = check_whole if self._group is None else check_summed

        def check(keys: tuple[object, ...], leaf: Any) -> None:
            path = f"state{''.join(f'[{key!r}]' for key in keys)}"
            if isinstance(leaf, torch.Tensor):
                check_tensor(leaf, path)
                check_stored(getattr(leaf, "_local_tensor", leaf), path)
            elif not isinstance(leaf, _PRIMITIVES):
                refuse_shards_in(leaf, path, _WITHIN_A_VALUE)

        traverse_state_dict(plain, check)
        return plain

    def _who(self, kind: type[CheckpointerError]) -> dict[str, Any]:
        if self._group is None:
            return {"no_dist": True}
        if not torch.distributed.is_initialized():
            # DCP would go on, each rank as if it were alone, and all into the same files.
            msg = "the process groups were destroyed; close() the manager before destroy_process_group()"
            raise kind(msg)
        return {"process_group": self._group}

    def refused(self, state: Any) -> Mapping[str, str]:
        """See `Format.refused`."""
        return TorchFormat().refused(tree_map(lambda leaf: None if isinstance(leaf, torch.Tensor) else leaf, state))


def _plain(state: Any) -> dict[str, Any]:
    """Return the state with what has a ``state_dict`` in its place."""
    if not isinstance(state, dict):
        msg = f"the state is a {type(state).__name__}; the dcp format writes a dict of names, so return one"
        raise SaveError(msg)
    return {key: value.state_dict() if isinstance(value, Stateful) else value for key, value in state.items()}


@attrs.frozen
class _PlainSnapshots:
    snapshots: Snapshots
    checked: Callable[[Any], dict[str, Any]]

    def take(self, state: Any) -> Taken:
        return self.snapshots.take(self.checked(state))


@contextlib.contextmanager
def _portably() -> Iterator[None]:
    """Raise what the other ranks can be sent: an error that cannot be pickled would leave them waiting within DCP."""
    try:
        yield
    except Exception as error:
        raise portable(error) from error


@contextlib.contextmanager
def _as_they_are(kind: type[CheckpointerError]) -> Iterator[None]:
    """Raise what a rank has raised instead of DCP's bundle; an error of another kind becomes a ``kind``."""
    try:
        yield
    except CheckpointException as error:
        rank, (cause, _) = min(error.failures.items())
        if isinstance(cause, (CheckpointerError, OSError, MemoryError)):
            raise cause from None
        msg = f"rank {rank}: {type(cause).__name__}: {cause}"
        raise kind(msg) from cause


class _Portable:
    """Raises in DCP's steps what the other ranks can be sent."""

    def __init_subclass__(cls) -> None:
        for step in _STEPS & set(dir(cls)):
            setattr(cls, step, _portably()(vars(cls).get(step) or _of_parent(cls, step)))


def _of_parent(cls: type, step: str) -> Callable[..., Any]:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(super(cls, self), step)(*args, **kwargs)

    return call


class _SavePlanner(_Portable, DefaultSavePlanner):
    """Raises what went wrong before within DCP's own steps, so that it is an error on all ranks."""

    def __init__(self, error: Exception | None) -> None:
        super().__init__()
        self._error = error

    def set_up_planner(
        self, state_dict: Any, storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        if self._error is not None:
            raise self._error
        super().set_up_planner(state_dict, storage_meta, is_coordinator)


class _Movable:
    """A writer whose folder can be moved: its staging path is not recorded."""

    save_id: str

    def storage_meta(self) -> StorageMeta:
        return StorageMeta(save_id=self.save_id)


class _Writer(_Portable, _Movable, DigestingWriter, FileSystemWriter):
    """Writes to a path. The first rank makes the folder, and the others have to see it."""

    _makes_folder = True

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self._makes_folder = is_coordinator
        super().set_up_storage_writer(is_coordinator, *args, **kwargs)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return super().prepare_local_plan(plan) if self._makes_folder else plan

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Any:
        if not os.path.isdir(self.path):
            msg = (
                f"this rank ({socket.gethostname()}) does not see {os.fspath(self.path)}, which the first rank has "
                "made; all ranks have to use one directory, on a disk that they share"
            )
            raise SaveError(msg)
        return super().write_data(plan, planner)


class _UrlWriter(_Portable, _Movable, DigestingWriter, FsspecWriter):
    """Writes to a URL: closing a file makes it durable there, and its stream has nothing that could be synced.

    DCP would sync every disk of this machine instead, and torch 2.14 warns of it.
    """

    def __init__(self, url: str, **options: Any) -> None:
        super().__init__(url, sync_files=url.startswith(("file://", "local://")), **options)


class _Safe(VerifyingReader):
    """A reader that runs nothing its folder's metadata might hold, and reads nothing outside of the folder."""

    weights_only = True
    error: Exception | None = None
    """The error of the metadata, which the planner raises: DCP would pass on its text only."""
    load_id: str
    _is_planned = False

    def contents(self) -> FolderContents:
        """Return what the folder holds."""
        metadata = self.read_metadata()
        stored = metadata.state_dict_metadata.items()
        return FolderContents(
            {
                name: (tuple(one.size), one.properties.dtype)
                for name, one in stored
                if isinstance(one, TensorStorageMetadata)
            },
            functools.partial(self._value, metadata),
            functools.partial(_whole, metadata),
        )

    def _value(self, metadata: Metadata, name: str) -> Any:
        info = metadata.storage_data[MetadataIndex(name)]
        with self.fs.create_stream(self.fs.concat_path(self.path, info.relative_path), "rb") as stream:
            stream.seek(info.offset)
            content = io.BytesIO(stream.read(info.length))
        return TorchFormat().read(content, weights_only=self.weights_only, map_location="cpu")

    def load_into(self, state: dict[str, Any], planner: DefaultLoadPlanner, **group: Any) -> None:
        """Read the folder into a state."""
        if isinstance(planner, _Planner):
            planner.reader, self._is_planned = self, True
        self.rank = torch.distributed.get_rank(group["process_group"]) if "process_group" in group else 0
        with _as_they_are(RestoreError):
            load(state, storage_reader=cast(FileSystemReader, self), planner=planner, **group)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        try:
            stream = io.BytesIO(self.metadata_bytes())
            metadata = _read_metadata(stream, os.fspath(self.path), weights_only=self.weights_only)
        except (RestoreError, OSError) as error:
            if not self._is_planned:
                raise
            self.error = error
            metadata = Metadata({})
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata


class Reader(_Portable, _Safe, FileSystemReader):  # type: ignore[misc]
    """Reads a path."""


class _UrlReader(_Portable, _Safe, FsspecReader):  # type: ignore[misc]
    """Reads a URL."""

    is_near = False


def _read_metadata(stream: BinaryIO, folder: str, *, weights_only: bool) -> Metadata:
    try:
        metadata = (_MetadataUnpickler if weights_only else pickle.Unpickler)(stream).load()
        _check_folder(metadata)
    except (OSError, MemoryError, RestoreError):
        raise
    except NamingError as error:
        msg = f"{folder}: its metadata names a file outside of it: {error}"
        raise CorruptError(msg) from error
    except Exception as error:  # Damaged bytes fail anywhere in an unpickler.
        msg = f"{folder}: its metadata cannot be read: {type(error).__name__}: {error}"
        raise CorruptError(msg) from error
    return cast(Metadata, metadata)


class _MetadataUnpickler(pickle.Unpickler):
    """Knows the classes of DCP's metadata, and no other: nothing in a folder is executed."""

    def find_class(self, module: str, name: str) -> Any:
        known = _METADATA_GLOBALS.get((module, name))
        if known is None and module == "torch":
            known = getattr(torch, name, None)
            known = known if isinstance(known, torch.dtype) else None
        if known is None:
            msg = (
                f"the metadata names {module}.{name}, which a safe load refuses to unpickle; "
                "if you trust its writer, pass weights_only=False"
            )
            raise UnsafePayloadError(msg)
        return known


class _Planner(_Portable, DefaultLoadPlanner):
    """Reads into a template if it is what was saved, and what is not a tensor as safely as a torch file is read."""

    reader: _Safe | None = None

    def __init__(self, *, weights_only: bool, is_exact: bool = True, error: Exception | None = None) -> None:
        super().__init__()
        self._weights_only = weights_only
        self._is_exact = is_exact
        self._error = error

    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        if self.reader is not None and self.reader.error is not None:
            raise self.reader.error
        assert metadata is not None, "a load has read it"
        if self._error is not None:
            raise self._error
        if self._is_exact:
            _check_same(state_dict, metadata)
        super().set_up_planner(state_dict, metadata, is_coordinator)

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        loaded = TorchFormat().read(cast(BinaryIO, value), weights_only=self._weights_only, map_location="cpu")
        set_element(self.original_state_dict, self.mappings[read_item.dest_index.fqn], loaded)


def _whole(metadata: Metadata) -> dict[str, Any]:
    """Return a template of whole tensors for all that a folder holds."""
    state: dict[str, Any] = {}
    for name, stored in metadata.state_dict_metadata.items():
        value = None
        if isinstance(stored, TensorStorageMetadata):
            value = torch.empty(stored.size, dtype=stored.properties.dtype)
        set_element(state, (metadata.planner_data or {}).get(name, (name,)), value)
    return state


def _check_folder(metadata: Metadata) -> None:
    """Raise unless the metadata stays inside its folder and this machine's memory, and names all of each tensor."""
    for name, stored in metadata.state_dict_metadata.items():
        if isinstance(stored, TensorStorageMetadata):
            here, all_ = sum(math.prod(chunk.sizes) for chunk in stored.chunks), math.prod(stored.size)
            if here < all_:
                msg = f"it holds {here} of the {all_} elements of {name}: the shards of other processes are missing"
                raise CorruptError(msg)
    for info in metadata.storage_data.values():
        check_name(info.relative_path)
    for path in (metadata.planner_data or {}).values():
        if any(isinstance(part, int) and not 0 <= part < MAX_LIST for part in path):
            msg = f"its metadata has a list index in {path!r}; expected less than {MAX_LIST}"
            raise CorruptError(msg)


def _check_same(state: Mapping[str, Any], metadata: Metadata) -> None:
    """Raise unless the template has the folder's names and shapes, and can hold its numbers."""
    here = {key: value.state_dict() if isinstance(value, Stateful) else value for key, value in state.items()}
    flat, _ = flatten_state_dict(here)
    there = metadata.state_dict_metadata
    problems = [f"{name} is not in the checkpoint" for name in sorted(flat.keys() - there.keys())]
    problems += [f"{name} is not in the state" for name in sorted(there.keys() - flat.keys())]
    for name in sorted(flat.keys() & there.keys()):
        value, stored = flat[name], there[name]
        if not isinstance(value, torch.Tensor) or not isinstance(stored, TensorStorageMetadata):
            continue
        dtype = stored.properties.dtype
        if value.size() != stored.size:
            problems.append(f"{name} has the shape {list(stored.size)} in the checkpoint, {list(value.size())} here")
        elif not holds(value.dtype, dtype):
            problems.append(f"{name} is {dtype} in the checkpoint, and {value.dtype} here cannot hold it")
    if problems:
        more = f" and {len(problems) - MAX_PROBLEMS} more" if len(problems) > MAX_PROBLEMS else ""
        msg = (
            f"the checkpoint does not fit the state: {'; '.join(problems[:MAX_PROBLEMS])}{more}. Return from "
            "state= what was saved (get_state_dict of torch.distributed.checkpoint.state_dict fills in an optimizer's)"
        )
        raise RestoreError(msg)
