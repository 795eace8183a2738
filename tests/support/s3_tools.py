"""What the tests on S3 servers look at behind the library's back, and the payloads they send."""

from __future__ import annotations

from typing import Any

import fsspec

from checkpointer.ports import Writable
from support.plain_format import PlainFormat
from support.servers.server import Server

LARGE = 17 << 20
"""More than a part: goes as a multipart upload of two."""


class LargeFormat(PlainFormat):
    """The same JSON, with so many spaces behind it that it takes so many bytes."""

    def __init__(self, size: int = LARGE) -> None:
        self.size = size

    def write(self, state: Any, stream: Writable) -> None:
        super().write(state, stream)
        for start in range(0, self.size, 5 << 20):
            stream.write(b" " * min(5 << 20, self.size - start))


def filesystem(server: Server) -> Any:
    """Return the tests' own connection."""
    return fsspec.filesystem("s3", use_listings_cache=False, **server.storage_options)


def objects(server: Server, url: str) -> dict[str, int]:
    """Return the size of every object below the URL, the hidden ones included."""
    root = url.partition("://")[2]
    return {name[len(root) + 1 :]: int(info["size"]) for name, info in _found(server, root).items()}


def _found(server: Server, root: str) -> dict[str, Any]:
    found: dict[str, Any] = filesystem(server).find(root, detail=True)
    return found


def unfinished(server: Server, url: str) -> list[str]:
    """Return the keys below the URL of which a multipart upload is open."""
    bucket, _, prefix = url.partition("://")[2].partition("/")
    reply = filesystem(server).call_s3("list_multipart_uploads", Bucket=bucket, Prefix=f"{prefix}/")
    return [upload["Key"][len(prefix) + 1 :] for upload in reply.get("Uploads", ())]
