"""A proxy for an S3 server that counts requests by kind, and bytes."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any, Final

from support.servers.chaosproxy import ChaosProxy

_KINDS: Final = (
    ("list", rb"^GET \S*[?&]list-type=2"),
    ("begin multipart", rb"^POST \S*[?&]uploads"),
    ("complete multipart", rb"^POST \S*[?&]uploadId="),
    ("abort multipart", rb"^DELETE \S*[?&]uploadId="),
    ("copy", rb"(?is)^PUT .*\r\nx-amz-copy-source:"),
    ("part", rb"^PUT \S*[?&]partNumber="),
    ("PUT if absent", rb"(?is)^PUT .*\r\nif-none-match:"),
)


class CountingProxy(ChaosProxy):
    """Forwards everything."""

    def __init__(self, upstream: int) -> None:
        super().__init__(upstream)
        self.start()

    def __enter__(self) -> CountingProxy:
        super().__enter__()
        return self

    def start(self) -> None:
        """Reset the counts."""
        self.kinds: Counter[str] = Counter()
        self.sent = 0

    def strikes(self, *, head: bytes) -> None:
        """Count a request."""
        self.kinds[next((kind for kind, pattern in _KINDS if re.search(pattern, head)), head.split()[0].decode())] += 1

    def room(self, link: Any, wanted: int, *, up: bool) -> None:
        """Count bytes to the server, heads of requests included."""
        self.sent += wanted if up else 0

    def __str__(self) -> str:
        return ", ".join(f"{count} {kind}" for kind, count in sorted(self.kinds.items())) or "none"
