"""Writes weights as safetensors or as a torch file, with one tensor in memory at a time."""

from __future__ import annotations

import io
import os
import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, Final, Literal

from checkpointer._new_file import new_file
from checkpointer.errors import PolicyError, SaveError
from checkpointer.formats.archive import Archive
from checkpointer.formats.inspection.pickle import Persistent
from checkpointer.formats.inspection.pickled_tensors import STORAGES
from checkpointer.formats.inspection.safetensors_file import entry, write_safetensors
from checkpointer.formats.inspection.tensors import TensorInfo
from checkpointer.formats.tensor_bytes import memory_at, memory_of

WeightsFormat = Literal["safetensors", "torch"]

_TORCH: Final = (".pt", ".pth", ".ckpt", ".bin", ".pth.tar")

_STORAGES: Final = {dtype: name for name, dtype in STORAGES.items()}

Read = Callable[[str], Any]


def format_by_name(path: str | os.PathLike[str]) -> WeightsFormat:
    """Return the format that the extension of a file of weights stands for."""
    name = os.path.basename(path).lower()
    if name.endswith(".safetensors"):
        return "safetensors"
    if name.endswith(_TORCH):
        return "torch"
    msg = (
        f"the extension of {os.fspath(path)!r} is not known; expected .safetensors, or one of a torch file "
        f"({', '.join(_TORCH)}). Choose one of these, or say which format it is: format='safetensors' or 'torch' "
        "(on the command line --format)"
    )
    raise PolicyError(msg)


def write_weights(
    path: str | os.PathLike[str],
    tensors: Mapping[str, TensorInfo],
    read: Read,
    *,
    format: WeightsFormat | None = None,
) -> int:
    """Write a flat mapping of names to tensors, whole or not at all, and never over a file that is there.

    Args:
        path: The new file.
        tensors: What to write, in this order; a safetensors file has wide dtypes first, so that each is aligned.
        read: Returns one of them by its name, on the CPU.
        format: None takes what the extension says, as `format_by_name` does. Only a torch file holds sparse and
            quantised tensors; all of those are in memory at once.

    Returns:
        Bytes written.

    Raises:
        NameTakenError: If the file is there.
        PolicyError: If the extension stands for no format, and ``format`` is None.
        SaveError: If a dtype has no name in safetensors.
        StorageError: If the file cannot be written, for example because the disk is full.

    Example:
        >>> import tempfile, torch
        >>> path = tempfile.mkdtemp() + "/w.pt"
        >>> info = TensorInfo(name="w", dtype="float32", shape=(2,))
        >>> size = write_weights(path, {"w": info}, lambda name: torch.ones(2))
        >>> torch.load(path, weights_only=True)
        {'w': tensor([1., 1.])}
    """
    format = format or format_by_name(path)
    with new_file(path, replaces=False) as stream:
        (_write_safetensors if format == "safetensors" else _write_torch)(stream, tensors, read)
        return stream.tell()


def _write_safetensors(stream: BinaryIO, tensors: Mapping[str, TensorInfo], read: Read) -> None:
    for name, info in tensors.items():
        if entry(info, 0) is None or name == "__metadata__":
            msg = f"{name} is {info.kind}; safetensors has no such dtype or name: write a torch file (--format torch)"
            raise SaveError(msg)
    write_safetensors(stream, tensors.values(), read)


def _write_torch(stream: BinaryIO, tensors: Mapping[str, TensorInfo], read: Read) -> None:
    buffer = io.BytesIO()
    pickler = _Pickler(buffer)
    pickler.dump({name: info if info.is_dense else read(name).cpu() for name, info in tensors.items()})
    archive = Archive(stream)
    archive.write_record("data.pkl", buffer.getvalue(), buffer.tell())
    archive.write_record("byteorder", "little", len("little"))
    for number, storage in enumerate(pickler.storages):
        if isinstance(storage, TensorInfo):
            data = memory_of(read(storage.name))
        else:
            data = memory_at(storage.data_ptr(), storage.nbytes())
        archive.write_record(f"data/{number}", data, len(data))
    archive.close()


class _Pickler(pickle.Pickler):
    """Pickles a `TensorInfo` as the tensor that it describes, and other tensors, sparse or quantised, as they are.

    ``storages`` has where the bytes of each storage come from: such a description, or the storage itself.
    """

    def __init__(self, stream: BinaryIO) -> None:
        super().__init__(stream, protocol=2)
        self.storages: list[Any] = []

    def reducer_override(self, value: Any) -> Any:
        import torch

        if not isinstance(value, TensorInfo):
            return NotImplemented
        kind = getattr(torch, _STORAGES.get(value.dtype, ""), None)
        stride = tuple(torch.empty(value.shape, device="meta").stride())
        count = value.numel if kind else value.bytes
        storage = Persistent(self._identity(value, kind or torch.UntypedStorage, count))
        hooks: OrderedDict[str, Any] = OrderedDict()
        args = (storage, 0, value.shape, stride, False, hooks)
        if kind:
            return torch._utils._rebuild_tensor_v2, args
        return torch._utils._rebuild_tensor_v3, (*args, getattr(torch, value.dtype))

    def persistent_id(self, value: Any) -> Any:
        import torch

        if isinstance(value, Persistent):
            return value.id
        if not isinstance(value, torch.storage.TypedStorage):
            return None
        kind = getattr(torch, value._pickle_storage_type())  # type: ignore[no-untyped-call]
        return self._identity(value._untyped_storage, kind, value._size())  # type: ignore[no-untyped-call]

    def _identity(self, source: Any, kind: type, count: int) -> tuple[Any, ...]:
        self.storages.append(source)
        return ("storage", kind, str(len(self.storages) - 1), "cpu", count)
