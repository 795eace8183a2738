"""A payload format without torch, so that crash tests can run thousands of saves."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, BinaryIO

from checkpointer.errors import CorruptError
from checkpointer.ports import Writable


class PlainFormat:
    """JSON in several chunks, so that a crash can happen between them."""

    name = "plain"
    extension = ".ckpt"

    def write(self, state: Any, stream: Writable) -> None:
        data = json.dumps(state).encode()
        for start in range(0, len(data), 16):
            stream.write(data[start : start + 16])

    def read(self, stream: BinaryIO, *, weights_only: bool, map_location: Any) -> Any:
        try:
            return json.loads(stream.read())
        except ValueError as error:
            msg = f"not JSON: {error}"
            raise CorruptError(msg) from error

    def refused(self, state: Any) -> Mapping[str, str]:
        return {}
