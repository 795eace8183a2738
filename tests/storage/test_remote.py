"""The parts of remote storage that need no server: retries, cut reads, errors, times and names."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import errno
import io
import logging
from collections.abc import Callable, Mapping
from typing import Any

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpointer import CheckpointManager, EverySteps, KeepLast, Policy
from checkpointer._secrets import without_secrets
from checkpointer.errors import StorageError
from checkpointer.storage import open_storage
from checkpointer.storage.driver_differences import (
    as_native_errors,
    as_os_errors,
    escaped,
    is_refusal,
    modified_s,
    stat_of,
    unescaped,
)
from checkpointer.storage.reader import reader
from checkpointer.storage.retry import Retry, is_transient

QUICK = Retry(deadline_s=30, first_wait_s=0.001)


class ClientPayloadError(Exception):
    """Like aiohttp's error, which is not an `OSError`."""


class EndpointConnectionError(type("ConnectionError", (Exception,), {})):  # type: ignore[misc]
    """Like botocore's error, whose base class only has the name of Python's."""


class HttpResponseError(Exception):
    """Like Azure's error, with the status in an attribute."""

    def __init__(self, status_code: int) -> None:
        super().__init__(status_code)
        self.status_code = status_code


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError(),
        TimeoutError(),
        BrokenPipeError(),
        OSError(errno.EREMOTEIO, "500 from a server, by s3fs"),
        OSError(errno.EBUSY, "503 from a server, by s3fs"),
        ClientPayloadError("cut"),
        EndpointConnectionError("refused"),
        EOFError(),
        OSError("Socket is closed"),
        ValueError("Can't create any SFTP connections!"),
        HttpResponseError(503),
        HttpResponseError(429),
    ],
    ids=repr,
)
def test_failures_of_network_and_server_are_transient(error: Exception) -> None:
    """The same request may succeed soon."""
    assert is_transient(error)


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(),
        FileExistsError(),
        PermissionError(),
        OSError(errno.ENOSPC, "full"),
        OSError(errno.EINVAL, "refused"),
        ValueError(),
        HttpResponseError(403),
        EndpointConnectionError("certificate verify failed: self-signed certificate"),
        KeyboardInterrupt(),
    ],
    ids=repr,
)
def test_permanent_errors_are_not_transient(error: BaseException) -> None:
    """A repeat would only delay the error."""
    assert not is_transient(error)


def failing(*errors: Exception) -> Callable[[], str]:
    """Return a function that raises these errors, one at each call, and then succeeds."""
    left = [*errors]

    def do() -> str:
        if left:
            raise left.pop(0)
        return "done"

    return do


def test_transient_errors_are_tried_again_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    """The log has the request, the error, and the time of the next attempt."""
    caplog.set_level(logging.WARNING, "checkpointer")

    assert "done" == QUICK(failing(ConnectionResetError("cut"), TimeoutError("slow")), "writing a")
    assert 2 == len(caplog.messages)
    assert caplog.messages[0].startswith("writing a failed (ConnectionResetError: cut); next attempt in ")


def in_a_thread(do: Callable[[], str]) -> str:
    return QUICK(do, "a request")


def in_a_loop(do: Callable[[], str]) -> str:
    async def request() -> str:
        return do()

    return asyncio.run(QUICK.run(lambda: request(), "a request"))


@pytest.mark.parametrize("run", [in_a_thread, in_a_loop])
def test_a_request_is_repeated_until_it_succeeds(run: Callable[[Callable[[], str]], str]) -> None:
    """The result is that of the last attempt, and every coroutine is awaited."""
    assert "done" == run(failing(ConnectionResetError("once"), TimeoutError("twice")))


@pytest.mark.parametrize("run", [in_a_thread, in_a_loop])
def test_a_permanent_error_is_not_repeated(run: Callable[[Callable[[], str]], str]) -> None:
    """It is raised unchanged at the first attempt."""
    do = failing(PermissionError("not yours"))
    with pytest.raises(PermissionError, match="not yours"):
        run(do)
    assert "done" == do()


def test_the_last_error_is_raised_when_the_deadline_has_passed() -> None:
    """Repeats end at the deadline."""
    with pytest.raises(ConnectionResetError, match="third"):
        Retry(deadline_s=0)(failing(ConnectionResetError("third")), "writing a")


class CutStream(io.BytesIO):
    """A file whose connection is cut at each read after the first few bytes."""

    def __init__(self, data: bytes, after: int, details: Mapping[str, Any]) -> None:
        super().__init__(data)
        self.details = dict(details)
        self._left = after

    def read(self, size: int | None = -1, /) -> bytes:
        if self._left <= 0:
            msg = "cut"
            raise ConnectionResetError(msg)
        data = super().read(min(size if size and size > 0 else self._left, self._left))
        self._left -= len(data)
        return data


def test_a_cut_read_goes_on_where_it_was() -> None:
    """Each connection delivers seven bytes; all bytes arrive in order."""
    data = bytes(range(100))
    opened: list[CutStream] = []

    def begin() -> CutStream:
        opened.append(CutStream(data, 7, {"size": 100, "ETag": "x"}))
        return opened[-1]

    with reader(begin, "a", QUICK, contextlib.nullcontext()) as stream:
        assert data == b"".join(iter(lambda: stream.read(9), b""))
    assert len(opened) > 10


def test_a_file_that_was_replaced_between_two_connections_is_not_mixed() -> None:
    """The first part of one file and the rest of another are not a checkpoint."""
    tags = iter("ab")

    def begin() -> CutStream:
        return CutStream(bytes(100), 7, {"size": 100, "ETag": next(tags)})

    with reader(begin, "a", QUICK, contextlib.nullcontext()) as stream, pytest.raises(OSError, match="was replaced"):
        stream.read()


def test_a_file_that_was_replaced_before_its_first_byte_is_read_as_it_is_now() -> None:
    """If another writer replaces a record at this moment, that is not an error."""
    streams = iter([CutStream(b"old", 0, {"ETag": "a"}), CutStream(b"new", 7, {"ETag": "b"})])

    with reader(lambda: next(streams), "a", QUICK, contextlib.nullcontext()) as stream:
        assert b"new" == stream.read(3)


def test_a_file_that_became_shorter_before_its_first_byte_is_read_as_it_is_now() -> None:
    """S3 refuses a range beyond the end of the new file."""

    class Shorter(CutStream):
        def read(self, size: int | None = -1, /) -> bytes:
            raise OSError(errno.EINVAL, "InvalidRange")

    streams = iter([Shorter(b"longer", 9, {"ETag": "a"}), CutStream(b"new", 7, {"ETag": "b"})])

    with reader(lambda: next(streams), "a", QUICK, contextlib.nullcontext()) as stream:
        assert b"new" == stream.read(3)


def test_a_file_that_was_replaced_after_its_last_byte_was_read_whole() -> None:
    """Its end is known from its size. A request for more would read the other file."""
    streams = iter([CutStream(b"old", 3, {"size": 3, "ETag": "a"}), CutStream(b"new", 7, {"size": 3, "ETag": "b"})])

    with reader(lambda: next(streams), "a", QUICK, contextlib.nullcontext()) as stream:
        assert b"old" == stream.read(100)


def test_errors_of_drivers_come_out_as_os_errors() -> None:
    """They keep the driver's message."""
    with pytest.raises(OSError, match=r"^\[Errno 5\] listing: ClientPayloadError: cut$"), as_os_errors("listing"):
        raise ClientPayloadError("cut")


def test_os_errors_of_drivers_come_out_as_what_their_number_means() -> None:
    """SMB's error for a missing file is not a `FileNotFoundError`."""

    class DriverError(OSError):
        pass

    with pytest.raises(FileNotFoundError, match="gone"), as_native_errors():
        raise DriverError(errno.ENOENT, "gone")


@pytest.mark.parametrize(
    "error",
    [
        FileExistsError(),
        OSError(errno.EEXIST, "SMB"),
        OSError(errno.EINVAL, "At least one of the pre-conditions you specified did not hold"),
        RuntimeError("The specified blob already exists."),
    ],
    ids=repr,
)
def test_a_refusal_is_recognised_for_each_driver(error: Exception) -> None:
    """Drivers report a failed exclusive creation in different ways."""
    assert is_refusal(error)
    assert not is_refusal(OSError(errno.EINVAL, "bucket name"))


@given(st.text())
def test_escaped_names_come_back(name: str) -> None:
    """Escaped names have none of the characters that the server refuses."""
    unsafe = '"*:<>?|'
    assert name == unescaped(escaped(name, unsafe), unsafe)
    assert not set(unsafe).intersection(escaped(name, unsafe))


@pytest.mark.parametrize(
    "info",
    [
        {"mtime": datetime.datetime(2026, 1, 1, tzinfo=datetime.timezone.utc)},
        {"mtime": 1767225600},
        {"updated": "2026-01-01T00:00:00Z"},
        {"modificationTime": 1767225600000},
    ],
    ids=str,
)
def test_times_are_read_under_every_name_and_type(info: Mapping[str, Any]) -> None:
    """Drivers use datetimes, numbers, text and milliseconds."""
    assert 1767225600.0 == modified_s(info)
    assert 1767225600.0 == stat_of(info, has_tags=True).modified_s


def test_tags_are_used_only_if_they_change_with_the_content() -> None:
    """WsgiDAV builds tags from the second, the size and an inode, which may be used again."""
    info = {"size": 3, "etag": "abc", "modified": datetime.datetime.fromtimestamp(5, datetime.timezone.utc)}

    assert ("abc", None) == (stat_of(info, has_tags=True).version, stat_of(info, has_tags=True).modified_s)
    assert ("5.000000", 5.0) == (stat_of(info, has_tags=False).version, stat_of(info, has_tags=False).modified_s)


def test_the_quotes_of_a_tag_are_no_part_of_the_version() -> None:
    """adlfs 2026.2 quotes the tag in a listing, and does not in the answer about one file."""
    quoted, plain = ({"size": 3, "etag": tag} for tag in ('"0x1"', "0x1"))

    assert stat_of(plain, has_tags=True) == stat_of(quoted, has_tags=True)


def test_a_password_in_the_url_is_never_shown() -> None:
    """Neither the storage nor its errors show it."""
    assert "sftp://host/runs" == without_secrets("sftp://me:secret@host/runs")
    assert "sftp://host/a@b" == without_secrets("sftp://me:se@cret@host/a@b")
    with pytest.raises((StorageError, OSError)) as caught:
        open_storage("sftp://me:secret@127.0.0.1:1/runs", "me", {"retry": Retry(deadline_s=0)})
    assert "secret" not in str(caught.value)


def test_verbose_says_what_the_storage_can_do(caplog: pytest.LogCaptureFixture) -> None:
    """It is logged once, at the start."""
    caplog.set_level(logging.INFO, "checkpointer")
    policy = Policy(EverySteps(1), [KeepLast(1)])
    with CheckpointManager("memory://verbose", policy, state=dict, verbose=True):
        pass

    # Older versions of fsspec overwrite an existing file in memory, so `create` is not checked.
    found = [text for text in caplog.messages if text.startswith("memory://verbose: replace: PUT; create: ")]
    assert 1 == len(found)
    assert found[0].endswith("; copy: on the server")


def test_a_trainer_writes_to_an_unused_url() -> None:
    """Nothing can be staged there. It is never an alias or another checkpoint, and half a write does not count."""
    filesystem = fsspec.filesystem("memory")
    urls: list[str] = []

    def save(url: str) -> None:
        urls.append(url)
        filesystem.pipe(f"{url}/part", b"half")
        if len(urls) == 3:
            raise KeyboardInterrupt
        filesystem.pipe(f"{url}/rest", b"whole")

    policy = Policy(EverySteps(1), [], name="{step}", last="copy")
    manager = CheckpointManager("memory://written", policy, save=save)
    for step in (1, 2):
        manager.observe({}, step=step, epoch=0)
    with pytest.raises(KeyboardInterrupt):
        manager.observe({}, step=3, epoch=0)
    manager.close()
    assert [f"memory://written/step={step}.ckpt" for step in (1, 2, 3)] == urls
    assert b"whole" == filesystem.cat("memory://written/last.ckpt/rest")

    with CheckpointManager("memory://written", policy, save=save) as after:
        found = after.session.locate()
        assert found is not None
        assert (2, "memory://written/step=2.ckpt") == (found[0].step, found[1])
        after.observe({}, step=3, epoch=0)
        assert ["step=3.ckpt"] == [record.name for record in after.records]  # What was left of it is removed.
    assert b"half" == filesystem.cat("memory://written/step=3.ckpt/part")
