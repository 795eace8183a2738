"""Names of checkpoints: relative paths that stay inside the directory on every system."""

from __future__ import annotations

import re
import unicodedata
from typing import Final

from checkpointer.errors import NamingError

MAX_PART_BYTES: Final = 255
"""As many as any usual filesystem takes."""
MAX_NAME_BYTES: Final = 1024
"""As many as object stores take."""
_DRIVE: Final = re.compile(r"[A-Za-z]:")


def has_surrogate(text: str) -> bool:
    """Return whether the text holds half a character: it could not be encoded, so not be written."""
    return not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text)


def check_name(name: str) -> str:
    """Return ``name`` if it is a relative path that stays inside the directory, or raise `NamingError`."""
    parts = name.split("/")
    if has_surrogate(name):
        msg = f"the name {name!r} holds a lone surrogate, which cannot be encoded; remove it from the template"
    elif "\\" in name or any(ord(char) < 32 for char in name):
        msg = f"the name {name!r} holds a backslash or control character; remove it from the template"
    elif name.startswith("/") or _DRIVE.match(name):
        msg = f"the name {name!r} is absolute; names are relative to the manager's directory"
    elif any(part in ("", ".", "..") for part in parts):
        msg = f"the name {name!r} has an empty part, '.' or '..'; it must stay inside the directory"
    elif is_home(parts[0]):
        msg = f"the name {name!r} is reserved: '.checkpointer' holds the records; choose another"
    elif any(len(part.encode()) > MAX_PART_BYTES for part in parts):
        msg = f"the name {name!r} has a part longer than {MAX_PART_BYTES} bytes; shorten the template"
    elif problem := name_problem(name):
        msg = f"the name {name!r} cannot be used; expected {problem}"
    else:
        return name
    raise NamingError(msg)


def name_problem(name: str) -> str:
    """Return what a payload's name was expected to be; empty if it stays inside the directory on every system."""
    parts = name.split("/")
    # Windows drops dots and spaces at the end: there '.. ' is the folder above.
    if not all(part.strip(". ") for part in parts) or "\\" in name or "\0" in name or _DRIVE.match(name):
        return "a relative path inside the directory"
    if is_home(parts[0]):
        return "a path outside '.checkpointer'"
    data = name.encode()
    if len(data) > MAX_NAME_BYTES or max(map(len, data.split(b"/"))) > MAX_PART_BYTES:
        return f"a path of at most {MAX_NAME_BYTES} bytes, and {MAX_PART_BYTES} in each part"
    return ""


def is_home(part: str) -> bool:
    """Return whether some system may take the name for ``.checkpointer``: some fold case, or skip what is invisible."""
    if not part.isascii():
        visible = "".join(char for char in part if unicodedata.category(char) != "Cf")
        part = unicodedata.normalize("NFKC", visible)
    return part.casefold().rstrip(". ") == ".checkpointer"
