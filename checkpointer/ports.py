"""What the manager needs from the world: storage, payload format, clock, ranks. Small, so that yours fits in a page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, BinaryIO, Protocol, runtime_checkable

import attrs

__all__ = [
    "Clock",
    "FolderFormat",
    "Format",
    "Listener",
    "Mailbox",
    "Ranks",
    "Snapshotting",
    "Stat",
    "Storage",
    "SupportsCapabilities",
    "SupportsCopy",
    "SupportsFreeSpace",
    "SupportsLinks",
    "SupportsMailbox",
    "SupportsMapping",
    "SupportsPaths",
    "SupportsSnapshots",
    "SupportsSweep",
    "SupportsURLs",
    "Taken",
    "Upload",
    "Writable",
]


@attrs.frozen
class Stat:
    """What a listing says of one file."""

    size: int
    """Bytes."""
    version: str
    """Changes whenever the content does (mtime and inode, an etag); empty if the storage cannot tell."""
    modified_s: float | None = None
    """Set where ``version`` is no more than this time in whole seconds: a quick rewrite would not show in it."""


class Writable(Protocol):
    """Where a payload format writes to."""

    def write(self, data: Any, /) -> int:
        """Append all of ``data`` (bytes-like) and return its length in bytes."""
        ...


class Upload(Protocol):
    """One payload on its way: invisible until published, and then whole. Four methods: the life of a file."""

    def write(self, data: Any, /) -> int:
        """Append all of ``data`` (bytes-like) and return its length in bytes."""
        ...

    def finish(self) -> None:
        """Make what was written durable, still invisible. Called once, after the last `write`."""
        ...

    def publish(self, *, replace: bool) -> None:
        """Make it visible under its name in one step, durably. Called once, after `finish`.

        Without ``replace`` raise `FileExistsError` if the name is taken, and leave what is there as it is; with it,
        a reader sees the old file or the new one, never neither.
        """
        ...

    def abort(self) -> None:
        """Drop what is not published. After `publish`, or called twice, it does nothing."""
        ...


@runtime_checkable
class Storage(Protocol):
    """Files under one root, by relative paths with ``/``. Five methods, because the commit protocol uses five.

    Errors are `OSError`; a path that is not there is `FileNotFoundError`. Parents need not exist.
    """

    def list(self, prefix: str = "") -> Mapping[str, Stat]:
        """Return every file at or below ``prefix`` by its path; empty if there is none. Links are not followed."""
        ...

    def open(self, path: str) -> BinaryIO:
        """Open a file for reading, seekable."""
        ...

    def write(self, path: str, data: bytes) -> None:
        """Create or replace a small file in one step, durably: readers see the old content or the new."""
        ...

    def delete(self, path: str) -> None:
        """Delete a file, a link (not its target) or a whole folder, durably. What is not there is deleted already."""
        ...

    def upload(self, path: str) -> Upload:
        """Begin a payload that will be published as ``path``."""
        ...


@runtime_checkable
class SupportsLinks(Protocol):
    """A storage where a name can point to a file. `OSError` means that it cannot after all."""

    def symlink(self, target: str, path: str) -> None:
        """Make ``path`` a relative symbolic link to ``target``, in one step over what is there."""
        ...

    def hardlink(self, target: str, path: str) -> None:
        """Make ``path`` a second name of the file ``target``, in one step over what is there."""
        ...


@runtime_checkable
class SupportsCopy(Protocol):
    """A storage that copies without sending the bytes through this process. `OSError` means that it cannot."""

    def copy(self, source: str, path: str) -> None:
        """Copy a file or folder over what is there."""
        ...


@runtime_checkable
class SupportsFreeSpace(Protocol):
    """A storage that can fill up."""

    def free_space(self) -> int | None:
        """Return the bytes that can still be written, or None if that is not known."""
        ...


@runtime_checkable
class SupportsPaths(Protocol):
    """A storage whose files have a path on this machine, for trainers that write by themselves."""

    def local_path(self, path: str) -> str:
        """Return the absolute path of a file, there or not."""
        ...

    def stage(self, path: str) -> tuple[str, Upload]:
        """Return an unused absolute path to write a file or folder to, and the upload that publishes it.

        The path ends with the final name, or with the end of a long one: some trainers choose a format by that.
        """
        ...

    def sync(self, path: str) -> None:
        """Make a file or folder that somebody else wrote durable, with its directory entries."""
        ...


@runtime_checkable
class SupportsURLs(Protocol):
    """A storage whose files have a URL, for trainers that write by themselves to where nothing can be staged."""

    def url(self, path: str) -> str:
        """Return the URL of a file, there or not; with whatever password the storage was opened with."""
        ...


@runtime_checkable
class SupportsSweep(Protocol):
    """A storage that keeps unfinished writes somewhere, and can tell those of dead writers."""

    def prepare(self) -> None:
        """Get ready to write, or raise an `OSError` that says why that is impossible."""
        ...

    def sweep(self) -> int:
        """Remove what dead writers left unfinished and return how much; never touch a live one's."""
        ...

    def close(self) -> None:
        """Remove this writer's own staging area."""
        ...


@runtime_checkable
class SupportsCapabilities(Protocol):
    """A storage that differs from place to place, and can say how it is here."""

    def capabilities(self) -> Mapping[str, str]:
        """Return how it does what differs, in words: replacing, creating, copying. Found out by trying, once."""
        ...


class Format(Protocol):
    """How a state becomes a payload and back."""

    @property
    def name(self) -> str:
        """Name that records carry, such as ``"torch"``."""
        ...

    @property
    def extension(self) -> str:
        """Default file extension with its dot."""
        ...

    def write(self, state: Any, stream: Writable) -> None:
        """Write ``state`` front to back, without a second copy of it in memory."""
        ...

    def read(self, stream: BinaryIO, *, weights_only: bool, map_location: Any) -> Any:
        """Read a state. With ``weights_only`` run no code from the payload; raise `UnsafePayloadError` instead."""
        ...

    def refused(self, state: Any) -> Mapping[str, str]:
        """Return what a safe `read` will refuse: the key's path, such as ``state['rng'][0]``, and the type."""
        ...


@runtime_checkable
class SupportsMapping(Protocol):
    """A format whose payloads can be mapped into memory instead of being read."""

    def read_mapped(self, path: str, *, weights_only: bool, map_location: Any) -> Any:
        """Read the state of the file at ``path`` like `Format.read`, its tensors on the file's own pages."""
        ...


@runtime_checkable
class FolderFormat(Protocol):
    """How a state becomes a folder and back, where one file will not do: several processes write into it."""

    @property
    def name(self) -> str:
        """Name that records carry, such as ``"dcp"``."""
        ...

    @property
    def extension(self) -> str:
        """Default extension of the folder's name with its dot."""
        ...

    def write_folder(self, state: Any, path: str) -> None:
        """Write ``state`` into a new folder at ``path``: a path, or a URL where the directory is one."""
        ...

    def read_folder(self, path: str, *, weights_only: bool, map_location: Any) -> Any:
        """Read a state. With ``weights_only`` run no code from the payload; raise `UnsafePayloadError` instead."""
        ...

    def refused(self, state: Any) -> Mapping[str, str]:
        """See `Format.refused`."""
        ...


class Taken(Protocol):
    """A copy of a state on its way to a payload, which nothing changes any more."""

    def wait(self) -> Any:
        """Return what a format writes, once all of it is there. For the thread that writes it."""
        ...

    def release(self) -> None:
        """Let go of the copy, written or not. Twice does nothing."""
        ...


class Snapshotting(Protocol):
    """Copies states for a save in the background."""

    def take(self, state: Any) -> Taken:
        """Copy a state: what is done to it from now on is not in the copy. Raise `SaveError` if that cannot be."""
        ...


@runtime_checkable
class SupportsSnapshots(Protocol):
    """A format whose states are more than this process has: it copies them itself."""

    def snapshots(self, copies: int) -> Snapshotting:
        """Return what copies them, at most ``copies`` at a time."""
        ...


class Clock(Protocol):
    """The time."""

    def time(self) -> float:
        """Return seconds since the Unix epoch; must not go back while the process lives."""
        ...


class Ranks(Protocol):
    """The processes of one training. Each method is a collective: every rank calls it, in the same order."""

    @property
    def rank(self) -> int:
        """This process's number, from 0."""
        ...

    @property
    def size(self) -> int:
        """How many processes there are."""
        ...

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's ``value`` on every rank; what the others pass is not looked at. Small, picklable."""
        ...

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's ``value`` on every rank, in the order of ranks. Small, picklable."""
        ...

    def highest(self, *values: float) -> tuple[float, ...]:
        """Return the highest of each of the values over all ranks: the cheapest way to agree."""
        ...

    def meet(self, timeout_s: float) -> bool:
        """Return whether all ranks call this within ``timeout_s`` seconds; False is the end of talking.

        For when something went wrong, and nobody knows whether the others will ever come.
        """
        ...


class Mailbox(Protocol):
    """Where rank 0 leaves word for a thread of each other rank: beside whatever the ranks do in their loops."""

    @property
    def group(self) -> Any:
        """A process group (``torch.distributed``) that only those threads use."""
        ...

    def post(self, key: str, word: str) -> None:
        """Leave a word under a key, in the place of what was there, for all ranks to read from now on."""
        ...

    def look(self, key: str) -> str | None:
        """Return the word under a key, or None if there is none yet. Waits for nobody."""
        ...

    def gather(self, value: Any) -> list[Any]:
        """See `Ranks.gather`: a collective of those threads."""
        ...

    def close(self) -> None:
        """Give the group back. Talks to nobody; a second call does nothing."""
        ...


@runtime_checkable
class SupportsMailbox(Protocol):
    """Ranks whose threads can work together too."""

    def mailbox(self) -> Mailbox:
        """Return a new one: a collective."""
        ...


class Listener:
    """Gets told when a checkpoint is really there, or really gone. Subclass it, and override what you need.

    A listener that raises does not stop training: the error becomes a warning.
    """

    def on_opened(self, manager: Any) -> None:
        """Called once by the `CheckpointManager` that it was given to, before anything else."""

    def on_saved(self, record: Any) -> None:
        """Called after the payload and its record are durable and the aliases point to it."""

    def on_attached(self, record: Any) -> None:
        """Called after metrics came to a checkpoint that was saved before, and the aliases followed."""

    def on_retired(self, record: Any) -> None:
        """Called after the checkpoint was removed."""
