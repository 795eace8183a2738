"""The zip archive of a torch file: where each member lies, by its directory alone, and what ``torch`` reads from it."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from typing import BinaryIO, Final, NamedTuple

import attrs

from checkpointer.formats.tensor_bytes import read_exactly

MAX_DIRECTORY_BYTES: Final = 1 << 28
_TAIL: Final = 1 << 16
"""Bytes that are read first: the directory of some 800 members fits."""
_ALIGNMENT: Final = 64
_HEADER: Final = struct.Struct("<4s22xHH")
HEADER_BYTES: Final = 30
_ENTRY: Final = struct.Struct("<4s4xHH4xLLLHHHH6xL")
_END: Final = struct.Struct("<4sHHHHLLH")
_LOCATOR: Final = struct.Struct("<4sLQL")
_END64: Final = struct.Struct("<4sQ4xLLQQQQ")
KNOWN_FLAGS: Final = 0x808
"""The sizes follow the content, and the name is UTF-8. Any other flag means encryption or a patch."""
_MAX16: Final = 0xFFFF
_MAX32: Final = 0xFFFFFFFF


class OtherLayoutError(Exception):
    """Raised if a payload must be read with `Format.read`. It may be whole."""


class Member(NamedTuple):
    """A file in the archive, stored as it is."""

    name: str
    """Without the folder that holds everything."""
    header: int
    """Where its header begins in the archive (bytes)."""
    start: int
    """Where its content begins in the archive (bytes), if ``torch`` or this library has written it."""
    size: int
    """Bytes of its content."""
    crc: int
    """CRC32 of its content, or 0 if the writer left it out."""

    @property
    def end(self) -> int:
        """Where its content ends in the archive (bytes)."""
        return self.start + self.size


@attrs.frozen
class Archive:
    """The members of a torch file, in the order of the file. They do not overlap, and all lie within the file."""

    members: tuple[Member, ...]
    size: int
    """Bytes of the file."""
    directory: bytes
    """The directory: the last bytes of the file, as they were read."""

    @classmethod
    def of(cls, stream: BinaryIO) -> Archive | None:
        """Return the archive; None if it is not one that ``torch.save`` writes, whatever else it may be.

        Nothing larger than the directory is read, and nothing in it is trusted: each number is compared with the size
        of the file first.
        """
        size = stream.seek(0, io.SEEK_END)
        tail = _read(stream, max(0, size - _TAIL), size)
        try:
            start, count = _directory(tail, size)
            directory = tail[start - size :] if size - start <= len(tail) else _read(stream, start, size)
            return cls(_members(directory, start, count), size, directory)
        except (_OtherArchiveError, struct.error, UnicodeDecodeError):
            return None


class _OtherArchiveError(Exception):
    """Raised if a directory is not as ``torch.save`` writes it."""


def _read(stream: BinaryIO, start: int, end: int) -> bytes:
    stream.seek(start)
    return bytes(read_exactly(stream, end - start, "its directory"))


def agrees(member: Member, buffer: bytes | memoryview, offset: int) -> bool:
    """Return whether a member's header, at an offset in a buffer, says that its content begins where it should."""
    signature, name, extra = _HEADER.unpack_from(buffer, offset)
    return bool(signature == b"PK\3\4" and member.header + HEADER_BYTES + name + extra == member.start)


def start_of(header: int, name: int, size: int) -> int:
    """Return where the content of a member begins: ``torch`` pads its header to a multiple of 64 bytes.

    Args:
        header: Where its header begins (bytes).
        name: Length of its name (bytes).
        size: Length of its content (bytes).
    """
    start = header + HEADER_BYTES + name + 4
    if size >= _MAX32 or header >= _MAX32:
        start += 4 + (16 if size >= _MAX32 else 0) + (8 if header >= _MAX32 else 0)
    return -(-start // _ALIGNMENT) * _ALIGNMENT


def _directory(tail: bytes, size: int) -> tuple[int, int]:
    """Return where the directory begins, and the number of its entries."""
    at = len(tail) - _END.size
    signature, disk, first_disk, here, count, length, start, comment = _END.unpack_from(tail, at)
    if signature != b"PK\5\6" or disk or first_disk or comment or here != count:
        raise _OtherArchiveError
    end = size - _END.size
    if at >= _LOCATOR.size + _END64.size and tail[at - _LOCATOR.size :].startswith(b"PK\6\7"):
        at -= _LOCATOR.size + _END64.size
        end -= _LOCATOR.size + _END64.size
        signature, rest, disk, first_disk, here64, count64, length64, start64 = _END64.unpack_from(tail, at)
        is_known = signature == b"PK\6\6" and rest == _END64.size - 12 and not disk and not first_disk
        if not is_known or _LOCATOR.unpack_from(tail, at + _END64.size)[1:] != (0, end, 1) or here64 != count64:
            raise _OtherArchiveError
        same = ((count, count64, _MAX16), (length, length64, _MAX32), (start, start64, _MAX32))
        if any(short not in (long, mark) for short, long, mark in same):
            raise _OtherArchiveError
        count, length, start = count64, length64, start64
    if start + length != end or length > MAX_DIRECTORY_BYTES or count * _ENTRY.size > length:
        raise _OtherArchiveError
    return start, count


def _members(directory: bytes, end: int, count: int) -> tuple[Member, ...]:
    """Return the members; ``end`` is where the directory begins, so all of them end before it."""
    members = list[Member]()
    root, before = b"", 0
    for name, header, size, crc in _entries(directory, count):
        root = root or name.partition(b"/")[0] + b"/"
        start = start_of(header, len(name), size)
        if header < before or start + size > end or not name.startswith(root):
            raise _OtherArchiveError
        before = start + size
        members.append(Member(name[len(root) :].decode(), header, start, size, crc))
    names = {member.name for member in members}
    if len(names) < len(members) or "data.pkl" not in names or "constants.pkl" in names:
        raise _OtherArchiveError
    return tuple(members)


def _entries(directory: bytes, count: int) -> Iterator[tuple[bytes, int, int, int]]:
    """Yield the name of each file, where its header begins, its size and its CRC32."""
    at = 0
    for _ in range(count):
        signature, flags, method, crc, packed, size, named, extra, comment, disk, header = _ENTRY.unpack_from(
            directory, at
        )
        at += _ENTRY.size
        name = directory[at : at + named]
        at += named
        if _MAX32 in (packed, size, header):
            size, packed, header = _long(directory[at : at + extra], size, packed, header)
        at += extra + comment
        is_known = signature == b"PK\1\2" and not flags & ~KNOWN_FLAGS
        if not is_known or method or disk or packed != size or len(name) < max(named, 1):
            raise _OtherArchiveError
        yield name, header, size, crc


def _long(extra: bytes, *short: int) -> tuple[int, ...]:
    """Return the numbers, the ones that do not fit into 32 bits from the field that has them."""
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<HH", extra)
        if kind == 1:
            missing = sum(number == _MAX32 for number in short)
            numbers = iter(struct.unpack(f"<{missing}Q", extra[4 : 4 + length]))
            return tuple(next(numbers) if number == _MAX32 else number for number in short)
        extra = extra[4 + length :]
    raise _OtherArchiveError
