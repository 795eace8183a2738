"""What a remote filesystem can do: known of its kind, or found out by trying it on files of our own."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any, Final, Literal

import attrs

__all__ = ["OBJECT_STORES", "Capabilities", "probe_create", "probe_rename"]

OBJECT_STORES: Final = frozenset({"abfs", "abfss", "az", "gcs", "gs", "memory", "oci", "oss", "s3", "s3a"})
"""Protocols where a file appears whole when its upload ends, there are no folders, and no rename."""


@attrs.frozen
class Capabilities:
    """How this storage does what the commit protocol needs."""

    put: Literal["atomic", "staged"]
    """Whether a small file can be written in place, or must be staged and renamed."""
    rename: Literal["replaces", "refuses", "none"]
    """What a rename onto an existing file does."""
    create: Literal["refuses", "claims"]
    """How two writers of one new name are told apart: the server refuses the second, or they announce themselves."""
    copy: Literal["server", "client"]
    """Whether the server copies, or the bytes pass through this process."""

    def describe(self) -> Mapping[str, str]:
        """Return them as words, for people."""
        return {
            "put": self.put,
            "rename": {
                "replaces": "replaces atomically",
                "refuses": "refuses what is there (replaced in two steps that a reader sees through)",
                "none": "none (not needed)",
            }[self.rename],
            "exclusive create": {
                "refuses": "by the server",
                "claims": "by claims (the server overwrites silently)",
            }[self.create],
            "copy": {"server": "server-side", "client": "through this process"}[self.copy],
        }


def probe_create(fs: Any, path: str) -> Literal["refuses", "claims"]:
    """Create a file twice, exclusively, and see whether the second attempt is refused.

    Some drivers and servers ignore the wish and overwrite; what they say is not believed, what they do is.
    """
    try:
        fs.pipe_file(path, b"1", mode="create")
    except Exception:  # Whatever it is, this driver does not offer it.
        return "claims"
    try:
        fs.pipe_file(path, b"2", mode="create")
    except Exception:
        refused = True
    else:
        refused = False
    with contextlib.suppress(Exception):
        refused = refused and fs.cat_file(path) == b"1"
    with contextlib.suppress(Exception):
        fs.rm_file(path)
    return "refuses" if refused else "claims"


def probe_rename(fs: Any, move: Any, source: str, target: str) -> Literal["replaces", "refuses"]:
    """Rename a file onto another and see which is there: some servers replace, some refuse, some do nothing."""
    for path, data in ((source, b"new"), (target, b"old")):
        with fs.open(path, "wb") as stream:
            stream.write(data)
    try:
        move(source, target)
    except Exception:
        return "refuses"
    with fs.open(target, "rb") as stream:
        return "replaces" if stream.read() == b"new" else "refuses"
