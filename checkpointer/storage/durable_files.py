"""The steps that make files on a disk or mount durable: fsync a file and its folder, put a file into a new folder."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Final

from checkpointer._new_file import sync_folder as sync_folder

_TRIES: Final = 16


def sync_file(stream: BinaryIO) -> None:
    """Make the bytes of a file durable, and give it the time of now."""
    stream.flush()
    # Kernels before 6.13 stamp files once per tick, so a quick rewrite that gets the old inode would look unchanged.
    with contextlib.suppress(OSError, TypeError):
        os.utime(stream.fileno(), ns=(time.time_ns(),) * 2)
    os.fsync(stream.fileno())


def sync_tree(path: Path) -> None:
    """Make a file, or a folder with all that is in it, durable."""
    if not path.is_dir():
        with open(path, "rb") as stream:
            os.fsync(stream.fileno())
        return
    for folder, _, files in os.walk(path):
        for name in files:
            sync_tree(Path(folder, name))
        sync_folder(Path(folder))


def put_into(folder: Path, act: Callable[[], None]) -> None:
    """Make a folder and put a file into it.

    Between these two steps another writer may delete the last file there, and with it the folder.
    """
    for tries_left in reversed(range(_TRIES)):
        try:
            _make_folders(folder)
            return act()
        except FileNotFoundError as error:
            if tries_left:
                continue
            if folder.is_dir() and error.filename2 and os.path.lexists(error.filename):
                # FAT and similar filesystems refuse ':', '*' and '?', and some drivers raise ENOENT for it.
                msg = "this filesystem takes no such name; change the template"
                raise OSError(errno.EINVAL, msg, str(error.filename2)) from error
            raise


def _make_folders(folder: Path) -> None:
    """Make a folder and its parents, each new entry durable."""
    if folder.is_dir():
        return
    _make_folders(folder.parent)
    with contextlib.suppress(FileExistsError):
        folder.mkdir()
    sync_folder(folder.parent)


def discard(staged: Path) -> None:
    """Remove a staged file, or leave it to `sweep`: a failed clean-up must not hide the error of the write."""
    if os.path.isdir(staged):
        shutil.rmtree(staged, ignore_errors=True)
        return
    with contextlib.suppress(OSError):
        staged.unlink()
