"""S3 and what speaks its protocol: multipart uploads in parallel, conditional PUT where the server honours it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import threading
import uuid
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any, Final

import fsspec.asyn

from checkpointer.errors import RecordError
from checkpointer.ports import Upload
from checkpointer.records import parse_json
from checkpointer.storage.capabilities import Capabilities
from checkpointer.storage.remote import FsspecStorage, as_os_errors
from checkpointer.storage.retrying import Retry

__all__ = ["S3Storage"]

PARTS_AT_ONCE: Final = 4
_PART: Final = 16 << 20
_LARGE_PART: Final = 128 << 20
_NUM_SMALL_PARTS: Final = 5000
"""A multipart upload has at most 10 000 parts: with these sizes it may have 700 GB."""
_COPY_PART: Final = 512 << 20
_MAX_COPY: Final = 5 << 30
"""Larger objects are copied in parts."""
_TOKEN: Final = "checkpointer-token"


class S3Storage(FsspecStorage):
    """An ``s3://bucket/prefix``, through s3fs.

    Args:
        url: ``s3://bucket/prefix``.
        owner: Id of the writer, from `checkpointer.owner.new_owner`.
        retry: How long to go on trying when the server or the way to it fails.
        **options: What ``s3fs.S3FileSystem`` takes: ``key``, ``secret``, ``endpoint_url``, ``client_kwargs`` and so on.
            Without them credentials come from where every AWS tool looks for them.
    """

    def __init__(self, url: str, owner: str = "", *, retry: Retry | None = None, **options: Any) -> None:
        # Attempts are counted in one place only, here: else a deadline would mean little.
        config = {"retries": {"total_max_attempts": 1}, **options.pop("config_kwargs", {})}
        super().__init__(url, owner, retry=retry, config_kwargs=config, **options)
        self._fs.retries = 1
        self._client: Any = None
        self._bucket, self._prefix, _ = self._fs.split_path(self._root)

    # Requests

    def submit(self, method: str, **arguments: Any) -> Future[Any]:
        """Begin a request, with retries, in the background."""

        async def call() -> Any:
            what = f"{method} in {self}"
            with as_os_errors(what):
                return await self._retry.run(lambda: self._call(method, arguments), what)

        return asyncio.run_coroutine_threadsafe(call(), self._fs.loop)

    def call(self, method: str, **arguments: Any) -> Any:
        """Make a request, with retries, and return the reply."""
        return self._try(method, lambda: fsspec.asyn.sync(self._fs.loop, self._call, method, arguments))

    async def _call(self, method: str, arguments: Mapping[str, Any]) -> Any:
        client = await self._fs.set_session()
        if client is not self._client:
            client.meta.events.register_last("before-call.s3", _without_expect)
            self._client = client
        request = self._fs._call_s3(method, Bucket=self._bucket, **arguments)
        try:
            return await asyncio.wait_for(request, self._retry.deadline_s)
        except asyncio.TimeoutError as error:
            msg = f"{method} was not answered within {self._retry.deadline_s:g} s"
            raise TimeoutError(errno.ETIMEDOUT, msg) from error

    def key(self, path: str) -> str:
        """Return the object's key."""
        return f"{self._prefix}/{path}".strip("/") if path else self._prefix

    # Storage

    def _find(self, prefix: str) -> dict[str, Mapping[str, Any]]:
        key = self.key(prefix)
        below = f"{key}/" if key else ""
        # One request tells whether a key is there and whether others are below it, if few others begin with its name.
        found, is_all = self._list(key if prefix else below, max_pages=1 if prefix else None)
        if not is_all and prefix:
            exact = found.get(key)
            found, _ = self._list(below, max_pages=None)
            exact = exact or self._head(key)
            found.update({key: exact} if exact else {})
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

    def _head(self, key: str) -> dict[str, Any] | None:
        try:
            head = self.call("head_object", Key=key)
        except FileNotFoundError:
            return None
        return {**head, "size": head["ContentLength"]}

    def upload(self, path: str) -> Upload:
        """See `Storage.upload`."""
        return S3Upload(self, path)

    def _remove(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            fsspec.asyn.sync(self._fs.loop, self._call, "delete_object", {"Key": self.key(path)})

    def _put(self, path: str, data: bytes) -> None:
        fsspec.asyn.sync(self._fs.loop, self._call, "put_object", {"Key": self.key(path), "Body": data})

    def _create(self, path: str, data: bytes) -> None:
        if self.capabilities.create != "refuses":
            super()._create(path, data)
            return
        arguments = {"Key": self.key(path), "Body": data, "IfNoneMatch": "*"}
        fsspec.asyn.sync(self._fs.loop, self._call, "put_object", arguments)

    def _probe(self) -> Capabilities:
        path = f"{self._staging}/probe"
        arguments = {"Key": self.key(path), "Body": b"", "IfNoneMatch": "*"}
        refused = []
        for _ in range(2):
            try:
                self.call("put_object", **arguments)
            except OSError as error:
                refused.append(_is_precondition(error))
            else:
                refused.append(False)
        self._remove(path)
        # Rather two attempts refused than none: a lost reply to the first makes its retry look like a second.
        return Capabilities("atomic", "none", "refuses" if refused[1] else "claims", "server")

    # Copies, and what dead writers left

    def _copy(self, source: str, target: str) -> None:
        size = int(self._find(source)[source]["size"])
        origin = {"Bucket": self._bucket, "Key": self.key(source)}
        if size <= _MAX_COPY:
            self.call("copy_object", CopySource=origin, Key=self.key(target))
            return
        parts = Multipart(self, target)
        try:
            for start in range(0, size, _COPY_PART):
                end = min(start + _COPY_PART, size) - 1
                parts.send("upload_part_copy", CopySource=origin, CopySourceRange=f"bytes={start}-{end}")
            parts.complete(replace=True)
        finally:
            parts.abort()

    def _sweep_one(self, path: str) -> None:
        if path.endswith(".multipart"):
            with contextlib.suppress(RecordError, FileNotFoundError), self._open(path) as stream:
                marker = parse_json(stream.read(1 << 16), path, 1 << 16)
                if isinstance(marker, dict) and all(isinstance(marker.get(k), str) for k in ("path", "upload")):
                    self.call("abort_multipart_upload", Key=self.key(marker["path"]), UploadId=marker["upload"])
        super()._sweep_one(path)


class Multipart:
    """A multipart upload: parts go out in parallel, and the object appears when it is completed."""

    def __init__(self, storage: S3Storage, path: str) -> None:
        self._storage = storage
        self._path = path
        self._key = storage.key(path)
        self._token = uuid.uuid4().hex
        reply = storage.call("create_multipart_upload", Key=self._key, Metadata={_TOKEN: self._token})
        self._id = reply["UploadId"]
        # So that `sweep` can abort it if this process dies: the server itself does not say whose it is.
        self._marker = f"{storage._staging}/{self._token}.multipart"
        storage.write(self._marker, json.dumps({"path": path, "upload": self._id}).encode())
        self._sent: list[Future[Any]] = []
        self._slots = threading.BoundedSemaphore(PARTS_AT_ONCE)
        self._is_open = True

    @property
    def next_part_size(self) -> int:
        """Bytes that the next part should have; only the last may have fewer."""
        if getattr(self._storage._fs, "fixed_upload_size", False):
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
        future = self._storage.submit(method, Key=self._key, UploadId=self._id, PartNumber=number, **arguments)
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
        storage = self._storage
        arguments: dict[str, Any] = {"Key": self._key, "UploadId": self._id, "MultipartUpload": {"Parts": self.wait()}}
        if not replace and storage.capabilities.create == "refuses":
            arguments["IfNoneMatch"] = "*"
        try:
            storage.call("complete_multipart_upload", **arguments)
        except OSError as error:
            # A lost reply makes the retry of our own write look like somebody else's.
            head = storage._head(self._key)
            if head is None or head.get("Metadata", {}).get(_TOKEN) != self._token:
                if _is_precondition(error):
                    raise storage._taken(self._path) from error
                raise
        self._is_open = False
        self._forget()

    def abort(self) -> None:
        """Drop it, unless it is complete."""
        if not self._is_open:
            return
        self._is_open = False
        for future in self._sent:
            future.cancel()
        with contextlib.suppress(OSError):
            self._storage.call("abort_multipart_upload", Key=self._key, UploadId=self._id)
        self._forget()

    def _forget(self) -> None:
        with contextlib.suppress(OSError):
            self._storage._remove(self._marker)


class S3Upload:
    """A payload on its way: one PUT if it fits a part, else a multipart upload. See `checkpointer.ports.Upload`."""

    def __init__(self, storage: S3Storage, path: str) -> None:
        self._storage = storage
        self._path = path
        self._buffer = bytearray()
        self._parts: Multipart | None = None

    def write(self, data: Any) -> int:
        """See `Upload.write`."""
        view = memoryview(data).cast("B")
        start = 0
        while start < len(view):
            room = self._part_size - len(self._buffer)
            if room == 0:
                self._send()
                continue
            self._buffer += view[start : start + room]
            start += room
        return len(view)

    @property
    def _part_size(self) -> int:
        return _PART if self._parts is None else self._parts.next_part_size

    def _send(self) -> None:
        self._parts = self._parts or Multipart(self._storage, self._path)
        # The buffer itself is sent, and another one filled: no copy.
        full, self._buffer = self._buffer, bytearray()
        self._parts.send("upload_part", Body=full)

    def finish(self) -> None:
        """See `Upload.finish`."""
        if self._parts is not None:
            if self._buffer:
                self._send()
            self._parts.wait()

    def publish(self, *, replace: bool) -> None:
        """See `Upload.publish`."""
        if self._parts is None:
            if replace:
                self._storage.write(self._path, bytes(self._buffer))
            else:
                self._storage.create(self._path, bytes(self._buffer))
            return
        if not replace and self._storage.list(self._path):
            raise self._storage._taken(self._path)
        self._parts.complete(replace=replace)

    def abort(self) -> None:
        """See `Upload.abort`."""
        self._buffer = bytearray()
        if self._parts is not None:
            self._parts.abort()


def _without_expect(params: dict[str, Any], **_: Any) -> None:
    """Send bodies at once: aiohttp waits forever for a server that answers an error instead of ``100 Continue``."""
    params["headers"].pop("Expect", None)


def _is_precondition(error: BaseException) -> bool:
    response = getattr(error.__cause__, "response", None) or {}
    code = response.get("Error", {}).get("Code", "")
    return isinstance(error, FileExistsError) or code in ("PreconditionFailed", "412", "ConditionalRequestConflict")
