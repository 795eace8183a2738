"""Names what is damaged in a payload whose digest differs: the tensors, by the checksums of a torch file's members."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import BinaryIO, Final

from checkpointer._display import some_of
from checkpointer.errors import CorruptError
from checkpointer.formats.archive_reader import Archive, Member, agrees
from checkpointer.formats.inspection.torch_file import open_torch
from checkpointer.formats.tensor_bytes import read_exactly

_CHUNK: Final = 4 << 20
_PICKLE: Final = "data.pkl"


def damage_in(stream: BinaryIO) -> str:
    """Return which part of a torch file is damaged, as a clause; empty if that cannot be known.

    The whole file is read again. Call it only after its digest turned out to be another one.

    Example:
        >>> import io, torch
        >>> stream = io.BytesIO()
        >>> torch.save({"w": torch.ones(100)}, stream)
        >>> data = bytearray(stream.getvalue())
        >>> data[data.index(torch.ones(100).numpy().tobytes()) + 7] ^= 1
        >>> damage_in(io.BytesIO(data))
        'w (data/0) is damaged'
    """
    if stream.read(2) != b"PK":
        return ""
    archive = Archive.of(stream)
    if archive is None:
        return "the directory at its end is damaged"
    if not any(member.crc for member in archive.members):
        return ""
    bad = [member for member in archive.members if _is_damaged(stream, member)]
    if bad:
        return _named(stream, bad)
    shifted = [member.name for member in archive.members if not agrees(member, _read(stream, member.header, 30), 0)]
    unknown = [member.name for member in archive.members if member.size and not member.crc]
    if shifted:
        return f"the headers of {some_of(shifted)} are damaged"
    if unknown:
        return f"its other parts are whole, and {some_of(unknown)} have no checksum"
    return "the damage lies between its tensors, and all of them are whole"


def _read(stream: BinaryIO, offset: int, length: int) -> bytes:
    stream.seek(offset)
    return bytes(read_exactly(stream, length, "it"))


def _is_damaged(stream: BinaryIO, member: Member) -> bool:
    """Return whether a member has another checksum; one without a checksum is not known to be damaged."""
    if not member.crc:
        return False
    stream.seek(member.start)
    left, crc = member.size, 0
    while left and (chunk := stream.read(min(left, _CHUNK))):
        crc, left = zlib.crc32(chunk, crc), left - len(chunk)
    return bool(left) or crc != member.crc


def _named(stream: BinaryIO, bad: Sequence[Member]) -> str:
    names = [member.name for member in bad]
    if _PICKLE in names:
        return f"its structure ({some_of(names)}) is damaged"
    tensors = _tensors(stream)
    texts = [_text(member.name, tensors) for member in bad]
    return f"{some_of(texts)} {'is' if len(texts) == 1 else 'are'} damaged"


def _tensors(stream: BinaryIO) -> Mapping[str, Sequence[str]]:
    """Return the names of the tensors in each storage. Nothing is unpickled for it."""
    stream.seek(0)
    try:
        return open_torch(stream).names_by_storage()
    except CorruptError:
        return {}


def _text(member: str, tensors: Mapping[str, Iterable[str]]) -> str:
    names = [*tensors.get(member.removeprefix("data/"), ())]
    return f"{some_of(names)} ({member})" if names else member
