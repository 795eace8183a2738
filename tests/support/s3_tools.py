"""For tests on S3 servers: their own connection, which does not use the library, and large payloads."""

from __future__ import annotations

from typing import Any

import fsspec

from checkpointer.ports import Writable
from support.plain_format import PlainFormat
from support.servers.server import Server

LARGE = 17 << 20
"""More than one part: it is sent as a multipart upload of two parts."""


class LargeFormat(PlainFormat):
    """The same JSON, followed by spaces up to ``size`` bytes."""

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
    found: dict[str, Any] = filesystem(server).find(root, detail=True)
    return {name[len(root) + 1 :]: int(info["size"]) for name, info in found.items()}


def unfinished(server: Server, url: str) -> list[str]:
    """Return the keys of the open multipart uploads below the URL."""
    bucket, _, prefix = url.partition("://")[2].partition("/")
    reply = filesystem(server).call_s3("list_multipart_uploads", Bucket=bucket, Prefix=f"{prefix}/")
    return [upload["Key"][len(prefix) + 1 :] for upload in reply.get("Uploads", ())]
