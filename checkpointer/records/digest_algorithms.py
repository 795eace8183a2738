"""The algorithms of digests, and which of them a save uses."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, Final

import xxhash

DIGESTS: Final[dict[str, Callable[..., Any]]] = {"xxh3-128": xxhash.xxh3_128, "sha256": hashlib.sha256}
"""Every algorithm that can be read, by its name in a record."""
ALGORITHM: Final = "xxh3-128"
"""A save uses this one. It detects every accidental change, at the speed of memory."""
CRYPTOGRAPHIC: Final = "sha256"
"""A save uses this one if records are signed, because other bytes with the same digest cannot be made."""
OF_FILES: Final = "files-"
"""Before the name of an algorithm: the digest of a folder is the digest of its files' digests."""
