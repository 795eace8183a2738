"""Opens any payload to look into it, by what its bytes are and not by what its name or record says."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import BinaryIO

from checkpointer.errors import CorruptError, RestoreError
from checkpointer.formats.inspection.file_kind import START, sniff
from checkpointer.formats.inspection.safetensors_file import SafetensorsContents
from checkpointer.formats.inspection.tensors import Tensors
from checkpointer.formats.inspection.torch_file import open_legacy, open_zip
from checkpointer.formats.inspection.trainer_folder import FolderContents
from checkpointer.ports import Storage, SupportsPaths

__all__ = ["open_contents", "open_files", "open_stream"]

_DCP = ".metadata"


@contextlib.contextmanager
def open_contents(storage: Storage, name: str) -> Iterator[Tensors]:
    """Open a payload: torch file, safetensors, DCP folder, or a folder of such files.

    Args:
        storage: Where it is.
        name: Its path there; of a folder that is the storage itself, the empty text.

    Raises:
        CorruptError: If it is none of these, or damaged.
        UnsafePayloadError: If the metadata of a DCP folder names foreign classes.

    Example:
        >>> import io, torch
        >>> from checkpointer.testing import MemoryStorage
        >>> storage = MemoryStorage()
        >>> stream = io.BytesIO()
        >>> torch.save({"model": {"w": torch.ones(2, 3)}, "step": 7}, stream)
        >>> storage.write("a.ckpt", stream.getvalue())
        >>> with open_contents(storage, "a.ckpt") as contents:
        ...     print(contents.tensors["model.w"].shape, contents.others)
        (2, 3) {'step': 7}
    """
    contents = _open(storage, name)
    try:
        yield contents
    finally:
        contents.close()


@contextlib.contextmanager
def open_files(storage: Storage, folder: str, files: Iterable[str]) -> Iterator[Tensors]:
    """Open some files of a folder as one payload, as `open_contents` opens all of them.

    Args:
        storage: Where they are.
        folder: The folder's path there, which is left out of their names.
        files: Their paths.

    Raises:
        CorruptError: If one of them is damaged.
    """
    contents = FolderContents(storage, folder, files, _open_file)
    try:
        yield contents
    finally:
        contents.close()


def _open(storage: Storage, name: str) -> Tensors:
    files = storage.list(name)
    if (f"{name}/{_DCP}" if name else _DCP) in files:
        return _open_dcp(storage, name)
    if files and name not in files:
        return FolderContents(storage, name, files, _open_file)
    return _open_file(storage, name)


def _open_dcp(storage: Storage, name: str) -> Tensors:
    if not isinstance(storage, SupportsPaths):
        msg = f"{name} is a DCP folder, and {storage} has no paths to read it by; copy it to a local directory first"
        raise RestoreError(msg)
    from checkpointer.formats.inspection.dcp_folder import DcpContents

    return DcpContents(storage.local_path(name))


def _open_file(storage: Storage, name: str) -> Tensors:
    try:
        stream = storage.open(name)
    except (FileNotFoundError, IsADirectoryError) as error:
        msg = f"{name} is gone, though its record is there"
        raise CorruptError(msg) from error
    return open_stream(stream, name)


def open_stream(stream: BinaryIO, name: str) -> Tensors:
    """Open a file that is a stream already; it is closed with the contents, or with the error.

    Args:
        stream: Seekable, at its start.
        name: For messages.

    Raises:
        CorruptError: If it is neither a torch file nor safetensors, or damaged.
    """
    try:
        kind = sniff(stream)
        start = stream.read(START)
        stream.seek(0)
        if kind == "torch":
            return open_zip(stream) if start.startswith(b"PK") else open_legacy(stream)
        return SafetensorsContents(stream)
    except CorruptError as error:
        stream.close()
        msg = f"{name}: {error}"
        raise CorruptError(msg) from error
    except BaseException:
        stream.close()
        raise
