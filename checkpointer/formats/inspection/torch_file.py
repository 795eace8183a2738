"""Looks into a torch file without unpickling it: its pickle is read as text is, its tensors are byte ranges."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO, Final

import attrs

from checkpointer.errors import CorruptError
from checkpointer.formats.inspection.pickle import Global, Persistent, read_names, read_pickle
from checkpointer.formats.inspection.pickled_tensors import StorageRef, Stored, is_known
from checkpointer.formats.inspection.pickled_values import as_data, children_of, shown
from checkpointer.formats.inspection.rebuild import Rebuilding
from checkpointer.formats.inspection.tensors import (
    ITEM_SIZES,
    Branch,
    Entries,
    Leaf,
    Tensors,
    free_key,
    parts_in,
    tree_of,
)
from checkpointer.formats.memory import read_exactly

MAX_PICKLE_BYTES: Final = 1 << 28
MIN_STEPS: Final = 2_000_000
STEPS_PER_BYTE: Final = 4
"""The entries of a pickle are named in at most so many steps per byte, and `MIN_STEPS` more. A step is a level of
nesting on the way to an entry. A hostile file of lists of lists of one list needs more steps."""
_LOCAL_HEADER: Final = 30
_LEGACY_MAGIC: Final = 0x1950A86A20F9469CFC6C
_EXTRA: Final = "_extra_state"


class TorchContents(Tensors):
    """An opened torch file: its pickle from `read_pickle`, and where the bytes of each storage lie, by its key."""

    def __init__(
        self,
        stream: BinaryIO,
        root: Any,
        ranges: Mapping[str, _Range],
        *,
        names: Iterable[Global | Persistent] = (),
        size: int = 0,
    ) -> None:
        super().__init__()
        self._stream = stream
        self._root = root
        self._ranges = ranges
        self._stored: dict[str, Stored] = {}
        self._values: dict[str, Any] = {}
        self.calls = tuple(sorted(str(name) for name in names if isinstance(name, Global) and not is_known(name)))
        tree = tree_of(root, _children, self._add, MIN_STEPS + STEPS_PER_BYTE * size)
        self.parts = parts_in(tree, lambda name: self.tensors[name].numel > 1 and self.tensors[name].dtype != "uint8")

    def _add(self, name: str, value: Any) -> Leaf:
        free, stored = free_key(name, self.tensors, self.others), Stored.of(value)
        if stored is None:
            self.others[free] = shown(value)
            self._values[free] = value
        else:
            self.tensors[free] = stored.info(free)
            self._stored[free] = stored
        return Leaf(free, is_tensor=stored is not None)

    def value(self, name: str) -> Any:
        """See `Tensors.value`."""
        return as_data(self._values[name])

    def state(self) -> Any:
        """Return the whole state; an object that only unpickling would make becomes an `Unread`."""
        try:
            return Rebuilding(lambda stored: self._made("a tensor", stored)).make(self._root)
        except (RecursionError, TypeError, ValueError) as error:
            msg = f"its state cannot be made of what is there ({type(error).__name__}: {error})"
            raise CorruptError(msg) from error

    def read(self, name: str) -> Any:
        """See `Tensors.read`."""
        return self._made(name, self._stored[name])

    def _made(self, name: str, stored: Stored) -> Any:
        def read(ref: StorageRef, start: int, length: int) -> bytearray:
            where = self._ranges.get(ref.key)
            if where is None or start + length > where.size:
                msg = f"{name} lies at bytes {start} to {start + length} of storage {ref.key!r}, which has not so many"
                raise CorruptError(msg)
            self._stream.seek(where.start(self._stream) + start)
            return read_exactly(self._stream, length, name)

        return stored.make(name, read)

    def problems(self) -> Iterator[str]:
        """See `Tensors.problems`."""
        for name, stored in self._stored.items():
            for ref, needs in stored.needs():
                where = self._ranges.get(ref.key)
                if where is None or needs > where.size:
                    have = "is not there" if where is None else f"has {where.size} bytes"
                    yield f"{name} needs {needs} bytes of storage {ref.key!r}, which {have}"

    def names_by_storage(self) -> dict[str, list[str]]:
        """Return the names of the tensors that have bytes in each storage, by the storage's key."""
        names: dict[str, list[str]] = {}
        for name, stored in self._stored.items():
            for key in {ref.key for ref, _ in stored.needs()}:
                names.setdefault(key, []).append(name)
        return names

    def close(self) -> None:
        """See `Tensors.close`."""
        self._stream.close()


@attrs.frozen
class _Range:
    """Where a storage's bytes lie in the file; in a zip file they begin after a header, which is read when needed."""

    where: int | zipfile.ZipInfo
    size: int

    def start(self, stream: BinaryIO) -> int:
        if isinstance(self.where, int):
            return self.where
        stream.seek(self.where.header_offset)
        header = stream.read(_LOCAL_HEADER)
        names = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        return self.where.header_offset + _LOCAL_HEADER + names


# The two kinds of torch files


def open_zip(stream: BinaryIO) -> TorchContents:
    """Open what ``torch.save`` writes since 1.6; the stream is closed with it."""
    try:
        with zipfile.ZipFile(stream) as archive:
            members = archive.infolist()
            pickles = [m for m in members if m.filename.endswith("/data.pkl") or m.filename == "data.pkl"]
            if len(pickles) != 1:
                msg = "it is a zip file without one data.pkl, so torch.save did not write it"
                raise CorruptError(msg)
            if pickles[0].file_size > MAX_PICKLE_BYTES:
                msg = f"its data.pkl has {pickles[0].file_size} bytes; at most {MAX_PICKLE_BYTES} are read"
                raise CorruptError(msg)
            root = pickles[0].filename.removesuffix("data.pkl")
            data = _read(stream, pickles[0])
        folder = f"{root}data/"
        ranges = {m.filename[len(folder) :]: _range(m) for m in members if m.filename.startswith(folder)}
    except (OSError, MemoryError, CorruptError):
        raise
    except Exception as error:  # zipfile raises BadZipFile, NotImplementedError, struct.error, UnicodeDecodeError...
        msg = f"it cannot be read as a zip file ({type(error).__name__}: {error})"
        raise CorruptError(msg) from error
    state, names = read_names(io.BytesIO(data))
    return TorchContents(stream, state, ranges, names=names, size=len(data))


def _read(stream: BinaryIO, member: zipfile.ZipInfo) -> bytes:
    """Return a member's bytes; torch writes no checksum where ``set_crc32_options(False)`` says so."""
    where = _range(member)
    stream.seek(where.start(stream))
    data = stream.read(where.size)
    if len(data) != where.size or (member.CRC and zlib.crc32(data) != member.CRC):
        msg = f"its {member.filename} is not what was written"
        raise CorruptError(msg)
    return data


def _range(member: zipfile.ZipInfo) -> _Range:
    if member.compress_type != zipfile.ZIP_STORED:
        msg = f"its {member.filename} is compressed, which torch.save never does"
        raise CorruptError(msg)
    return _Range(member, member.file_size)


def open_legacy(stream: BinaryIO) -> TorchContents:
    """Open what ``torch.save`` wrote before 1.6, under Python 2 too, or any other pickle.

    The stream is closed with it.
    """
    end = stream.seek(0, io.SEEK_END)
    stream.seek(0)
    bounded: Any = _Bounded(stream)
    first, names = read_names(bounded)
    if first != _LEGACY_MAGIC:
        return TorchContents(stream, first, {}, names=names, size=stream.tell())
    for _ in range(2):  # The protocol's version, and what the system was like.
        read_pickle(bounded)
    (root, names), keys = read_names(bounded), read_pickle(bounded)
    pickled = stream.tell()
    if not isinstance(keys, (list, tuple)):
        msg = f"its list of storages is a {type(keys).__name__}"
        raise CorruptError(msg)
    refs = filter(None, (StorageRef.of(name.id) for name in names if isinstance(name, Persistent)))
    sizes = {ref.key: ITEM_SIZES.get(ref.dtype, 1) for ref in refs}
    ranges = {}
    for key in map(str, keys):
        size = int.from_bytes(stream.read(8), "little") * sizes.get(key, 1)
        start = stream.tell()
        # A file that was cut ends within a storage: `problems` names the tensors that lack bytes.
        ranges[key] = _Range(start, min(size, end - start))
        stream.seek(min(start + size, end))
    return TorchContents(stream, root, ranges, names=names, size=pickled)


class _Bounded:
    """A stream of which nothing is read that is larger than a pickle may be: a length in it may be a lie."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_PICKLE_BYTES:
            msg = f"it asks for {size} bytes at once; at most {MAX_PICKLE_BYTES} are read"
            raise CorruptError(msg)
        return self._stream.read(size)

    def readline(self) -> bytes:
        return self._stream.readline(MAX_PICKLE_BYTES)

    def tell(self) -> int:
        return self._stream.tell()


def _children(key: str, value: Any) -> tuple[Branch, Entries] | None:
    is_leaf = Stored.of(value) is not None or (key.endswith(_EXTRA) and as_data(value) is not None)
    return None if is_leaf else children_of(value)
