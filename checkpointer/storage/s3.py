"""S3 and what speaks its protocol: multipart uploads in parallel, conditional PUT where the server honours it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import io
import json
import math
import threading
import uuid
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any, Final

import fsspec.asyn

from checkpointer.errors import RecordError
from checkpointer.ports import Upload
from checkpointer.records.codec import parse_json
from checkpointer.storage.connection import Connection
from checkpointer.storage.drivers import as_os_errors, is_refusal, modified_s
from checkpointer.storage.publish import STAGING, Publisher
from checkpointer.storage.remote import FsspecStorage
from checkpointer.storage.reread import read_whole
from checkpointer.storage.retry import Retry

__all__ = ["S3Storage"]

PARTS_AT_ONCE: Final = 4
_PART: Final = 16 << 20
_LARGE_PART: Final = 128 << 20
_NUM_SMALL_PARTS: Final = 5000
"""A multipart upload has at most 10 000 parts: with these sizes it may have 700 GB."""
_COPY_PART: Final = 512 << 20
_MAX_COPY: Final = 5 << 30
"""Larger objects are copied in parts."""
_MARKER: Final = ".multipart"
_MAX_MARKER: Final = 1 << 16
_TOKEN: Final = "checkpointer-token"


class S3Connection(Connection):
    """Requests to a bucket, by s3fs."""

    def __init__(self, url: str, retry: Retry, options: Mapping[str, Any]) -> None:
        # Attempts are counted in one place only, in `Retry`: else a deadline would mean little.
        config = {"retries": {"total_max_attempts": 1}, **options.get("config_kwargs", {})}
        super().__init__(url, retry, {**options, "config_kwargs": config})
        self.fs.retries = 1
        self._client: Any = None
        self._bucket, self._prefix, _ = self.fs.split_path(self.root)

    def key(self, path: str) -> str:
        """Return the object's key."""
        return f"{self._prefix}/{path}".strip("/") if path else self._prefix

    def call(self, method: str, **arguments: Any) -> Any:
        """Make a request, with retries, and return the reply."""
        return self.attempt(method, lambda: self.call_once(method, **arguments))

    def call_once(self, method: str, **arguments: Any) -> Any:
        """Make a request and return the reply."""
        return fsspec.asyn.sync(self.fs.loop, self._call, method, arguments)

    def submit(self, method: str, **arguments: Any) -> Future[Any]:
        """Begin a request, with retries, in the background."""

        async def call() -> Any:
            what = f"{method} in {self}"
            with as_os_errors(what), self.giving_up():
                return await self.patience.run(lambda: self._call(method, arguments), what)

        return asyncio.run_coroutine_threadsafe(call(), self.fs.loop)

    async def _call(self, method: str, arguments: Mapping[str, Any]) -> Any:
        client = await self.fs.set_session()
        if client is not self._client:
            client.meta.events.register_last("before-call.s3", _without_expect)
            self._client = client
        request = self.fs._call_s3(method, Bucket=self._bucket, **arguments)
        # Half of the time that there is: the driver's own timeouts do not notice a body that the server stops taking.
        limit_s = self.retry.deadline_s / 2
        try:
            return await asyncio.wait_for(request, limit_s)
        except asyncio.TimeoutError as error:
            msg = f"{method} was not answered within {limit_s:g} s"
            raise TimeoutError(errno.ETIMEDOUT, msg) from error

    def find(self, prefix: str) -> dict[str, Mapping[str, Any]]:
        """See `Connection.find`: one request for a name, and one per 1000 objects for a whole directory."""
        key = self.key(prefix)
        below = f"{key}/" if key else ""
        if not prefix:
            found, _ = self._list(below, max_pages=None)
        else:
            found, is_all = self._list(key, max_pages=1)
            if not is_all:
                # Many others begin with its name: ask for exactly this object, and for what is below it.
                exact = self.head(key)
                found = {**self._list(below, max_pages=None)[0], **({key: exact} if exact else {})}
        root = len(self._prefix) + 1 if self._prefix else 0
        return {
            name[root:]: info
            for name, info in found.items()
            if (name.startswith(below) or (prefix and name == key)) and not name.endswith("/")
        }

    def _list(self, key_prefix: str, max_pages: int | None) -> tuple[dict[str, Mapping[str, Any]], bool]:
        found: dict[str, Mapping[str, Any]] = {}
        more: dict[str, str] = {}
        while max_pages is None or max_pages > 0:
            page = self.call("list_objects_v2", Prefix=key_prefix, **more)
            for item in page.get("Contents", ()):
                found[item["Key"]] = {**item, "size": item["Size"]}
            if not page.get("IsTruncated"):
                return found, True
            more = {"ContinuationToken": page["NextContinuationToken"]}
            max_pages = None if max_pages is None else max_pages - 1
        return found, False

    def head(self, key: str) -> dict[str, Any] | None:
        """Return what the server says of one object, its metadata included; None if it is not there."""
        try:
            head = self.call("head_object", Key=key)
        except FileNotFoundError:
            return None
        return {**head, "size": head["ContentLength"]}

    def abort(self, key: str, upload: str) -> None:
        """Drop a multipart upload; one that is not there is dropped already."""
        with contextlib.suppress(FileNotFoundError):
            self.call("abort_multipart_upload", Key=key, UploadId=upload)

    def _remove(self, path: str) -> None:
        # One by one: MinIO's kind wants a checksum with a bulk delete that s3fs does not send.
        with contextlib.suppress(FileNotFoundError):
            self.call_once("delete_object", Key=self.key(path))


class S3Placing(Publisher):
    """Conditional PUT instead of whatever s3fs makes of exclusive creation."""

    _to: S3Connection

    def _put(self, path: str, data: bytes) -> None:
        self._to.call_once("put_object", Key=self._to.key(path), Body=data)

    def _create_exclusively(self, path: str, data: bytes) -> None:
        self._to.call_once("put_object", Key=self._to.key(path), Body=data, IfNoneMatch="*")

    def _copy(self, source: str, target: str) -> None:
        size = int(self._to.find(source)[source]["size"])
        origin = {"Bucket": self._to._bucket, "Key": self._to.key(source)}
        if size <= _MAX_COPY:
            self._to.call_once("copy_object", CopySource=origin, Key=self._to.key(target))
            return
        parts = Multipart(self._to, self, target)
        try:
            for start in range(0, size, _COPY_PART):
                end = min(start + _COPY_PART, size) - 1
                parts.send("upload_part_copy", CopySource=origin, CopySourceRange=f"bytes={start}-{end}")
            parts.complete(replace=True)
        finally:
            parts.abort()


class S3Storage(FsspecStorage):
    """An ``s3://bucket/prefix``, through s3fs.

    Args:
        url: ``s3://bucket/prefix``.
        owner: Id of the writer, from `checkpointer.storage.owner.new_owner`.
        retry: How long to go on trying when the server or the way to it fails.
        **options: What ``s3fs.S3FileSystem`` takes: ``key``, ``secret``, ``endpoint_url``, ``client_kwargs`` and so on.
            Without them credentials come from where every AWS tool looks for them.
    """

    _connection: S3Connection
    _placing: S3Placing

    def __init__(self, url: str, owner: str = "", *, retry: Retry | None = None, **options: Any) -> None:
        self._connection = S3Connection(url, retry or Retry(), options)
        self._placing = S3Placing(self._connection, owner)

    def upload(self, path: str) -> Upload:
        """See `Storage.upload`."""
        return S3Upload(self._connection, self._placing, path)

    def _sweep_one(self, path: str) -> None:
        if path.endswith(_MARKER):
            self._abort_marked(path)
        super()._sweep_one(path)

    def _abort_marked(self, path: str) -> None:
        target, upload = _read_marker(self._connection, path)
        if target:
            key = self._connection.key(target)
            for each in [upload] if upload else _unmarked(self._connection, path, key):
                self._connection.abort(key, each)


def _read_marker(connection: S3Connection, path: str) -> tuple[str, str]:
    """Return for which path an upload was begun and its id, which is empty if it is not known."""
    with contextlib.suppress(RecordError, FileNotFoundError):
        marker = parse_json(read_whole(lambda: connection.open(path), _MAX_MARKER), path, _MAX_MARKER)
        if isinstance(marker, dict) and all(isinstance(marker.get(k), str) for k in ("path", "upload")):
            return marker["path"], marker["upload"]
    return "", ""


def _unmarked(connection: S3Connection, path: str, key: str) -> list[str]:
    """Return the uploads of a key that were begun when this marker was written, and that no marker names."""
    found = connection.find(STAGING)
    since = modified_s(found.get(path, {}))
    if since is None:
        return []
    # Times in a listing may be whole seconds. What was begun after the last retry is somebody else's.
    window = math.floor(since), since + 2 * connection.retry.deadline_s + 1
    marked = {_read_marker(connection, other)[1] for other in found if other.endswith(_MARKER)}
    return [
        upload["UploadId"]
        for upload in connection.call("list_multipart_uploads", Prefix=key).get("Uploads", ())
        if upload["Key"] == key
        and upload["UploadId"] not in marked
        and window[0] <= upload["Initiated"].timestamp() <= window[1]
    ]


class Multipart:
    """A multipart upload: parts go out in parallel, and the object appears when it is completed."""

    def __init__(self, connection: S3Connection, placing: Publisher, path: str) -> None:
        self._connection = connection
        self._placing = placing
        self._path = path
        self._key = connection.key(path)
        self._token = uuid.uuid4().hex
        self._marker = f"{placing.staging}/{self._token}{_MARKER}"
        self._sent: list[Future[Any]] = []
        self._slots = threading.BoundedSemaphore(PARTS_AT_ONCE)
        self._id = ""
        # So that `sweep` can abort it whenever this process dies: the server itself does not say whose it is.
        self._mark()
        self._num_begun = 0
        self._id = connection.attempt(f"beginning to upload {path}", self._begin)
        self._is_open = True
        try:
            # If a reply was lost there is another upload, whose id nobody knows.
            begun = _unmarked(connection, self._marker, self._key) if self._num_begun > 1 else []
            self._mark()
            for upload in begun:
                if upload != self._id:
                    connection.abort(self._key, upload)
        except OSError:
            self.abort()
            raise

    def _begin(self) -> str:
        self._num_begun += 1
        metadata = {_TOKEN: self._token}
        reply = self._connection.call_once("create_multipart_upload", Key=self._key, Metadata=metadata)
        return str(reply["UploadId"])

    def _mark(self) -> None:
        self._placing.put(self._marker, json.dumps({"path": self._path, "upload": self._id}).encode())

    @property
    def next_part_size(self) -> int:
        """Bytes that the next part should have; only the last may have fewer."""
        if getattr(self._connection.fs, "fixed_upload_size", False):
            return 4 * _PART
        return _PART if len(self._sent) < _NUM_SMALL_PARTS else _LARGE_PART

    def send(self, method: str, **arguments: Any) -> None:
        """Send one part as soon as fewer than `PARTS_AT_ONCE` are on their way."""
        self._slots.acquire()
        for future in self._sent:
            if future.done() and future.exception() is not None:
                self._slots.release()
                future.result()
        number = len(self._sent) + 1
        future = self._connection.submit(method, Key=self._key, UploadId=self._id, PartNumber=number, **arguments)
        future.add_done_callback(lambda _: self._slots.release())
        self._sent.append(future)

    def wait(self) -> list[dict[str, Any]]:
        """Wait for all parts and return what completing needs to know of them."""
        parts = []
        for number, future in enumerate(self._sent, 1):
            reply = future.result()
            reply = reply.get("CopyPartResult", reply)
            parts.append({"PartNumber": number, "ETag": reply["ETag"]})
        return parts

    def complete(self, *, replace: bool) -> None:
        """Let the object appear."""
        arguments: dict[str, Any] = {"Key": self._key, "UploadId": self._id, "MultipartUpload": {"Parts": self.wait()}}
        if not replace and self._placing.capabilities.create == "refuses":
            arguments["IfNoneMatch"] = "*"
        try:
            self._connection.call("complete_multipart_upload", **arguments)
        except OSError as error:
            # A lost reply makes the retry of our own write look like somebody else's.
            head = self._connection.head(self._key)
            if head is None or head.get("Metadata", {}).get(_TOKEN) != self._token:
                if is_refusal(error):
                    raise self._placing.taken(self._path) from error
                raise
        self._is_open = False
        with contextlib.suppress(OSError):
            self._connection.remove(self._marker)

    def abort(self) -> None:
        """Drop it, unless it is complete."""
        if not self._is_open:
            return
        self._is_open = False
        for future in self._sent:
            future.cancel()
        # Where that fails the marker stays, and the next sweep does it.
        with contextlib.suppress(OSError):
            self._connection.abort(self._key, self._id)
            self._connection.remove(self._marker)


class S3Upload:
    """A payload on its way: one PUT if it fits a part, else a multipart upload. See `checkpointer.ports.Upload`."""

    def __init__(self, connection: S3Connection, placing: Publisher, path: str) -> None:
        self._connection = connection
        self._placing = placing
        self._path = path
        self._buffer = io.BytesIO()
        self._parts: Multipart | None = None

    def write(self, data: Any) -> int:
        """See `Upload.write`."""
        view = memoryview(data).cast("B")
        start = 0
        while start < len(view):
            room = self._part_size - self._buffer.tell()
            if room == 0:
                self._send()
                continue
            start += self._buffer.write(view[start : start + room])
        return len(view)

    @property
    def _part_size(self) -> int:
        return _PART if self._parts is None else self._parts.next_part_size

    def _send(self) -> None:
        self._parts = self._parts or Multipart(self._connection, self._placing, self._path)
        # As bytes, which the buffer gives away as they are and botocore sends as they are: anything else it would copy.
        full, self._buffer = self._buffer, io.BytesIO()
        self._parts.send("upload_part", Body=full.getvalue())

    def finish(self) -> None:
        """See `Upload.finish`."""
        if self._parts is not None:
            if self._buffer.tell():
                self._send()
            self._parts.wait()

    def publish(self, *, replace: bool) -> None:
        """See `Upload.publish`."""
        if self._parts is None:
            if replace:
                self._placing.put(self._path, self._buffer.getvalue())
            else:
                self._placing.create(self._path, self._buffer.getvalue())
            return
        if not replace and self._placing.is_taken(self._path):
            raise self._placing.taken(self._path)
        self._parts.complete(replace=replace)

    def abort(self) -> None:
        """See `Upload.abort`."""
        self._buffer = io.BytesIO()
        if self._parts is not None:
            self._parts.abort()


def _without_expect(params: dict[str, Any], **_: Any) -> None:
    """Send bodies at once: aiohttp waits forever for a server that answers an error instead of ``100 Continue``."""
    params["headers"].pop("Expect", None)
