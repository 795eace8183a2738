"""Mounts a folder with one file, ``disk.img``, and logs its writes and flushes: ``logdisk.py MOUNTPOINT IMAGE LOG``."""

from __future__ import annotations

import errno
import os
import stat
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HEAD = struct.Struct("<cQI")
NAME = "/disk.img"


def events(log: Path) -> Iterator[tuple[int, int, bytes]]:
    """Yield for each write the position of its end in the log, its offset and its data; flushes are omitted."""
    data = log.read_bytes()
    position = 0
    while position < len(data):
        kind, offset, size = HEAD.unpack_from(data, position)
        position += HEAD.size
        if kind == b"W":
            yield position + size, offset, data[position : position + size]
        position += size


def main() -> None:
    """Serve the file until unmounted."""
    import mfusepy

    class LogDisk(mfusepy.Operations):  # type: ignore[misc]
        def __init__(self, disk: str, log: str) -> None:
            self.disk = os.open(disk, os.O_RDWR)
            self.log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

        def getattr(self, path: str, fh: Any = None) -> dict[str, int]:
            if path == "/":
                return {"st_mode": stat.S_IFDIR | 0o755, "st_nlink": 2}
            if path == NAME:
                return {"st_mode": stat.S_IFREG | 0o600, "st_nlink": 1, "st_size": os.fstat(self.disk).st_size}
            raise mfusepy.FuseOSError(errno.ENOENT)

        def readdir(self, path: str, fh: Any) -> list[str]:
            return [".", "..", NAME[1:]]

        def open(self, path: str, flags: int) -> int:
            return 0

        def read(self, path: str, size: int, offset: int, fh: Any) -> bytes:
            return os.pread(self.disk, size, offset)

        def write(self, path: str, data: bytes, offset: int, fh: Any) -> int:
            os.pwrite(self.disk, data, offset)
            os.write(self.log, HEAD.pack(b"W", offset, len(data)) + data)
            return len(data)

        def truncate(self, path: str, length: int, fh: Any = None) -> None:
            pass

        def flush(self, path: str, fh: Any) -> int:
            return 0

        def fsync(self, path: str, datasync: Any, fh: Any) -> int:
            os.write(self.log, HEAD.pack(b"F", 0, 0))
            return 0

        def release(self, path: str, fh: Any) -> int:
            return 0

        def fallocate(self, *_: Any) -> None:
            raise mfusepy.FuseOSError(errno.EOPNOTSUPP)

    mountpoint, disk, log = sys.argv[1:]
    mfusepy.FUSE(LogDisk(disk, log), mountpoint, foreground=True, nothreads=True)


if __name__ == "__main__":
    main()
