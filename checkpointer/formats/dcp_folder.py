"""The DCP folder: what ``torch.distributed.checkpoint`` writes and reads, each process its own shards."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, Final, Protocol, cast, runtime_checkable

import attrs
import torch
from torch.distributed.checkpoint._nested_dict import flatten_state_dict, set_element  # type: ignore[attr-defined]
from torch.distributed.checkpoint._traverse import traverse_state_dict
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.stateful import Stateful
from torch.utils._pytree import tree_map

from checkpointer.errors import (
    CheckpointerError,
    RestoreError,
    SaveError,
    reading,
)
from checkpointer.formats.dcp_reader import (
    Check,
    FolderReader,
    Portable,
    Reader,
    UrlReader,
    as_they_are,
    expect_no_group,
)
from checkpointer.formats.dcp_writer import UrlWriter, Writer
from checkpointer.formats.dtypes import holds
from checkpointer.formats.pickler import by_value, check_summed, check_whole, refuse_shards_in
from checkpointer.formats.snapshot import Snapshots
from checkpointer.formats.tensor_storage import check_stored
from checkpointer.formats.torch_file import TorchFormat
from checkpointer.ports import Snapshotting, Taken
from checkpointer.records.digest_algorithms import ALGORITHM

_PRIMITIVES: Final = (str, bytes, int, float, complex, type(None))

_WITHIN_A_VALUE: Final = (
    "hold parts of, and torch.distributed.checkpoint writes the value around it whole, from one process: it looks for "
    "tensors in dicts and lists alone, so put the tensor into one"
)

_STORAGE_ONLY: Final = ("retry",)
"""Options that are the storage's own, not fsspec's."""

MAX_PROBLEMS: Final = 10


@runtime_checkable
class Target(Protocol):
    """A template that depends on what a folder holds. All ranks read, each what its target wants."""

    def wanted(self, folder: FolderReader) -> dict[str, Any]:
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
            expect_no_group()

    def write_folder(self, state: Any, path: str) -> None:
        """See `FolderFormat.write_folder`.

        Raises:
            SaveError: If the state is not a dict, the storage of a tensor was freed or cut, the process group is gone,
                or without one a tensor is a shard; or if a rank does not see the folder that the first rank has made.
        """
        self.write_digested(state, path, algorithm=ALGORITHM)

    def write_digested(self, state: Any, path: str, *, algorithm: str) -> Mapping[str, tuple[int, str]]:
        """See `SupportsFileDigests.write_digested`. Only the first rank gets the digests of all files."""
        writer = UrlWriter(path, **self._options) if "://" in path else Writer(path)
        writer.digest_by(algorithm)
        plain: dict[str, Any] = {}
        error: Exception | None = None
        try:
            plain = tree_map(lambda leaf: by_value(leaf, takes_shards=True), self._checked(state))
        except Exception as failure:  # Within DCP's own steps, which send it to the other ranks.
            error = failure
        with as_they_are(SaveError):
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
        reader = UrlReader(path, **self._options) if "://" in path else Reader(path)
        reader.weights_only, reader.check = weights_only, check
        with reading(path):
            state = reader.whole() if self._template is None else self._template()
        target = state if isinstance(state, Target) else None
        error: Exception | None = None
        if target is not None:
            try:
                state = target.wanted(reader)
            except Exception as failure:
                state, error = {}, failure
        # An error on one rank has to be raised within DCP's own steps, which send it to the others.
        planner = _Planner(weights_only=weights_only, is_exact=target is None, error=error)
        planner.reader, reader.is_planned = reader, True
        reader.load_into(state, planner, **self._who(RestoreError))
        if target is not None:
            return target.result(state)
        if self._template is not None:
            return state
        device = torch.device(map_location or "cpu")
        return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf, state)

    def _checked(self, state: Any) -> dict[str, Any]:
        """Return the state with each ``state_dict`` in place. Raise if a tensor would not be stored whole."""
        plain = _plain(state)
        check_tensor = check_whole if self._group is None else check_summed

        def check(keys: tuple[object, ...], leaf: Any) -> None:
            path = f"state{''.join(f'[{key!r}]' for key in keys)}"
            if isinstance(leaf, torch.Tensor):
                check_tensor(leaf, path)
                own = getattr(leaf, "_local_tensor", leaf)
                _check_held(own, path)
                check_stored(own, path)
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


def _check_held(tensor: torch.Tensor, path: str) -> None:
    """Raise if ``torch.distributed.checkpoint`` cannot hold a tensor: its own error would not say which one.

    It writes the integers of a quantized tensor, and reads them with the scale of the tensor that it reads into.
    """
    if tensor.is_nested or tensor.is_quantized or tensor.layout != torch.strided:
        layout = "nested" if tensor.is_nested else tensor.layout
        msg = f"{path} is {tensor.dtype}, {layout}; torch.distributed.checkpoint cannot hold it: use format='torch'"
        raise SaveError(msg)
    if tensor.is_meta:
        msg = f"{path} is on the meta device and has no values; materialise the model before saving it"
        raise SaveError(msg)


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


class _SavePlanner(Portable, DefaultSavePlanner):
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


class _Planner(Portable, DefaultLoadPlanner):
    """Reads into a template if it is what was saved, and what is not a tensor as safely as a torch file is read."""

    reader: Reader | UrlReader | None = None
    """Its error is raised here, because DCP would pass on its text only."""

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
