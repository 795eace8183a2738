"""Opens any payload to look into it, by what its bytes are and not by what its name or record says."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from checkpointer.errors import CorruptError, RestoreError
from checkpointer.formats.safetensors_contents import SafetensorsContents
from checkpointer.formats.tensors import TensorInfo, Tensors
from checkpointer.formats.torch_contents import open_legacy, open_zip
from checkpointer.ports import Storage, SupportsPaths

__all__ = ["FolderContents", "open_contents"]

_READABLE: Final = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_DCP: Final = ".metadata"


@contextlib.contextmanager
def open_contents(storage: Storage, name: str) -> Iterator[Tensors]:
    """Open a payload: torch file, safetensors, DCP folder, or a folder of such files.

    Args:
        storage: Where it is.
        name: Its path there.

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


def _open(storage: Storage, name: str) -> Tensors:
    files = storage.list(name)
    if f"{name}/{_DCP}" in files:
        return _open_dcp(storage, name)
    if files and name not in files:
        return FolderContents(storage, name, files)
    return _open_file(storage, name)


def _open_dcp(storage: Storage, name: str) -> Tensors:
    if not isinstance(storage, SupportsPaths):
        msg = f"{name} is a DCP folder, and {storage} has no paths to read it by; copy it to a local directory first"
        raise RestoreError(msg)
    from checkpointer.formats.dcp_contents import DcpContents

    return DcpContents(storage.local_path(name))


def _open_file(storage: Storage, name: str) -> Tensors:
    try:
        stream = storage.open(name)
    except (FileNotFoundError, IsADirectoryError) as error:
        msg = f"{name} is gone, though its record is there"
        raise CorruptError(msg) from error
    try:
        start = stream.read(4)
        stream.seek(0)
        if start.startswith(b"PK"):
            return open_zip(stream)
        if start.startswith(b"\x80"):
            with contextlib.suppress(CorruptError):
                return open_legacy(stream)
            # The length of a safetensors header may begin with that byte too.
            stream.seek(0)
        return SafetensorsContents(stream)
    except CorruptError as error:
        stream.close()
        msg = f"{name}: {error}"
        raise CorruptError(msg) from error
    except BaseException:
        stream.close()
        raise


class FolderContents:
    """A folder that a trainer wrote: each file in it that holds tensors, see `Tensors`."""

    def __init__(self, storage: Storage, name: str, files: Iterable[str]) -> None:
        self._parts: dict[str, Tensors] = {}
        self._of: dict[str, tuple[str, str]] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self.others: dict[str, Any] = {}
        try:
            for path in sorted(files):
                self._add(storage, path, path[len(name) + 1 :])
        except BaseException:
            self.close()
            raise
        self.calls = tuple(sorted({call for part in self._parts.values() for call in part.calls}))

    def _add(self, storage: Storage, path: str, inside: str) -> None:
        if not inside.endswith(_READABLE):
            self.others[inside] = "<file>"
            return
        part = self._parts[inside] = _open_file(storage, path)
        self._take(inside, part.tensors)
        self.others |= {f"{inside}: {key}": value for key, value in part.others.items()}

    def _take(self, inside: str, tensors: Mapping[str, TensorInfo]) -> None:
        for name, info in tensors.items():
            full = f"{inside}: {name}"
            self.tensors[full] = TensorInfo(name=full, dtype=info.dtype, shape=info.shape)
            self._of[full] = (inside, name)

    def problems(self) -> Iterator[str]:
        """Yield what is wrong in each file."""
        for inside, part in self._parts.items():
            yield from (f"{inside}: {problem}" for problem in part.problems())

    def read(self, name: str) -> Any:
        """See `Tensors.read`."""
        inside, inner = self._of[name]
        return self._parts[inside].read(inner)

    def close(self) -> None:
        """See `Tensors.close`."""
        for part in self._parts.values():
            part.close()
