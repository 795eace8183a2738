"""Writes lines to stdout and stderr. If the reader of stdout has closed it, a command goes on to its exit code."""

from __future__ import annotations

import contextlib
import os
import sys

from checkpointer._display import one_line
from checkpointer._secrets import without_secrets


def say(text: str) -> None:
    """Print a message to stderr, without the secrets of URLs; results go to stdout."""
    with contextlib.suppress(BrokenPipeError):
        sys.stderr.write(one_line(without_secrets(text)) + "\n")


def write(text: str) -> None:
    """Write a part of a result to stdout."""
    try:
        sys.stdout.write(text)
    except BrokenPipeError:
        _discard()


def print_line(text: str) -> None:
    """Print one line of a result, not folded to the width, for scripts."""
    write(one_line(text) + "\n")


def flush() -> bool:
    """Write what is still in the buffer of stdout; return whether its reader still reads."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _discard()
        return False
    return True


def _discard() -> None:
    """Discard the rest, as with ``checkpointer ls runs | head -1``: Python must not report the pipe when it ends."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
