"""Tries a directory or URL before a long run: what works there, how quickly, and what is not safe."""

from __future__ import annotations

import contextlib
import os
import statistics
import tempfile
import time
import uuid
from collections.abc import Generator, Iterator
from importlib import metadata
from pathlib import Path
from typing import Final, Literal

import attrs

from checkpointer._display import age_text, count_text, size_text, without_errno
from checkpointer.commit.index import HOME
from checkpointer.errors import StorageError
from checkpointer.ports import (
    Storage,
    SupportsCapabilities,
    SupportsFreeSpace,
    SupportsPaths,
    SupportsServerTime,
    SupportsSweep,
)
from checkpointer.records.digest_algorithms import ALGORITHM
from checkpointer.storage.digests import DigestWriter

Level = Literal["ok", "note", "BAD"]
TRIES: Final = 5
"""So many small files are written to measure the latency."""
SMALL: Final = 1000
"""Bytes of a small file; a record has about so many."""
LARGE: Final = 16 << 20
"""Bytes of the file that measures the throughput."""
_CHUNK: Final = 1 << 20
_REQUESTS: Final = 6
"""Small files that a save writes: two records, aliases, the announced changes."""
_SKEW_S: Final = 30.0
_QUICK_SYNC_S: Final = 50e-6
"""No disk makes bytes durable in less seconds."""
_KINDS: Final = {
    "tmpfs": "is memory: a reboot loses all that is in it",
    "ramfs": "is memory: a reboot loses all that is in it",
    "overlay": "is the layer of a container: it is gone with the container",
    "nfs": "is a network mount: other hosts see a new file late, by as long as they cache",
    "nfs4": "is a network mount: other hosts see a new file late, by as long as they cache",
    "cifs": "is a network mount; a lost connection may lose what was not yet flushed",
    "9p": "is a share of the host machine; what fsync does there is for that machine to decide",
}
"""What to know of a filesystem, by the name of its kind."""
_CAPABILITIES: Final = {
    ("replace", "two renames (readers check both names)"): "a file cannot be replaced in one step; other programs may "
    "find last missing for a moment",
    ("create", "by claims (the server would overwrite)"): "the server does not refuse the second of two writers, so "
    "each new name costs a few more requests",
    ("copy", "through this process"): "a copy alias is written twice; last: link costs less, if links are possible",
    ("link", "none"): "links are refused, so aliases are copies",
    ("fsync of folders", "refused"): "a folder cannot be made durable; a power failure may lose the newest checkpoint",
}
"""What follows from a capability."""


@attrs.frozen
class Found:
    """One thing that was found out."""

    level: Level
    """``"note"``: it works, and there is something to know. ``"BAD"``: a run would fail, or lose data."""
    topic: str
    text: str


def diagnose(storage: Storage, size: int | None = None) -> Iterator[Found]:
    """Try a storage and yield what is found, one after the other. What was written for it is removed.

    Args:
        storage: The directory, opened by an owner. It need not exist.
        size: Bytes of a checkpoint, to say what a save of it takes.

    Example:
        >>> from checkpointer.testing import MemoryStorage
        >>> [found.topic for found in diagnose(MemoryStorage())]
        ['write', 'small files', 'throughput', 'packages']
    """
    try:
        if isinstance(storage, SupportsSweep):
            storage.prepare()
    except StorageError as error:
        yield Found("BAD", "write", str(error))
        return
    folder = f"{HOME}/doctor/{uuid.uuid4().hex}"
    try:
        yield from _try(storage, folder, size)
    except OSError as error:
        yield Found("BAD", "write", f"a trial file could not be written and read: {without_errno(str(error))}")
    finally:
        with contextlib.suppress(OSError):
            storage.delete(folder)
    yield from packages()


@contextlib.contextmanager
def leaving_no_folder(root: str) -> Iterator[None]:
    """Remove the empty folders at and above a local directory that the block has made."""
    wanted = Path(root).absolute() / HOME / "doctor"
    absent = [folder for folder in (wanted, *wanted.parents) if not folder.exists()]
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            for folder in absent:
                folder.rmdir()


def _try(storage: Storage, folder: str, size: int | None) -> Iterator[Found]:
    yield Found("ok", "write", f"small files can be written, replaced, read and deleted in {storage}")
    if isinstance(storage, SupportsPaths):
        yield from _filesystem(storage.local_path(""))
    if isinstance(storage, SupportsCapabilities):
        for what, how in storage.capabilities().items():
            then = _CAPABILITIES.get((what, how), "")
            # "refused" alone would read like an error.
            said = how.replace("link, refused by the filesystem", "by a link; the second of two writers is refused")
            yield Found("note" if then else "ok", what, f"{said}{f': {then}' if then else ''}")
    latency_s = yield from _small_files(storage, folder)
    rate = yield from _throughput(storage, folder)
    if isinstance(storage, SupportsServerTime):
        yield from _clock(storage)
    if isinstance(storage, SupportsFreeSpace) and (free := storage.free_space()) is not None:
        yield from _space(free, size)
    if size is not None:
        took = size / rate + _REQUESTS * latency_s
        yield Found(
            "ok",
            "a save",
            f"{size_text(size)} take about {age_text(took)}: {size_text(rate)}/s, and {_REQUESTS} small files. "
            "Without background= the training waits so long at each save",
        )


def _filesystem(root: str) -> Iterator[Found]:
    kind = _kind_of(root)
    if kind:
        what = _KINDS.get(kind, "")
        yield Found("note" if what else "ok", "filesystem", f"{kind} {what}".rstrip())
    seconds = statistics.median(_sync_times(root))
    is_odd = seconds < _QUICK_SYNC_S and kind not in ("tmpfs", "ramfs")
    then = ": quicker than a disk can be, so a power failure may lose what was acknowledged" if is_odd else ""
    yield Found("note" if is_odd else "ok", "fsync", f"fsync of 4 kB took {_ms(seconds)}{then}")


def _sync_times(root: str) -> Iterator[float]:
    with tempfile.TemporaryFile(dir=root) as stream:
        for _ in range(TRIES):
            stream.write(bytes(4096))
            stream.flush()
            began = time.perf_counter()
            os.fsync(stream.fileno())
            yield time.perf_counter() - began


def _kind_of(path: str) -> str:
    """Return the kind of the filesystem that a path is on, as Linux calls it; empty elsewhere."""
    try:
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    real, found = os.path.realpath(path), ("", "")
    for line in mounts:
        before, _, after = line.partition(" - ")
        point = before.split()[4].encode().decode("unicode_escape") if len(before.split()) > 4 else ""
        if (real == point or real.startswith(point.rstrip("/") + "/")) and len(point) >= len(found[0]):
            found = (point, after.split()[0] if after else "")
    return found[1]


def _small_files(storage: Storage, folder: str) -> Generator[Found, None, float]:
    writes, reads = [], []
    for number in range(TRIES):
        data, path = os.urandom(SMALL), f"{folder}/small-{number}"
        began = time.perf_counter()
        storage.write(path, data)
        wrote = time.perf_counter()
        with storage.open(path) as stream:
            found = stream.read()
        writes.append(wrote - began)
        reads.append(time.perf_counter() - wrote)
        if found != data:
            yield Found("BAD", "small files", f"{path} was read with other bytes than were written")
    missing = [path for number in range(TRIES) if (path := f"{folder}/small-{number}") not in storage.list(path)]
    if missing:
        text = f"{len(missing)} of {TRIES} new files are not listed at once; a restore may miss the newest checkpoint"
        yield Found("BAD", "listing", text)
    latency_s = statistics.median(writes)
    yield Found("ok", "small files", f"durable in {_ms(latency_s)}, read in {_ms(statistics.median(reads))}")
    return latency_s


def _throughput(storage: Storage, folder: str) -> Generator[Found, None, float]:
    block, path = os.urandom(_CHUNK), f"{folder}/large"
    began = time.perf_counter()
    upload = storage.upload(path)
    try:
        stream = DigestWriter(upload, ALGORITHM)
        for _ in range(LARGE // _CHUNK):
            stream.write(block)
        upload.finish()
        upload.publish(replace=False)
    finally:
        upload.abort()
    wrote = LARGE / (time.perf_counter() - began)
    began = time.perf_counter()
    with storage.open(path) as reader:
        same = all(reader.read(_CHUNK) == block for _ in range(LARGE // _CHUNK))
    read = LARGE / (time.perf_counter() - began)
    how = f"{size_text(LARGE)} were written with {size_text(wrote)}/s and read with {size_text(read)}/s"
    bad = "" if same else f"; {path} was read with other bytes than were written"
    yield Found("BAD" if bad else "ok", "throughput", how + bad)
    return wrote


def _clock(storage: SupportsServerTime) -> Iterator[Found]:
    there = storage.server_time()
    if there is None:
        return
    skew = there - time.time()
    if abs(skew) < _SKEW_S:
        yield Found("ok", "clock", f"within {max(1, round(abs(skew)))} s of this machine's")
    else:
        side = "ahead of" if skew > 0 else "behind"
        text = f"the storage's clock is {age_text(abs(skew))} {side} this machine's; the times in its listings differ"
        yield Found("note", "clock", text)


def _space(free: int, size: int | None) -> Iterator[Found]:
    text = f"{size_text(free)} free; a quota is not visible from here"
    if size is None:
        yield Found("ok", "space", text)
    elif free < 2 * size:
        room = f"room for {free // size} of {size_text(size)}; a save needs room for one more than are kept"
        yield Found("BAD", "space", f"{text}. That is {room}")
    else:
        yield Found("ok", "space", f"{text}. That is room for {count_text(free // size, 'checkpoint')}")


def packages() -> Iterator[Found]:
    """Yield what is wrong with this installation."""
    try:
        other = metadata.version("checkpointer")
    except metadata.PackageNotFoundError:
        yield Found("ok", "packages", "no other package has the import name checkpointer")
        return
    text = (
        f"the unrelated package 'checkpointer' {other} is installed too, and both have the import name "
        "checkpointer; run 'pip uninstall checkpointer', then install torch-checkpointer again"
    )
    yield Found("BAD", "packages", text)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2g} ms"
