"""Looks into a torch file without unpickling it: its pickle is read as text is, its tensors are byte ranges."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO, Final

from checkpointer.errors import CorruptError
from checkpointer.formats.inspection import pickled_tensors
from checkpointer.formats.inspection.pickle import Call, Global, globals_in, persistents_in, read_pickle
from checkpointer.formats.inspection.pickled_tensors import StorageRef, Stored
from checkpointer.formats.inspection.pickled_values import (
    as_data,
    children_of,
    is_container_call,
    is_module,
    shown,
    state_children,
)
from checkpointer.formats.inspection.rebuild import rebuilt
from checkpointer.formats.inspection.tensors import ITEM_SIZES, TensorInfo
from checkpointer.formats.inspection.weight_sets import Branch, Leaf, parts_in

__all__ = ["TorchContents", "open_legacy", "open_zip"]

MAX_PICKLE_BYTES: Final = 1 << 28
MIN_STEPS: Final = 2_000_000
STEPS_PER_BYTE: Final = 4
"""What is in a pickle is named in at most so many steps for each of its bytes, and `MIN_STEPS` more. A step is a level
of nesting on the way to an entry. Lists of lists of one list have more entries than that."""
_LOCAL_HEADER: Final = 30
_LEGACY_MAGIC: Final = 0x1950A86A20F9469CFC6C
_EXTRA: Final = "_extra_state"


class TorchContents:
    """An opened torch file, see `Tensors`.

    Args:
        stream: The file; it is closed with the contents.
        root: What the pickle says, as `read_pickle` returns it.
        ranges: Where the bytes of each storage lie, by its key.
        size: Bytes of the pickle, which bound the work.
    """

    def __init__(self, stream: BinaryIO, root: Any, ranges: Mapping[str, _Range], size: int = 0) -> None:
        self._stream = stream
        self._root = root
        self._ranges = ranges
        self._stored: dict[str, Stored] = {}
        self._values: dict[str, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self.others: dict[str, Any] = {}
        self.calls = tuple(sorted(str(found) for found in globals_in(root) if not _is_known(found)))
        tree = _Walk(self._add, MIN_STEPS + STEPS_PER_BYTE * size).walk(root)
        self.parts = parts_in(tree, lambda name: self.tensors[name].numel > 1 and self.tensors[name].dtype != "uint8")

    def _add(self, name: str, value: Any, stored: Stored | None) -> Leaf:
        count = 2
        free = name
        while free in self.tensors or free in self.others:
            free, count = f"{name}#{count}", count + 1
        if stored is None:
            self.others[free] = shown(value)
            self._values[free] = value
        else:
            self.tensors[free] = TensorInfo(name=free, dtype=stored.dtype, shape=stored.shape, layout=stored.layout)
            self._stored[free] = stored
        return Leaf(free, is_tensor=stored is not None)

    def value(self, name: str) -> Any:
        """See `Tensors.value`."""
        return as_data(self._values[name])

    def state(self) -> Any:
        """Return the whole state; an object that only unpickling would make becomes an `Unread`.

        Raises:
            CorruptError: If the bytes of a tensor are not there, or if the rest is not what ``torch.save`` writes.
        """
        try:
            return rebuilt(self._root, lambda stored: self._made("a tensor", stored))
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
            data = bytearray(length)
            self._stream.seek(where.start(self._stream) + start)
            _read_into(self._stream, data, name)
            return data

        return stored.make(name, read)

    def problems(self) -> Iterator[str]:
        """Yield a message for each tensor whose bytes are not all there."""
        for name, stored in self._stored.items():
            for ref, needs in stored.needs():
                where = self._ranges.get(ref.key)
                if where is None or needs > where.size:
                    have = "is not there" if where is None else f"has {where.size} bytes"
                    yield f"{name} needs {needs} bytes of storage {ref.key!r}, which {have}"

    def close(self) -> None:
        """See `Tensors.close`."""
        self._stream.close()


class _Range:
    """Where a storage's bytes lie in the file; in a zip file they begin after a header, which is read when needed."""

    def __init__(self, start: int | zipfile.ZipInfo, size: int) -> None:
        self._start = start
        self.size = size

    def start(self, stream: BinaryIO) -> int:
        if isinstance(self._start, zipfile.ZipInfo):
            stream.seek(self._start.header_offset)
            header = stream.read(_LOCAL_HEADER)
            names = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
            self._start = self._start.header_offset + _LOCAL_HEADER + names
        return self._start


def _read_into(stream: BinaryIO, data: bytearray, name: str) -> None:
    view = memoryview(data)
    done = 0
    while done < len(view):
        # No stream is asked for gigabytes at once: remote ones would hold them twice.
        chunk = stream.read(min(len(view) - done, 8 << 20))
        if not chunk:
            msg = f"the file ends within {name}"
            raise CorruptError(msg)
        view[done : done + len(chunk)] = chunk
        done += len(chunk)


# The two kinds of torch files


def open_zip(stream: BinaryIO) -> TorchContents:
    """Open what ``torch.save`` writes since 1.6; the stream is closed with it.

    Raises:
        CorruptError: If it is none.
    """
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
        ranges = {m.filename.removeprefix(f"{root}data/"): _range(m) for m in members if _is_data(m, root)}
    except (OSError, MemoryError, CorruptError):
        raise
    except Exception as error:  # zipfile raises BadZipFile, NotImplementedError, struct.error, UnicodeDecodeError...
        msg = f"it cannot be read as a zip file ({type(error).__name__}: {error})"
        raise CorruptError(msg) from error
    return TorchContents(stream, read_pickle(io.BytesIO(data)), ranges, len(data))


def _read(stream: BinaryIO, member: zipfile.ZipInfo) -> bytes:
    """Return a member's bytes; torch writes no checksum where ``set_crc32_options(False)`` says so."""
    where = _range(member)
    stream.seek(where.start(stream))
    data = stream.read(where.size)
    if len(data) != where.size or (member.CRC and zlib.crc32(data) != member.CRC):
        msg = f"its {member.filename} is not what was written"
        raise CorruptError(msg)
    return data


def _is_data(member: zipfile.ZipInfo, root: str) -> bool:
    return member.filename.startswith(f"{root}data/")


def _range(member: zipfile.ZipInfo) -> _Range:
    if member.compress_type != zipfile.ZIP_STORED:
        msg = f"its {member.filename} is compressed, which torch.save never does"
        raise CorruptError(msg)
    return _Range(member, member.file_size)


def open_legacy(stream: BinaryIO) -> TorchContents:
    """Open what ``torch.save`` wrote before 1.6, under Python 2 too, or any other pickle.

    The stream is closed with it.

    Raises:
        CorruptError: If it is none.
    """
    end = stream.seek(0, io.SEEK_END)
    stream.seek(0)
    bounded: Any = _Bounded(stream)
    first = read_pickle(bounded)
    if first != _LEGACY_MAGIC:
        return TorchContents(stream, first, {}, stream.tell())
    for _ in range(2):  # The protocol's version, and what the system was like.
        read_pickle(bounded)
    root, keys = read_pickle(bounded), read_pickle(bounded)
    pickled = stream.tell()
    if not isinstance(keys, (list, tuple)):
        msg = f"its list of storages is a {type(keys).__name__}"
        raise CorruptError(msg)
    refs = filter(None, (StorageRef.of(found.id) for found in persistents_in(root)))
    sizes = {ref.key: ITEM_SIZES.get(ref.dtype, 1) for ref in refs}
    ranges = {}
    for key in map(str, keys):
        size = int.from_bytes(stream.read(8), "little") * sizes.get(key, 1)
        start = stream.tell()
        # A file that was cut ends within a storage: `problems` names the tensors that lack bytes.
        ranges[key] = _Range(start, min(size, end - start))
        stream.seek(min(start + size, end))
    return TorchContents(stream, root, ranges, pickled)


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


# What the pickle holds


def _is_known(found: Global) -> bool:
    """Return whether plain containers or tensors need it: a name of torch's own for storages, dtypes and rebuilding."""
    return is_container_call(found) or pickled_tensors.is_known(found)


class _Walk:
    """Goes through all that a pickle holds, depth first, and gives each entry its keys as a name."""

    def __init__(self, add: Callable[[str, Any, Stored | None], Leaf], steps: int) -> None:
        self._add = add
        self._steps = self._left = steps

    def walk(self, root: Any) -> Branch:
        """Return the tree of what is in ``root``; what contains itself is entered once on each way to it."""
        top = Branch("other")
        frames: list[tuple[Branch, Iterator[tuple[str, Any, bool]], int]] = [(top, iter([("", root, True)]), 0)]
        path: list[str] = []
        within = {0}
        while frames:
            branch, rest, identity = frames[-1]
            entry = next(rest, None)
            if entry is None:
                frames.pop()
                within.discard(identity)
                del path[len(frames) - 1 :]
                continue
            key, value, is_weight = entry
            self._spend(len(frames))
            path[len(frames) - 1 :] = [key]
            stored = Stored.of(value)
            children = None if stored or id(value) in within else _children(key, value)
            free = _free(key, branch) if is_weight else None
            if children is None:
                leaf = self._add(_joined(path) or "(the whole)", value, stored)
                if free is not None:
                    branch.children[free] = leaf
                continue
            below, entries = children
            if free is not None:
                branch.children[free] = below
            within.add(id(value))
            frames.append((below, entries, id(value)))
        whole = next(iter(top.children.values()))
        return whole if isinstance(whole, Branch) else Branch("mapping", {"": whole})

    def _spend(self, steps: int) -> None:
        self._left -= steps
        if self._left < 0:
            msg = f"it holds more than {self._steps} entries, far more than its size allows: no checkpoint does"
            raise CorruptError(msg)


def _joined(path: list[str]) -> str:
    return ".".join(path[1:])


def _free(key: str, branch: Branch) -> str:
    count, free = 2, key
    while free in branch.children:
        free, count = f"{key}#{count}", count + 1
    return free


def _children(key: str, value: Any) -> tuple[Branch, Iterator[tuple[str, Any, bool]]] | None:
    """Return a container's kind and what it holds, and whether each is what a ``state_dict`` would have."""
    if isinstance(value, Call) and is_module(value):
        return Branch("module"), state_children(value)
    found = children_of(value)
    if found is None or (key.endswith(_EXTRA) and as_data(value) is not None):
        return None
    kind, versions, entries = found
    return Branch(kind, versions=versions), ((name, child, True) for name, child in entries)
