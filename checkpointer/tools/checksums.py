"""Verifies files that have no record: by a checksum file beside them, else by what their format holds."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Final

from checkpointer.errors import CheckpointerError
from checkpointer.formats.inspection.payload import open_contents, sniff
from checkpointer.ports import Storage
from checkpointer.tools.verify import Finding, check_sums

_ALGORITHMS: Final = ("sha256", "sha512", "sha1", "md5")
_ANY: Final = "|".join(_ALGORITHMS)
_SUMS: Final = re.compile(rf"(.+)\.({_ANY})(?:sum)?|({_ANY})(?:sums?)?(?:\.txt)?", re.IGNORECASE)
"""The name of a checksum file for one file (``model.pt.sha256``), or for the files of a folder (``SHA256SUMS``)."""
_NAMES: Final = ("SHA256SUMS", "sha256sums", "SHA256SUMS.txt", "sha256sum.txt", "SHA512SUMS", "SHA1SUMS", "MD5SUMS")
_LINE: Final = re.compile(r"([0-9a-fA-F]{32,128})(?:\s+\*?(.+))?|\w+ \((.+)\) = ([0-9a-fA-F]{32,128})")
"""A line of sha256sum, or of BSD's."""
_MAX_BYTES: Final = 1 << 20
_CHUNK: Final = 1 << 20
_CHECKED: Final = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")
"""A file of one of these is damaged if it is neither a torch file nor safetensors, unless it is text."""
_METADATA: Final = ".metadata"


def verify_files(storage: Storage, name: str) -> Iterator[Finding]:
    """Verify a file, or each file of a folder. Nothing is loaded, and nothing in a file runs.

    A checksum file counts: ``model.pt.sha256`` or ``SHA256SUMS``, as sha256sum writes them. Without one a zip file
    (what torch writes) is compared with the checksums of its parts, and other formats are read for what is missing.

    Args:
        storage: Where it is.
        name: Its path there; the empty text stands for the storage itself as a folder.

    Example:
        >>> from checkpointer.testing import MemoryStorage
        >>> storage = MemoryStorage()
        >>> storage.write("a.bin", b"data")
        >>> storage.write("a.bin.md5", b"8d777f385d3dfec8815d20f7496026dc  a.bin")
        >>> next(verify_files(storage, "a.bin"))
        Finding(name='a.bin', problem='', calls=(), by='the md5 in a.bin.md5', is_retired=False)
    """
    files = storage.list(name)
    is_file = name in files
    folder = name.rpartition("/")[0] if is_file else name
    beside = _beside(name, folder) if is_file else [path for path in files if _sums_of(path)[1]]
    sums = _read_sums(storage, beside)
    if not is_file and (f"{name}/{_METADATA}" if name else _METADATA) in files:
        yield _looked_into(storage, name)  # A DCP folder is one payload, and its files have no format of their own.
    for path in sorted(files):
        if path in sums:
            yield _by_sum(storage, path, *sums[path])
        elif path not in beside:
            yield _by_format(storage, path)


def _sums_of(path: str) -> tuple[str, str]:
    """Return for a checksum file its only file, if its name says one, and the algorithm; both empty for other files."""
    match = _SUMS.fullmatch(path.rpartition("/")[2])
    file, of_one, of_many = match.groups(default="") if match else ("", "", "")
    return file, (of_one or of_many).lower()


def _beside(name: str, folder: str) -> list[str]:
    """Return where a checksum of a file may be; the folder is not listed, because it may be large."""
    own = [f"{name}.{algorithm}{end}" for algorithm in _ALGORITHMS for end in ("", "sum")]
    return own + [f"{folder}/{sums}" if folder else sums for sums in _NAMES]


def _read_sums(storage: Storage, paths: Iterable[str]) -> Mapping[str, tuple[str, str, str]]:
    """Return for each path with a checksum: the algorithm, the digest in hex, and the name of the checksum file."""
    found: dict[str, tuple[str, str, str]] = {}
    for path in paths:
        try:
            with storage.open(path) as stream:
                text = stream.read(_MAX_BYTES).decode(errors="replace")
        except FileNotFoundError:
            continue
        folder, slash, own = path.rpartition("/")
        file, algorithm = _sums_of(path)
        size = 2 * hashlib.new(algorithm, usedforsecurity=False).digest_size
        for match in filter(None, (_LINE.fullmatch(line.strip()) for line in text.splitlines())):
            name, digest = (match[2], match[1]) if match[1] else (match[3], match[4])
            name = (name or file).removeprefix("./")
            if name and len(digest) == size:
                found[f"{folder}{slash}{name}"] = algorithm, digest.lower(), own
    return found


def _by_sum(storage: Storage, path: str, algorithm: str, expected: str, where: str) -> Finding:
    hasher = hashlib.new(algorithm, usedforsecurity=False)
    try:
        with storage.open(path) as stream:
            while chunk := stream.read(_CHUNK):
                hasher.update(chunk)
    except OSError as error:
        return Finding(name=path, problem=str(error))
    by = f"the {algorithm} in {where}"
    if hasher.hexdigest() == expected:
        return Finding(name=path, by=by)
    return Finding(name=path, by=by, problem=f"its {algorithm} is {hasher.hexdigest()}, and {where} has {expected}")


def _by_format(storage: Storage, path: str) -> Finding:
    try:
        with storage.open(path) as stream:
            kind, start = sniff(stream), stream.read(16)
    except OSError as error:
        return Finding(name=path, problem=str(error))
    if kind is not None:
        return _looked_into(storage, path)
    is_text = start and all(32 <= byte < 127 or byte in b"\t\n\r" for byte in start)
    if path.endswith(_CHECKED) and not is_text:
        problem = "is empty" if not start else "is neither a torch file nor safetensors"
        return Finding(name=path, by="its first bytes", problem=problem)
    return Finding(name=path)


def _looked_into(storage: Storage, path: str) -> Finding:
    try:
        with open_contents(storage, path) as contents:
            problems, calls = [*contents.problems()][:3], contents.calls
        is_zip = check_sums(storage, path)
    except (CheckpointerError, OSError) as error:
        return Finding(name=path, by="its contents", problem=str(error).removeprefix(f"{path}: "))
    by = "the checksums of its parts" if is_zip else "its contents; the format has no checksum"
    return Finding(name=path, problem="; ".join(problems), calls=calls, by=by)
