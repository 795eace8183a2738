"""A directory of an ordinary user, because permissions do not apply to root."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

ORDINARY = 65534


@contextlib.contextmanager
def ordinary_user() -> Iterator[Path]:
    """Run as a user without privileges; yields an empty directory of that user."""
    # It is not below tmp_path, because only the owner may enter that.
    folder = Path(tempfile.mkdtemp())
    is_root = os.geteuid() == 0
    if is_root:
        os.chown(folder, ORDINARY, -1)
        os.seteuid(ORDINARY)
    try:
        yield folder
    finally:
        if is_root:
            os.seteuid(0)
        for path, _, _ in os.walk(folder):
            os.chmod(path, 0o755)
        shutil.rmtree(folder)


def forbid(path: Path) -> None:
    """Make a file or folder as one of another user: this user may neither read nor change it."""
    if os.geteuid() == ORDINARY:
        os.seteuid(0)
        try:
            os.chown(path, 0, 0)
            path.chmod(0o700)
        finally:
            os.seteuid(ORDINARY)
    else:
        path.chmod(0)
