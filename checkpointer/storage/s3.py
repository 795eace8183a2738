"""S3 and compatible servers: multipart uploads in parallel, and conditional PUT if the server supports it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import importlib.util
import io
import itertools
import json
import logging
import math
import threading
import uuid
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from typing import Any, Final, TypeVar

import fsspec.asyn

from checkpointer.errors import RecordError
from checkpointer.ports import Upload
from checkpointer.records.codec import parse_json
from checkpointer.storage.connection import Connection
from checkpointer.storage.driver_differences import SILENCE_S, is_refusal, modified_s
from checkpointer.storage.owner import STAGING
from checkpointer.storage.publish import Publisher, owner_of
from checkpointer.storage.ranges import Part, parts_of, read_parts
from checkpointer.storage.reader import read_whole
from checkpointer.storage.remote import BufferedUpload, FsspecStorage
from checkpointer.storage.retry import Retry, is_transient

T = TypeVar("T")

_log = logging.getLogger("checkpointer")

PARTS_AT_ONCE: Final = 4
DELETES_AT_ONCE: Final = 16
_PART: Final = 16 << 20
_LARGE_PART: Final = 128 << 20
_NUM_SMALL_PARTS: Final = 5000
"""A multipart upload has at most 10 000 parts. With these sizes it can have 700 GB."""
_COPY_PART: Final = 512 << 20
_MAX_COPY: Final = 5 << 30
"""Larger objects are copied in parts."""
_CHUNK: Final = 1 << 20
_MARKER: Final = ".multipart"
_MAX_MARKER: Final = 1 << 16
_TOKEN: Final = "checkpointer-token"


def _checksums(options: Mapping[str, Any]) -> Mapping[str, str]:
    """Return botocore's options that leave out checksums of what is checked already."""
    # Imported here, so that a missing driver is reported by the code that loads it.
    config = importlib.import_module("botocore.config").Config if importlib.util.find_spec("botocore") else None
    if "request_checksum_calculation" not in getattr(config, "OPTION_DEFAULTS", ()):
        return {}
    endpoint = options.get("endpoint_url") or options.get("client_kwargs", {}).get("endpoint_url") or ""
    is_signed = endpoint.startswith("http://") and not options.get("anon")
    # Without TLS the signature has a SHA-256 of each body. The CRC32 beside it would cost a fifth of the client's time.
    request = {"request_checksum_calculation": "when_required"} if is_signed else {}
    # Payloads have a digest. Some servers send the checksum of the whole object with a range of it.
    return {"response_checksum_validation": "when_required", **request}


_SESSION_OPTIONS: Final = frozenset({"session", "session_vars", "event_hooks", "profile"})


@functools.cache
def _descriptions() -> Any:
    """Return what botocore reads its descriptions of services with. It keeps them for the next client."""
    return importlib.import_module("aiobotocore.session").AioSession().get_component("data_loader")


def _session(options: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a new session for s3fs that need not read the descriptions again, which takes 0.1 s of CPU time."""
    if _SESSION_OPTIONS & options.keys() or not importlib.util.find_spec("aiobotocore"):
        return {}
    session = importlib.import_module("aiobotocore.session").AioSession()
    session.register_component("data_loader", _descriptions())
    return {"session": session}


class _S3Connection(Connection):
    """Requests to a bucket, by s3fs."""

    def __init__(self, url: str, retry: Retry, options: Mapping[str, Any]) -> None:
        # Only `Retry` repeats. Repeats of botocore and s3fs would multiply its attempts and exceed its deadline.
        config = {"retries": {"total_max_attempts": 1}, **_checksums(options), **options.get("config_kwargs", {})}
        super().__init__(url, retry, {**_session(options), **options, "config_kwargs": config})
        self.fs.retries = 1
        self._client: Any = None
        self._bucket, self._prefix, _ = self.fs.split_path(self.root)

    def key(self, path: str) -> str:
        return f"{self._prefix}/{path}".strip("/") if path else self._prefix

    def call(self, method: str, **arguments: Any) -> Any:
        return self.attempt(method, lambda: self.call_once(method, **arguments))

    def call_once(self, method: str, **arguments: Any) -> Any:
        return fsspec.asyn.sync(self.fs.loop, self._call, method, arguments)

    def submit(self, method: str, **arguments: Any) -> Future[Any]:
        async def call() -> Any:
            what = f"{method} in {self}"
            with self.retrying(what) as retry:
                return await retry.run(lambda: self._call(method, arguments), what)

        return asyncio.run_coroutine_threadsafe(call(), self.fs.loop)

    async def _call(self, method: str, arguments: Mapping[str, Any]) -> Any:
        if isinstance(part := arguments.get("Body"), memoryview):
            arguments = {**arguments, "Body": Body(part)}
        client = await self.fs.set_session()
        if client is not self._client:
            client.meta.events.register_last("before-call.s3", _without_expect)
            self._client = client
        return await self._limited(self.fs._call_s3(method, Bucket=self._bucket, **arguments), method)

    @property
    def limit_s(self) -> float:
        """Seconds after which a request fails: half of the deadline. Without a deadline its one attempt has a minute.

        The driver's own timeouts do not end a body that the server stops reading.
        """
        return self.retry.deadline_s / 2 or SILENCE_S

    async def _limited(self, request: Awaitable[T], what: str) -> T:
        try:
            return await asyncio.wait_for(request, self.limit_s)
        except asyncio.TimeoutError as error:
            msg = f"{what} was not answered within {self.limit_s:g} s"
            raise TimeoutError(errno.ETIMEDOUT, msg) from error

    async def fill(self, path: str, identity: tuple[str, int], part: Part) -> None:
        """Read a part of an object. After a cut, go on with the next byte."""
        what = f"reading {path}"
        with self.retrying(what) as retry:
            while part.position < part.end:
                # Bytes that arrived begin a new deadline.
                await retry.run(lambda: self._fill_some(path, identity, part), f"{what} in {self}")

    async def _fill_some(self, path: str, identity: tuple[str, int], part: Part) -> None:
        begin = part.position
        try:
            reply = await self._call("get_object", {"Key": self.key(path), "Range": f"bytes={begin}-{part.end - 1}"})
            try:
                if not reply.get("ContentRange", "bytes 0-").startswith(f"bytes {begin}-"):
                    raise OSError(errno.ENOTSUP, "the server ignores the requested range of bytes", path)
                if _identity(reply) != identity:
                    raise OSError(errno.ESTALE, "the file was replaced while it was read", path)
                await self._limited(_copy_body(reply["Body"], part), what=f"the body of {path}")
            finally:
                reply["Body"].close()
        except Exception as error:
            if part.position == begin or not is_transient(error):
                raise
            text = self.secrets.hide(str(error))
            _log.warning("reading %s was cut at byte %d (%s); it goes on there", path, part.position, text)

    def find(self, prefix: str) -> dict[str, Mapping[str, Any]]:
        """See `Connection.find`. A name costs one request, a whole directory one request per 1000 objects."""
        key = self.key(prefix)
        below = f"{key}/" if key else ""
        pages = self._pages(key if prefix else below)
        page = next(pages)
        if prefix and page.get("IsTruncated"):
            # Many other keys begin with the name, so request this object, and list the keys below it.
            pages, exact = self._pages(below), self.head(key)
            page = {"Contents": [{**exact, "Key": key}] if exact else []}
        items = (item for each in itertools.chain([page], pages) for item in each.get("Contents", ()))
        found = {item["Key"]: {"size": item.get("Size"), **item} for item in items}
        root = len(self._prefix) + 1 if self._prefix else 0
        return {
            name[root:]: info
            for name, info in found.items()
            if (name.startswith(below) or (prefix and name == key)) and not name.endswith("/")
        }

    def _pages(self, key_prefix: str) -> Iterator[Mapping[str, Any]]:
        page: Mapping[str, Any] = {"IsTruncated": True}
        while page.get("IsTruncated"):
            more = {"ContinuationToken": page["NextContinuationToken"]} if "NextContinuationToken" in page else {}
            page = self.call("list_objects_v2", Prefix=key_prefix, **more)
            yield page

    def head(self, key: str) -> dict[str, Any] | None:
        """Return an object's details and metadata; None if it is missing."""
        try:
            head = self.call("head_object", Key=key)
        except FileNotFoundError:
            return None
        return {**head, "size": head["ContentLength"]}

    def abort(self, key: str, upload: str) -> None:
        """Abort a multipart upload; aborting a missing one succeeds."""
        with contextlib.suppress(FileNotFoundError):
            self.call("abort_multipart_upload", Key=key, UploadId=upload)

    def remove_all(self, paths: Sequence[str]) -> None:
        """See `Connection.remove_all`: several requests at a time. All of them have ended when it returns or raises."""
        for start in range(0, len(paths), DELETES_AT_ONCE):
            some = paths[start : start + DELETES_AT_ONCE]
            running = [self.submit("delete_object", Key=self.key(path)) for path in some]
            for each in wait(running).done:
                with contextlib.suppress(FileNotFoundError):
                    each.result()

    def _remove(self, path: str) -> None:
        # One by one, because MinIO and others require a checksum for a bulk delete, which s3fs does not send.
        with contextlib.suppress(FileNotFoundError):
            self.call_once("delete_object", Key=self.key(path))


class _S3Publisher(Publisher):
    """Uses conditional PUT in place of s3fs's exclusive creation."""

    _to: _S3Connection

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
        parts = _Multipart(self._to, self, target)
        try:
            for start in range(0, size, _COPY_PART):
                end = min(start + _COPY_PART, size) - 1
                parts.send("upload_part_copy", CopySource=origin, CopySourceRange=f"bytes={start}-{end}")
            parts.publish(replace=True)
        finally:
            parts.abort()


class S3Storage(FsspecStorage):
    """An ``s3://bucket/prefix``, through s3fs.

    Args:
        url: The bucket and the prefix. A password in it is never shown.
        owner: Id of the writer, from `checkpointer.storage.owner.new_owner`.
        retry: How long to repeat a request when the server or the network fails.
        **options: Options of ``s3fs.S3FileSystem``: ``key``, ``secret``, ``endpoint_url``, ``client_kwargs`` and so on.
            Without them, credentials are found as by every AWS tool.
    """

    _connection: _S3Connection
    _publisher: _S3Publisher

    def __init__(self, url: str, owner: str = "", *, retry: Retry | None = None, **options: Any) -> None:
        self._connection = _S3Connection(url, retry or Retry(), options)
        self._publisher = _S3Publisher(self._connection, owner)

    def upload(self, path: str) -> Upload:
        """See `Storage.upload`: one PUT if the payload fits a part, else a multipart upload."""
        return BufferedUpload(
            self._publisher, path, lambda: _Multipart(self._connection, self._publisher, path), small=_PART
        )

    def read_pieces(self, path: str, pieces: Sequence[tuple[int, memoryview]]) -> Iterator[int]:
        """See `SupportsPieces.read_pieces`."""
        head = self._connection.head(self._connection.key(path))
        if head is None:
            raise FileNotFoundError(errno.ENOENT, "no such file", path)
        identity = _identity(head)
        parts = parts_of(pieces)
        if parts and parts[-1].end > identity[1]:
            msg = f"the file ends at byte {identity[1]}, and the bytes up to {parts[-1].end} were requested"
            raise OSError(errno.EIO, msg, path)
        yield from read_parts(self._connection.fs.loop, parts, functools.partial(self._connection.fill, path, identity))

    def abort_uploads(self, path: str) -> None:
        """See `SupportsUploads.abort_uploads`."""
        key = self._connection.key(path)
        for upload in self._connection.call("list_multipart_uploads", Prefix=key).get("Uploads", ()):
            if f"{upload['Key']}/".startswith(f"{key}/"):
                self._connection.abort(upload["Key"], upload["UploadId"])

    def discard(self, owner: str) -> None:
        """See `SupportsDiscard.discard`: abort this writer's uploads.

        Their markers stay: the server may keep a part that it receives meanwhile, so `sweep` aborts them once more.
        """
        for path in self._connection.find(STAGING):
            if path.endswith(_MARKER) and owner_of(path) == owner:
                target, upload = _read_marker(self._connection, path)
                if upload:
                    self._connection.abort(self._connection.key(target), upload)

    def _sweep_one(self, path: str) -> None:
        if path.endswith(_MARKER):
            target, upload = _read_marker(self._connection, path)
            if target:
                key = self._connection.key(target)
                for each in [upload] if upload else _unmarked(self._connection, path, key):
                    self._connection.abort(key, each)
        super()._sweep_one(path)


def _read_marker(connection: _S3Connection, path: str) -> tuple[str, str]:
    """Return the path of the upload that a marker names, and the upload's id; both are empty if not known."""
    with contextlib.suppress(RecordError, FileNotFoundError):
        marker = parse_json(read_whole(lambda: connection.open(path), _MAX_MARKER), path, _MAX_MARKER)
        if isinstance(marker, dict) and all(isinstance(marker.get(k), str) for k in ("path", "upload")):
            return marker["path"], marker["upload"]
    return "", ""


def _unmarked(connection: _S3Connection, path: str, key: str) -> list[str]:
    """Return the uploads of a key that began when this marker was written, and that no marker names."""
    found = connection.find(STAGING)
    since = modified_s(found.get(path, {}))
    if since is None:
        return []
    # A listing may have times in whole seconds. An upload that began after the last retry belongs to another writer.
    window = math.floor(since), since + max(2 * connection.retry.deadline_s, connection.limit_s) + 1
    marked = {_read_marker(connection, other)[1] for other in found if other.endswith(_MARKER)}
    return [
        upload["UploadId"]
        for upload in connection.call("list_multipart_uploads", Prefix=key).get("Uploads", ())
        if upload["Key"] == key
        and upload["UploadId"] not in marked
        and window[0] <= upload["Initiated"].timestamp() <= window[1]
    ]


class Body:
    """A part that is sent, without a copy of it. botocore reads it for its checksum, and aiohttp iterates over it.

    aiohttp would copy bytes into its buffer as a whole, and would read a file in small pieces on another thread.
    """

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._position = 0

    def __len__(self) -> int:
        return len(self._data)

    def tell(self) -> int:
        """See `io.IOBase`."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """See `io.IOBase`."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: len(self._data)}[whence]
        self._position = start + offset
        return self._position

    def read(self, size: int = -1) -> memoryview:
        """Return the next bytes, all of them without ``size``. They are not copied."""
        end = len(self._data) if size < 0 else self._position + size
        chunk = self._data[self._position : end]
        self._position += len(chunk)
        return chunk

    def __aiter__(self) -> Body:
        self._position = 0
        return self

    async def __anext__(self) -> memoryview:
        if chunk := self.read(_CHUNK):
            return chunk
        raise StopAsyncIteration


async def _copy_body(body: Any, part: Part) -> None:
    while part.position < part.end:
        chunk = await body.read(min(_CHUNK, part.end - part.position))
        if not chunk:
            msg = f"the reply ended at byte {part.position} of the requested {part.end}"
            raise OSError(errno.EIO, msg)
        part.write(chunk)


def _identity(reply: Mapping[str, Any]) -> tuple[str, int]:
    """Return what another content of an object does not have: its tag, and its size from ``bytes 0-9/1000``."""
    size = reply["ContentRange"].rpartition("/")[2] if "ContentRange" in reply else reply["ContentLength"]
    return reply.get("ETag", ""), int(size)


class _Multipart:
    """A multipart upload: parts are sent in parallel, and the object appears when the upload is completed."""

    def __init__(self, connection: _S3Connection, publisher: Publisher, path: str) -> None:
        self._connection = connection
        self._publisher = publisher
        self._path = path
        self._key = connection.key(path)
        self._token = uuid.uuid4().hex
        self._marker = f"{publisher.staging}/{self._token}{_MARKER}"
        self._part = memoryview(b"")
        """The buffer of the next part."""
        self._filled = 0
        """Bytes in it."""
        self._free: list[memoryview] = []
        """Buffers of parts that are sent."""
        self._sent: list[Future[Any]] = []
        self._slots = threading.BoundedSemaphore(PARTS_AT_ONCE)
        self._id = ""
        # If this process dies, `sweep` aborts the upload by its marker, because the server does not know its owner.
        self._mark()
        self._num_begun = 0
        self._id = connection.attempt(f"beginning to upload {path}", self._begin)
        self._is_open = True
        try:
            # If a reply was lost, there is another upload, whose id is not known.
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
        reply = self._connection.call_once("create_multipart_upload", Key=self._key, Metadata={_TOKEN: self._token})
        return str(reply["UploadId"])

    def _mark(self) -> None:
        self._publisher.put(self._marker, json.dumps({"path": self._path, "upload": self._id}).encode())

    def write(self, data: Any) -> int:
        rest = memoryview(data)
        while rest:
            if self._filled == len(self._part):
                self._send_part()
                self._part = self._buffer()
            taken = rest[: len(self._part) - self._filled]
            self._part[self._filled : self._filled + len(taken)] = taken
            self._filled += len(taken)
            rest = rest[len(taken) :]
        return len(data)

    def _buffer(self) -> memoryview:
        size = self._part_size
        while self._free:
            buffer = self._free.pop()
            if len(buffer) == size:
                return buffer
        return memoryview(bytearray(size))

    @property
    def _part_size(self) -> int:
        """Size of the next part in bytes; only the last part may be smaller."""
        if getattr(self._connection.fs, "fixed_upload_size", False):
            return 4 * _PART
        return _PART if len(self._sent) < _NUM_SMALL_PARTS else _LARGE_PART

    def _send_part(self) -> None:
        if self._filled:
            buffer, count, self._filled = self._part, self._filled, 0
            self.send("upload_part", lambda: self._free.append(buffer), Body=buffer[:count])

    def send(self, method: str, then: Callable[[], None] = lambda: None, **arguments: Any) -> None:
        """Send one part, and call ``then`` when it is sent. Wait first while `PARTS_AT_ONCE` parts are being sent."""

        def done(_: Future[Any]) -> None:
            then()
            self._slots.release()

        self._slots.acquire()
        for future in self._sent:
            if future.done() and future.exception() is not None:
                self._slots.release()
                future.result()
        number = len(self._sent) + 1
        future = self._connection.submit(method, Key=self._key, UploadId=self._id, PartNumber=number, **arguments)
        future.add_done_callback(done)
        self._sent.append(future)

    def finish(self) -> None:
        self._send_part()
        self._wait()

    def _wait(self) -> list[dict[str, Any]]:
        replies = [future.result() for future in self._sent]
        tags = [reply.get("CopyPartResult", reply)["ETag"] for reply in replies]
        return [{"PartNumber": number, "ETag": tag} for number, tag in enumerate(tags, 1)]

    def publish(self, *, replace: bool) -> None:
        arguments: dict[str, Any] = {"Key": self._key, "UploadId": self._id}
        if not replace:
            self._publisher.refuse_taken(self._path)
            if self._publisher.capabilities.refuses:
                arguments["IfNoneMatch"] = "*"
        try:
            self._connection.call("complete_multipart_upload", MultipartUpload={"Parts": self._wait()}, **arguments)
        except OSError as error:
            # If the reply was lost, the retry of our own request is refused. The token shows whose object it is.
            head = self._connection.head(self._key)
            if head is None or head.get("Metadata", {}).get(_TOKEN) != self._token:
                if is_refusal(error):
                    raise self._publisher.taken(self._path) from error
                raise
        self._is_open = False
        with contextlib.suppress(OSError):
            self._connection.remove(self._marker)

    def abort(self) -> None:
        if not self._is_open:
            return
        self._is_open = False
        for future in self._sent:
            future.cancel()
        # If this fails, the marker stays, and the next sweep aborts the upload.
        with contextlib.suppress(OSError):
            self._connection.abort(self._key, self._id)
            self._connection.remove(self._marker)


def _without_expect(params: dict[str, Any], **_: Any) -> None:
    """Send bodies at once, because aiohttp waits forever if a server replies with an error before ``100 Continue``."""
    params["headers"].pop("Expect", None)
