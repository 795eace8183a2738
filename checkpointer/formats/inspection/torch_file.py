"""Looks into a torch file without unpickling it: its pickle is read as text is, its tensors are byte ranges."""

from __future__ import annotations

import hashlib
import io
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, BinaryIO, Final

import attrs

from checkpointer.errors import CorruptError
from checkpointer.formats.archive_reader import HEADER_BYTES, KNOWN_FLAGS
from checkpointer.formats.inspection.pickle import Call, Global, Persistent, read_made, read_pickle
from checkpointer.formats.inspection.pickled_tensors import (
    MAX_REPEATED,
    MAX_REPEATED_BYTES,
    Read,
    StorageRef,
    Stored,
    is_known,
    makes_numbers,
)
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
from checkpointer.formats.inspection.work_limit import Work
from checkpointer.formats.tensor_bytes import read_exactly

MAX_PICKLE_BYTES: Final = 1 << 28
_CHUNK: Final = 1 << 20
_COUNT_BYTES: Final = 8
_ZIP: Final = b"PK"
_LEGACY_MAGIC: Final = 0x1950A86A20F9469CFC6C
_EXTRA: Final = "_extra_state"
_MOST_SOUND: Final = 16
_sound: Final = set[tuple[bytes, frozenset[tuple[str, int]]]]()
"""Pickles that `check_pickle` has found sound, with the sizes of their storages."""


class TorchContents(Tensors):
    """An opened torch file."""

    def __init__(self, stream: BinaryIO, parsed: _Parsed) -> None:
        super().__init__()
        self._stream = stream
        self._root = parsed.root
        self._ranges = parsed.ranges
        self._sizes = parsed.sizes
        self._stored: dict[str, Stored] = {}
        self._values: dict[str, Any] = {}
        self._following: dict[tuple[int, str], int] = {}
        self._work = Work.for_bytes(parsed.size)
        self._left = max(MAX_REPEATED_BYTES, MAX_REPEATED * sum(parsed.sizes.values()))
        """Bytes of tensors that may still be read: many tensors may share the bytes of one storage."""
        named = (one.what if isinstance(one, Call) else one for one in parsed.made)
        names = {name for name in named if isinstance(name, Global)}
        self.calls = tuple(sorted(str(name) for name in names if not is_known(name)))
        tree = tree_of(parsed.root, self._children, self._add, self._work)
        self.parts = parts_in(tree, lambda name: self.tensors[name].numel > 1 and self.tensors[name].dtype != "uint8")

    def _children(self, key: str, value: Any) -> tuple[Branch, Entries] | None:
        is_leaf = Stored.of(value) is not None or (key.endswith(_EXTRA) and as_data(value, self._work) is not None)
        return None if is_leaf else children_of(value, self._work)

    def _add(self, name: str, value: Any) -> Leaf:
        free, stored = free_key(name, self._following, self.tensors, self.others), Stored.of(value)
        if stored is None:
            self.others[free] = shown(value, self._work)
            self._values[free] = value
        else:
            self.tensors[free] = stored.info(free)
            self._stored[free] = stored
        return Leaf(free, is_tensor=stored is not None)

    def value(self, name: str) -> Any:
        """See `Tensors.value`."""
        return as_data(self._values[name], self._work)

    def state(self) -> Any:
        """Return the whole state; an object that only unpickling would make becomes an `Unread`.

        Tensors that share memory in the file share it here too.
        """
        shared: dict[str, memoryview] = {}

        def read(ref: StorageRef, start: int, length: int) -> memoryview:
            if ref.key not in shared:
                where = self._ranges[ref.key]
                self._stream.seek(where.start(self._stream))
                shared[ref.key] = memoryview(read_exactly(self._stream, where.size, f"storage {ref.key!r}"))
            return shared[ref.key][start : start + length]

        try:
            make = Rebuilding(lambda stored: self._made("a tensor", stored, read), self._work).make
            return make(self._root)
        except (CorruptError, OSError, MemoryError):
            raise
        except Exception as error:
            msg = f"its state cannot be made of what is there ({type(error).__name__}: {error})"
            raise CorruptError(msg) from error

    def _read(self, name: str) -> Any:
        def read(ref: StorageRef, start: int, length: int) -> bytearray:
            self._left -= length
            if self._left < 0:
                msg = f"its tensors have the bytes of the file more than {MAX_REPEATED} times; no checkpoint's have"
                raise CorruptError(msg)
            self._stream.seek(self._ranges[ref.key].start(self._stream) + start)
            return read_exactly(self._stream, length, name)

        return self._made(name, self._stored[name], read)

    def _made(self, name: str, stored: Stored, read: Read) -> Any:
        def checked(ref: StorageRef, start: int, length: int) -> bytearray | memoryview:
            where = self._ranges.get(ref.key)
            if where is None or start + length > where.size:
                msg = f"{name} lies at bytes {start} to {start + length} of storage {ref.key!r}, which has not so many"
                raise CorruptError(msg)
            return read(ref, start, length)

        return stored.make(name, checked)

    def problems(self) -> Iterator[str]:
        """See `Tensors.problems`."""
        for name, stored in self._stored.items():
            yield from claims(name, stored, self._sizes)

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


def claims(name: str, stored: Stored, sizes: Mapping[str, int]) -> Iterator[str]:
    """Yield a message for each storage that has fewer bytes than a tensor needs; ``sizes`` are those of all, by key."""
    for ref, needs in stored.needs():
        size = sizes.get(ref.key)
        if size is None or needs > size:
            have = "is not there" if size is None else f"has {size} bytes"
            yield f"{name} needs {needs} bytes of storage {ref.key!r}, which {have}"


@attrs.frozen
class _Range:
    """Where a storage's bytes lie in the file; in a zip file they begin after a header, which is read when needed."""

    where: int
    """Where its bytes begin, or the header before them."""
    size: int
    end: int
    """Where its bytes have to end (bytes)."""
    has_header: bool = False

    def start(self, stream: BinaryIO) -> int:
        """Return where its bytes begin; raise `CorruptError` if they reach into what comes after them."""
        begin = self.where
        if self.has_header:
            stream.seek(self.where)
            header = read_exactly(stream, HEADER_BYTES, "the header of a member")
            names = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
            begin += HEADER_BYTES + names
        if begin + self.size > self.end:
            msg = f"a member at byte {self.where} reaches into what comes after it; torch.save writes none that overlap"
            raise CorruptError(msg)
        return begin


# The two kinds of torch files


@attrs.frozen(kw_only=True)
class _Parsed:
    """What the pickle of a torch file says, and where the bytes of its storages lie."""

    root: Any
    made: list[Any]
    """Every class, call and reference in it."""
    ranges: Mapping[str, _Range] = MappingProxyType({})
    size: int
    """Bytes of the pickle."""

    @property
    def sizes(self) -> Mapping[str, int]:
        """Bytes of each storage."""
        return {key: where.size for key, where in self.ranges.items()}


def open_torch(stream: BinaryIO) -> TorchContents:
    """Open what ``torch.save`` writes, or wrote before 1.6, under Python 2 too, or any other pickle.

    The stream is closed with it.
    """
    return TorchContents(stream, _parsed(stream))


def check_sound(stream: BinaryIO) -> None:
    """Raise `CorruptError` if a torch file claims more than it holds: loading it could need much memory or time.

    The stream is at its start afterwards.
    """
    parsed = _parsed(stream)
    _check_claims(parsed.made, parsed.sizes)
    stream.seek(0)


def check_pickle(data: bytes | memoryview, sizes: Mapping[str, int]) -> None:
    """Raise as `check_sound` for the pickle of a torch file whose storages have these sizes (bytes), by their keys.

    What was found sound is not looked at again: a process may restore one checkpoint several times.
    """
    key = hashlib.sha256(data).digest(), frozenset(sizes.items())
    if key in _sound:
        return
    _check_claims(read_made(io.BytesIO(data), Work.for_bytes(len(data)))[1], sizes)
    if len(_sound) == _MOST_SOUND:
        _sound.clear()
    _sound.add(key)


def _check_claims(made: Iterable[Any], sizes: Mapping[str, int]) -> None:
    for one in made:
        stored = Stored.of(one) if isinstance(one, Call) else None
        problem = "" if stored is None else next(claims("a tensor", stored, sizes), "")
        if stored is None and (makes_numbers(one) or (isinstance(one, Persistent) and StorageRef.of(one.id) is None)):
            problem = "a storage or tensor in it has a shape, number or name that none has"
        if problem:
            raise CorruptError(problem)


def _parsed(stream: BinaryIO) -> _Parsed:
    stream.seek(0)
    is_zip = stream.read(len(_ZIP)) == _ZIP
    stream.seek(0)
    return _parsed_zip(stream) if is_zip else _parsed_legacy(stream)


def _parsed_zip(stream: BinaryIO) -> _Parsed:
    members = _members(stream)
    pickles = [name for name in members if name.endswith("/data.pkl") or name == "data.pkl"]
    if len(pickles) != 1:
        msg = "it is a zip file without one data.pkl, so torch.save did not write it"
        raise CorruptError(msg)
    where, crc = members[pickles[0]]
    if where.size > MAX_PICKLE_BYTES:
        msg = f"its data.pkl has {where.size} bytes; at most {MAX_PICKLE_BYTES} are read"
        raise CorruptError(msg)
    stream.seek(where.start(stream))
    data = read_exactly(stream, where.size, pickles[0])
    if crc and zlib.crc32(data) != crc:  # There is none if set_crc32_options(False) was called.
        msg = f"its {pickles[0]} is not what was written"
        raise CorruptError(msg)
    folder = f"{pickles[0].removesuffix('data.pkl')}data/"
    ranges = {name[len(folder) :]: where for name, (where, _) in members.items() if name.startswith(folder)}
    root, made = read_made(io.BytesIO(data), Work.for_bytes(len(data)))
    return _Parsed(root=root, made=made, ranges=ranges, size=len(data))


def bad_member(stream: BinaryIO) -> str:
    """Return the name of the first member of a torch file that has another checksum than it should; empty if none."""
    for name, (where, expected) in _members(stream).items():
        stream.seek(where.start(stream))
        left, crc = where.size, 0
        while left and (chunk := stream.read(min(left, _CHUNK))):
            left, crc = left - len(chunk), zlib.crc32(chunk, crc)
        if left or (expected and crc != expected):
            return name
    return ""


def _members(stream: BinaryIO) -> dict[str, tuple[_Range, int]]:
    """Return where the bytes of each member of a zip file lie, and their CRC32.

    Raises:
        CorruptError: If it is not such a file; or if a member is not as torch writes it: it is compressed, encrypted or
            there twice, or overlaps another.
    """
    try:
        with zipfile.ZipFile(stream) as archive:
            found, end = sorted(archive.infolist(), key=lambda member: member.header_offset), archive.start_dir
    except (OSError, MemoryError):
        raise
    except Exception as error:  # zipfile raises BadZipFile, NotImplementedError, struct.error, UnicodeDecodeError...
        msg = f"it cannot be read as a zip file ({type(error).__name__}: {error})"
        raise CorruptError(msg) from error
    if any(member.filename.endswith("/constants.pkl") for member in found):
        msg = (
            "it is a TorchScript file (torch.jit.save); save torch.jit.load(FILE).state_dict() with torch.save instead"
        )
        raise CorruptError(msg)
    members: dict[str, tuple[_Range, int]] = {}
    ends = [*(member.header_offset for member in found[1:]), end]
    for member, following in zip(found, ends, strict=False):
        name = member.filename
        if problem := _problem(member, following, is_double=name in members):
            msg = f"its {name[:100]} {problem}, which torch.save never does"
            raise CorruptError(msg)
        members[name] = _Range(member.header_offset, member.file_size, following, has_header=True), member.CRC
    return members


def _problem(member: zipfile.ZipInfo, end: int, *, is_double: bool) -> str:
    """Return what torch would not have done to a member that has to end at a byte; empty if it is sound."""
    if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
        return "is compressed"
    if member.flag_bits & ~KNOWN_FLAGS:
        return "is encrypted or a patch"
    if member.header_offset < 0 or member.header_offset + HEADER_BYTES + member.file_size > end:
        return "overlaps what comes after it"
    return "is there twice" if is_double else ""


def _parsed_legacy(stream: BinaryIO) -> _Parsed:
    end = stream.seek(0, io.SEEK_END)
    stream.seek(0)
    bounded: Any = _Bounded(stream, end)
    work = Work.for_bytes(min(end, MAX_PICKLE_BYTES))
    first, made = read_made(bounded, work)
    if first != _LEGACY_MAGIC:
        return _Parsed(root=first, made=made, size=stream.tell())
    for _ in range(2):  # The protocol's version, and what the system was like.
        read_pickle(bounded)
    (root, made), keys = read_made(bounded, work), read_pickle(bounded)
    pickled = stream.tell()
    if not isinstance(keys, (list, tuple)) or not all(isinstance(key, (str, int)) for key in keys):
        msg = f"its list of storages is a {type(keys).__name__}, or has other things than texts and numbers"
        raise CorruptError(msg)
    refs = filter(None, (StorageRef.of(one.id) for one in made if isinstance(one, Persistent)))
    sizes = {ref.key: ITEM_SIZES.get(ref.dtype, 1) for ref in refs}
    return _Parsed(root=root, made=made, ranges=_ranges(stream, keys, sizes, end), size=pickled)


def _ranges(stream: BinaryIO, keys: Iterable[Any], sizes: Mapping[str, int], end: int) -> dict[str, _Range]:
    """Return where storages lie that follow one another, each after the number of its elements."""
    ranges: dict[str, _Range] = {}
    start = stream.tell()
    for key in map(str, keys):
        if key in ranges:
            msg = f"its list of storages has {key[:100]!r} twice"
            raise CorruptError(msg)
        count = b""
        if start + _COUNT_BYTES <= end:
            stream.seek(start)
            count = stream.read(_COUNT_BYTES)
        begin = min(start + _COUNT_BYTES, end)
        # A file that was cut ends within a storage: `problems` names the tensors that lack bytes.
        start = min(begin + int.from_bytes(count, "little") * sizes.get(key, 1), end)
        ranges[key] = _Range(begin, start - begin, end)
    return ranges


@attrs.frozen
class _Bounded:
    """A stream of which nothing is read that is larger than a pickle may be: a length in it may be a lie."""

    stream: BinaryIO
    end: int
    """Bytes of the file."""

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_PICKLE_BYTES or (size > _CHUNK and size > self.end - self.stream.tell()):
            msg = f"it asks for {size} bytes at once; at most {MAX_PICKLE_BYTES} are read, and the file has {self.end}"
            raise CorruptError(msg)
        return self.stream.read(size)

    def readline(self) -> bytes:
        return self.stream.readline(MAX_PICKLE_BYTES)
