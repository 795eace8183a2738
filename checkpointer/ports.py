"""What the manager needs from outside: storage, payload format, clock, ranks. Each is a Protocol of a few methods."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO, Protocol, runtime_checkable

import attrs


@attrs.frozen
class Stat:
    """One file in a listing."""

    size: int
    """Bytes."""
    version: str
    """Changes whenever the content does (mtime and inode, or an etag); empty if the storage has no such value."""
    modified_s: float | None = None
    """Set if ``version`` is only this time in whole seconds. A rewrite within that second may then keep the version."""


class Writable(Protocol):
    """Where a payload format writes to."""

    def write(self, data: Any, /) -> int:
        """Append all of ``data`` (bytes-like) and return its length in bytes."""


@runtime_checkable
class SupportsDescriptor(Writable, Protocol):
    """A digesting stream that may be a file of this machine. Then another process may write the whole file instead."""

    @property
    def algorithm(self) -> str:
        """The algorithm of the digest."""

    @property
    def descriptor(self) -> int | None:
        """The descriptor of the empty file, or None if it is not a file."""

    def count_to(self, size: int) -> None:
        """Note that the other process has written ``size`` bytes so far."""

    def start_over(self) -> None:
        """Continue with a new empty file. What the other process may still write goes to a file that has no name."""

    def take_over(self, size: int, hexdigest: str) -> None:
        """Note that the other process has written the whole file, and with which digest."""


class Upload(Writable, Protocol):
    """A payload that is being written. It is invisible until it is published, and then it is complete."""

    def finish(self) -> None:
        """Make the written bytes durable, still invisible. Called once, after the last `write`."""

    def publish(self, *, replace: bool) -> None:
        """Make the file visible under its name in one step, durably. Called once, after `finish`.

        Without ``replace``, raise `FileExistsError` if the name is taken, and leave the existing file as it is.
        With ``replace``, a reader sees the old file or the new one at any moment, never neither.
        """

    def abort(self) -> None:
        """Drop an upload that is not published. After `publish`, and when called twice, do nothing."""


@runtime_checkable
class Storage(Protocol):
    """Files under one root, by relative paths with ``/``. It has the five methods that the commit protocol uses.

    Errors are `OSError`. A missing path is `FileNotFoundError`. Parent folders need not exist.
    """

    def list(self, prefix: str = "") -> Mapping[str, Stat]:
        """Return every file at or below ``prefix`` by its path; empty if there is none. Links are not followed."""

    def open(self, path: str) -> BinaryIO:
        """Open a file for reading, seekable."""

    def write(self, path: str, data: bytes) -> None:
        """Create or replace a small file in one step, durably. Readers see the old content or the new."""

    def delete(self, path: str) -> None:
        """Delete a file, a link (not its target) or a whole folder, durably. Deleting a missing path succeeds."""

    def upload(self, path: str) -> Upload:
        """Begin a payload that will be published as ``path``."""


@runtime_checkable
class SupportsLinks(Protocol):
    """A storage where a name can point to a file. It raises `OSError` if links turn out to be impossible."""

    def symlink(self, target: str, path: str) -> None:
        """Make ``path`` a relative symbolic link to ``target``. Replace an existing file in one step."""

    def hardlink(self, target: str, path: str) -> None:
        """Make ``path`` a second name of the file ``target``. Replace an existing file in one step."""


@runtime_checkable
class SupportsCopy(Protocol):
    """A storage that copies without sending the bytes through this process. It raises `OSError` if it cannot."""

    def copy(self, source: str, path: str) -> None:
        """Copy a file or folder, and replace an existing one."""


@runtime_checkable
class SupportsScratch(Protocol):
    """A storage that is quicker with a small file that need not survive a crash of the machine."""

    def write_scratch(self, path: str, data: bytes) -> None:
        """Do as `Storage.write`, but let the system decide when the file becomes durable."""

    def delete_scratch(self, path: str) -> None:
        """Delete a file, not durably. Deleting a missing path succeeds."""


@runtime_checkable
class SupportsFreeSpace(Protocol):
    """A storage that can fill up."""

    def free_space(self) -> int | None:
        """Return the bytes that can still be written, or None if that is not known."""


@runtime_checkable
class SupportsPaths(Protocol):
    """A storage whose files have a path on this machine, for trainers that write by themselves."""

    def local_path(self, path: str) -> str:
        """Return the absolute path of a file, whether it exists or not."""

    def stage(self, path: str) -> tuple[str, Upload]:
        """Return an unused absolute path to write a file or folder to, and the upload that publishes it.

        The path ends with the final name (or with the end of a long name), because some trainers choose a format by
        the extension.
        """

    def sync(self, path: str) -> None:
        """Make a file or folder that another program wrote durable, with its directory entries."""


@runtime_checkable
class SupportsPieces(Protocol):
    """A storage that fills many buffers at once, quicker than one stream does."""

    def read_pieces(self, path: str, pieces: Sequence[tuple[int, memoryview]]) -> Iterator[int]:
        """Fill each buffer with the file's bytes from its offset on (offsets ascend).

        Yield the number of filled pieces so far, in order: a piece counts when it and all before it are filled.
        Raise `FileNotFoundError`, or `OSError` if the file ends early or was replaced meanwhile.
        """


@runtime_checkable
class SupportsUploads(Protocol):
    """A storage that keeps the parts of an upload that was not finished, although no listing shows them."""

    def abort_uploads(self, path: str) -> None:
        """Drop the unfinished uploads of files at or below ``path``, of all writers."""


@runtime_checkable
class SupportsURLs(Protocol):
    """A storage whose files have a URL, for trainers that write by themselves where nothing can be staged."""

    def url(self, path: str) -> str:
        """Return the URL of a file, whether it exists or not. It includes the password the storage was opened with."""


@runtime_checkable
class SupportsSweep(Protocol):
    """A storage that keeps unfinished writes in a staging area, and can find those of dead writers."""

    def prepare(self) -> None:
        """Get ready to write, or raise an `OSError` that says why writing is impossible."""

    def sweep(self) -> int:
        """Remove unfinished writes of dead writers and return their number. Keep those of live writers."""

    def close(self) -> None:
        """Remove this writer's own staging area."""


@runtime_checkable
class SupportsDiscard(Protocol):
    """A storage that can remove the unfinished writes of a writer that may be alive, so that this harms nothing."""

    def discard(self, owner: str) -> None:
        """Remove what this writer has staged. If it goes on, the write that it was in fails."""


@runtime_checkable
class SupportsServerTime(Protocol):
    """A storage that stamps its files with a clock, which may differ from this machine's."""

    def server_time(self) -> float | None:
        """Return seconds since the Unix epoch by that clock, or None if the storage does not show it."""


@runtime_checkable
class SupportsCapabilities(Protocol):
    """A storage that works differently from server to server, or from filesystem to filesystem."""

    def capabilities(self) -> Mapping[str, str]:
        """Return how this storage replaces, creates and copies, as text. The storage tries it out once."""


class _AnyFormat(Protocol):
    @property
    def name(self) -> str:
        """Name in records, such as ``"torch"``."""

    @property
    def extension(self) -> str:
        """Default extension of the file's or folder's name, with its dot."""

    def refused(self, state: Any) -> Mapping[str, str]:
        """Return what a safe read will refuse: the key's path, such as ``state['rng'][0]``, and the type."""


class Format(_AnyFormat, Protocol):
    """How a state becomes a payload and back."""

    def write(self, state: Any, stream: Writable) -> None:
        """Write ``state`` front to back, without a second copy of it in memory. Must not change the state."""

    def read(self, stream: BinaryIO, *, weights_only: bool, map_location: Any) -> Any:
        """Read a state. With ``weights_only`` run no code from the payload; raise `UnsafePayloadError` instead."""


@runtime_checkable
class SupportsMapping(Protocol):
    """A format whose payloads can be mapped into memory instead of being read."""

    def read_mapped(self, path: str, *, weights_only: bool, map_location: Any) -> Any:
        """Read the state of the file at ``path`` like `Format.read`, its tensors on the file's own pages."""


@runtime_checkable
class FolderFormat(_AnyFormat, Protocol):
    """How a state becomes a folder and back, if several processes write into it."""

    def write_folder(self, state: Any, path: str) -> None:
        """Write ``state`` into a new folder at ``path``: a path, or a URL if the directory is one."""

    def read_folder(self, path: str, *, weights_only: bool, map_location: Any) -> Any:
        """Read a state. With ``weights_only`` run no code from the payload; raise `UnsafePayloadError` instead."""


@runtime_checkable
class SupportsFileDigests(Protocol):
    """A format of folders that digests each file while it writes it, and verifies what it reads."""

    def write_digested(self, state: Any, path: str, *, algorithm: str) -> Mapping[str, tuple[int, str]] | None:
        """Do as `FolderFormat.write_folder`. Return size (bytes) and digest (hex digits) of each file in the folder.

        Returns None if they are not known. Then the files are read for it.
        """

    def read_verified(
        self,
        path: str,
        *,
        files: Mapping[str, tuple[int, str]],
        algorithm: str,
        everything: bool,
        weights_only: bool,
        map_location: Any,
    ) -> Any:
        """Do as `FolderFormat.read_folder`; raise `CorruptError` if what was read is not what was written.

        ``files`` is what `write_digested` returned. ``everything`` also verifies what is not read.
        """


class Taken(Protocol):
    """A copy of a state that later training steps do not change."""

    def wait(self) -> Any:
        """Return what a format writes, once the copy is complete. The writer thread calls it."""

    def release(self) -> None:
        """Free the copy, written or not. A second call does nothing."""


class Snapshotting(Protocol):
    """Copies states for a save in the background."""

    def take(self, state: Any) -> Taken:
        """Copy a state, so that later changes to it are not in the copy. Raise `SaveError` if that is impossible."""


@runtime_checkable
class SupportsSnapshots(Protocol):
    """A format that copies its states itself, because they are more than this process holds."""

    def snapshots(self, copies: int) -> Snapshotting:
        """Return an object that makes at most ``copies`` copies at a time."""


class Clock(Protocol):
    """The time."""

    def time(self) -> float:
        """Return seconds since the Unix epoch. Within a process this must not go back."""


class Ranks(Protocol):
    """The processes of one training. Each method is a collective: every rank calls it, in the same order."""

    @property
    def rank(self) -> int:
        """This process's number, from 0."""

    @property
    def size(self) -> int:
        """The number of processes."""

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's ``value`` on every rank; the values of other ranks are ignored. Small, picklable."""

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's ``value`` on every rank, in the order of ranks. Small, picklable."""

    def highest(self, *values: float) -> tuple[float, ...]:
        """Return the highest of each of the values over all ranks: the cheapest way to agree."""

    def barrier(self, timeout_s: float) -> bool:
        """Return whether all ranks reach this call within ``timeout_s`` seconds. After False, call no collective.

        It is called after an error, when some ranks may never arrive.
        """


class Mailbox(Protocol):
    """A key-value store in which rank 0 leaves messages for a thread of each other rank."""

    @property
    def group(self) -> Any:
        """A process group (``torch.distributed``) that only those threads use."""

    def post(self, key: str, message: str) -> None:
        """Store a message under a key, and replace the one before. All ranks can read it from now on."""

    def look(self, key: str) -> str | None:
        """Return the message under a key, or None if there is none yet. Does not wait."""

    def gather(self, value: Any) -> list[Any]:
        """See `Ranks.gather`: a collective of those threads."""

    def close(self) -> None:
        """Release the group without communication. A second call does nothing."""


@runtime_checkable
class SupportsMailbox(Protocol):
    """Ranks whose threads can work together too."""

    def mailbox(self) -> Mailbox:
        """Return a new mailbox. This is a collective."""


class Listener:
    """Is called when a checkpoint was committed, changed or removed. Subclass it, and override what you need.

    An exception of a listener does not stop training; it becomes a warning.
    """

    def on_opened(self, manager: Any) -> None:
        """Called once by the `CheckpointManager` that got the listener, before anything else."""

    def on_saved(self, record: Any) -> None:
        """Called after the payload and its record are durable and the aliases point to it."""

    def on_attached(self, record: Any) -> None:
        """Called after metrics were attached to a saved checkpoint and the aliases were updated."""

    def on_retired(self, record: Any) -> None:
        """Called after the checkpoint was removed."""
