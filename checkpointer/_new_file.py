"""Writes a file of a person, such as a picture or exported weights: whole, or not at all."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from checkpointer.errors import NameTakenError, StorageError


@contextlib.contextmanager
def new_file(path: str | os.PathLike[str], *, replaces: bool) -> Iterator[BinaryIO]:
    """Open a file that gets its name when the block ends; its bytes are on the disk then.

    If the block fails, there is no file.

    Raises:
        NameTakenError: If the file is there, unless this one ``replaces`` it.
        StorageError: If it cannot be written, for example because the disk is full. A file that is there stays.
    """
    target = Path(os.path.realpath(path) if replaces else path)
    if not replaces and os.path.lexists(target):
        msg = f"{target} is there already; choose another name, or remove it first"
        raise NameTakenError(msg)
    staged = target.with_name(f".{target.name[-100:]}.{uuid.uuid4().hex[:8]}")
    try:
        with open(staged, "xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        (os.replace if replaces else _link)(staged, target)
    except OSError as error:
        # An error of what is read in the block has the name of another file.
        if isinstance(error, StorageError) or error.filename not in (None, str(staged)):
            raise
        msg = f"cannot write {os.fspath(path)}: {error.strerror or error}"
        raise StorageError(msg) from error
    finally:
        with contextlib.suppress(OSError):
            staged.unlink(missing_ok=True)


def _link(staged: Path, target: Path) -> None:
    # A link never replaces a file that appeared meanwhile. A disk without links has a short race here.
    try:
        os.link(staged, target)
    except FileExistsError:
        msg = f"{target} appeared while it was written; it was left as it is"
        raise NameTakenError(msg) from None
    except OSError:
        os.replace(staged, target)
