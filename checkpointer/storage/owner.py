"""Who writes: an id from which another process on the same host can tell whether the writer is still alive."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import socket
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Final

__all__ = ["has_ended", "host_of", "is_dead", "is_live", "machine", "new_owner", "release"]

_live_here: set[str] = set()
_FIRST_PIDS: Final = 0xEFFFFFFC
"""Linux gives this number to the pid namespace of the machine itself, in which no container is."""


def new_owner() -> str:
    """Return an id of this process and this manager, and hold it live until `release`."""
    owner = f"{_host()}~{os.getpid()}~{_started(os.getpid())}~{uuid.uuid4().hex[:12]}"
    _live_here.add(owner)
    return owner


def release(owner: str) -> None:
    """Say that the manager is done; a second call does nothing."""
    _live_here.discard(owner)


def is_live(owner: str) -> bool:
    """Return whether the owner is certainly alive: same host, and its process runs (here: it is not released)."""
    known = _process(owner)
    if known is None:
        return False
    pid, started = known
    return owner in _live_here if pid == os.getpid() else _started(pid) == started != ""


def is_dead(owner: str) -> bool:
    """Return whether the owner is certainly dead: same host, and its process is gone (here: it is released).

    An owner on another host is neither: nobody here can tell.
    """
    return _process(owner) is not None and not is_live(owner)


def has_ended(owner: str, machine_of: Callable[[], str]) -> bool:
    """Return whether the owner is certainly dead, or ran before this machine was last booted.

    Args:
        owner: The id.
        machine_of: Returns what `machine` returned to the owner; it is asked only where that matters.
    """
    return is_dead(owner) or (is_earlier_boot(owner, _host()) and machine_of() == machine() != "")


def is_earlier_boot(owner: str, host: str) -> bool:
    """Return whether the owner's host has the name of ``host``, and was booted at another time."""
    name, _, rest = owner.partition("~")[0].rpartition("_")[0].rpartition("_")
    own_name, _, own_rest = host.rpartition("_")[0].rpartition("_")
    return bool(rest) and name == own_name and rest != own_rest


def machine() -> str:
    """Return what tells this machine from all others across boots; empty if nothing does, as in a container."""
    try:
        if os.stat("/proc/self/ns/pid").st_ino != _FIRST_PIDS:
            return ""
        name = Path("/etc/machine-id").read_text().strip()
    except OSError:
        return ""
    return hashlib.sha256(f"{socket.gethostname()} {name}".encode()).hexdigest()[:16] if name else ""


def host_of(owner: str) -> str:
    """Return the name of the owner's host."""
    return owner.partition("~")[0].rsplit("_", 2)[0]


def _process(owner: str) -> tuple[int, str] | None:
    match owner.split("~"):
        # Ids come from files that others may have written: '\u00b2' is a digit too, and no process has twenty of them.
        case [host, pid, started, _] if host == _host() and re.fullmatch("[0-9]{1,10}", pid):
            return int(pid), started
        case _:
            return None


@functools.cache
def _host() -> str:
    """Return what two processes share if, and only if, they see each other's process ids."""
    parts = [socket.gethostname()]
    # Containers may share a host's name: the boot and the pid namespace tell whether a pid means the same process.
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip()[:8])
        parts.append(str(os.stat("/proc/self/ns/pid").st_ino))
    return "_".join(parts).replace("~", "-").replace("/", "-")


def _started(pid: int) -> str:
    """Return when the process started, so that a reused pid is not taken for it; empty if there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return _started_without_proc(pid)
    # The command in parentheses may hold spaces; field 22 is the start time in clock ticks since boot.
    fields = stat.rpartition(")")[2].split()
    # A zombie is dead: it writes no more, though its pid is not free yet.
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
