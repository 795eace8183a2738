"""Ids of writers. From an id, another process on the same host can find out whether the writer is alive."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import socket
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

STAGING: Final = ".checkpointer/staging"
"""Folder of unfinished writes; each writer has a folder below it, which begins with its id."""
_STALE_S: Final = 24 * 3600.0

_live_here: set[str] = set()
_FIRST_PIDS: Final = 0xEFFFFFFC
"""Linux gives this number to the machine's own pid namespace. Containers have other namespaces."""


def new_owner() -> str:
    """Return an id of this process and this manager, which counts as alive until `release`."""
    owner = f"{_host()}~{os.getpid()}~{_started(os.getpid())}~{uuid.uuid4().hex[:12]}"
    _live_here.add(owner)
    return owner


def release(owner: str) -> None:
    """Mark the manager as finished; a second call does nothing."""
    _live_here.discard(owner)


@contextlib.contextmanager
def temporary_owner() -> Iterator[str]:
    """Yield an id of a writer, or of a reader that opens a storage, which is released at the end of the block."""
    owner = new_owner()
    try:
        yield owner
    finally:
        release(owner)


def is_live(owner: str) -> bool:
    """Return whether the owner is certainly alive: same host, and its process runs (in this process: not released)."""
    known = _process(owner)
    if known is None:
        return False
    pid, started = known
    return owner in _live_here if pid == os.getpid() else _started(pid) == started != ""


def is_dead(owner: str) -> bool:
    """Return whether the owner is certainly dead: same host, and its process has ended (in this process: released).

    An owner on another host is neither live nor dead, because its process cannot be checked from here.
    """
    return _process(owner) is not None and not is_live(owner)


def is_abandoned(owner: str, age_s: Callable[[], float | None]) -> bool:
    """Return whether an unfinished write can be removed: its owner is dead, or unknown and quiet for a day.

    ``age_s`` returns the seconds since its last change, or None if unknown. It is called only for an unknown owner.
    """
    if _process(owner) is not None:
        return not is_live(owner)
    return (age := age_s()) is not None and age > _STALE_S


def has_ended(owner: str, machine_of: Callable[[], str]) -> bool:
    """Return whether the owner is certainly dead, or ran before this machine was last booted.

    ``machine_of`` returns the result of `machine` in the owner's process. It is called only if that matters.
    """
    return is_dead(owner) or (is_earlier_boot(owner, _host()) and machine_of() == machine() != "")


def is_earlier_boot(owner: str, host: str) -> bool:
    """Return whether the owner's host has the name of ``host``, and was booted at another time."""
    name, _, rest = owner.partition("~")[0].rpartition("_")[0].rpartition("_")
    own_name, _, own_rest = host.rpartition("_")[0].rpartition("_")
    return bool(rest) and name == own_name and rest != own_rest


def machine() -> str:
    """Return an id of this machine that stays the same across boots; empty if there is none, as in a container."""
    try:
        if os.stat("/proc/self/ns/pid").st_ino != _FIRST_PIDS:
            return ""
        name = Path("/etc/machine-id").read_text().strip()
    except OSError:
        return ""
    return hashlib.sha256(f"{socket.gethostname()} {name}".encode()).hexdigest()[:16] if name else ""


def is_here(owner: str) -> bool:
    """Return whether the owner's process would be seen from here: same host, boot and pid namespace."""
    return _process(owner) is not None


def is_of_host(owner: str, other: str) -> bool:
    """Return whether the owner's host has the name of the other one's host, but its process would not be seen here."""
    return host_of(owner) == host_of(other) and not is_here(owner)


def host_of(owner: str) -> str:
    """Return the name of the owner's host."""
    return owner.partition("~")[0].rsplit("_", 2)[0]


def _process(owner: str) -> tuple[int, str] | None:
    match owner.split("~"):
        # Ids may come from files of other programs: '\u00b2' is a digit too, and a pid has at most ten digits.
        case [host, pid, started, _] if host == _host() and re.fullmatch("[0-9]{1,10}", pid):
            return int(pid), started
        case _:
            return None


@functools.cache
def _host() -> str:
    """Return a text that two processes share if, and only if, they see each other's process ids."""
    parts = [socket.gethostname()]
    # Containers may share a host's name. If boot and pid namespace are equal, a pid means the same process.
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip()[:8])
        parts.append(str(os.stat("/proc/self/ns/pid").st_ino))
    return "_".join(parts).replace("~", "-").replace("/", "-")


def _started(pid: int) -> str:
    """Return when the process started, so that a reused pid is not taken for it; empty if it does not run."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return _started_without_proc(pid)
    # The command in parentheses may contain spaces; field 22 is the start time in clock ticks since boot.
    fields = stat.rpartition(")")[2].split()
    # A zombie counts as dead: it writes no more, though its pid is still in use.
    return "" if fields[0] == "Z" else fields[19]


def _started_without_proc(pid: int) -> str:
    if Path("/proc/self/stat").exists() or os.name == "nt":
        return ""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        pass
    return "unknown"
