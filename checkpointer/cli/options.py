"""The arguments and options that several commands have, and how a directory is opened from them."""

from __future__ import annotations

import contextlib
import difflib
import enum
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Final

import attrs
import typer

from checkpointer._display import some_of
from checkpointer.commit.index import HOME, record_path
from checkpointer.commit.signing import HMACKey, refuse_unsigned
from checkpointer.errors import NameTakenError, PolicyError, StorageError
from checkpointer.policy.policy import Policy
from checkpointer.ports import Storage, SupportsPaths, SupportsSweep
from checkpointer.storage import open_storage
from checkpointer.storage.owner import new_owner, release
from checkpointer.storage.retry import Retry
from checkpointer.tools.catalog import Catalog, look_at

Directory = Annotated[str, typer.Argument(help="A path or an fsspec URL.", show_default=False)]
StorageOptions = Annotated[
    str | None,
    typer.Option(
        "--storage-options",
        metavar="JSON",
        help="What fsspec needs besides the URL, as JSON or @FILE; its configuration and environment count too.",
    ),
]
KeyEnv = Annotated[
    str | None, typer.Option("--key-env", metavar="NAME", help="Environment variable with the key of signed records.")
]
KeyFile = Annotated[str | None, typer.Option("--key-file", metavar="FILE", help="File with the key.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
PolicyFile = Annotated[
    str | None, typer.Option("--policy", "-p", metavar="FILE", help="A policy as YAML, as Policy.to_yaml writes it.")
]
Run = Annotated[str | None, typer.Option("--run", metavar="ID", help="The run; else that of the newest checkpoint.")]

PATIENCE_S: Final = 30.0
"""Seconds that a server may be away. A training waits longer; at a terminal the cause is often a typo in the host."""


class Mode(str, enum.Enum):
    """Which value of a metric is best."""

    MIN = "min"
    MAX = "max"


def open_place(directory: str, storage_options: str | None = None, owner: str = "") -> Storage:
    """Return the storage; raise unless a local directory is there: looking must not make it."""
    storage = _open(directory, owner, storage_options)
    if isinstance(storage, SupportsPaths) and not os.path.isdir(path := storage.local_path("").rstrip("/")):
        msg = f"there is no directory {path}{_similar(Path(path))}"
        raise StorageError(msg)
    return storage


def _open(directory: str, owner: str, storage_options: str | None) -> Storage:
    return open_storage(directory, owner, {"retry": Retry(PATIENCE_S), **parse_options(storage_options)})


def _similar(path: Path) -> str:
    """Return a hint: the closest folder beside the one that is not there."""
    parent = path
    while not parent.parent.is_dir():
        parent = parent.parent
    folders = [entry.name for entry in parent.parent.iterdir() if entry.is_dir()]
    close = difflib.get_close_matches(parent.name, folders, n=1)
    return f" (did you mean {parent.parent / close[0]}?)" if close else ""


def parse_options(text: str | None) -> dict[str, Any]:
    """Return storage options. Their values are never printed."""
    if text is None:
        return {}
    if text.startswith("@"):
        text = Path(text[1:]).read_text(encoding="utf-8")
    try:
        options = json.loads(text)
    except ValueError:
        options = None
    if isinstance(options, dict):
        return options
    # Not what was given: it holds credentials.
    msg = '--storage-options is not a JSON object; write \'{"key": "value"}\', or @FILE with such text in it'
    raise PolicyError(msg)


def key_of(key_env: str | None, key_file: str | None) -> HMACKey | None:
    """Return the key, if one is asked for."""
    if key_env is not None and key_file is not None:
        msg = "both --key-env and --key-file are given; pass one"
        raise PolicyError(msg)
    if key_env is not None:
        return HMACKey.from_env(key_env)
    return None if key_file is None else HMACKey.from_file(key_file)


def read_policy(path: str) -> Policy:
    """Read a policy file; what is wrong with it names the file."""
    try:
        return Policy.from_yaml(Path(path))
    except PolicyError as error:
        msg = f"{path}: {error}"
        raise PolicyError(msg) from error


def look(
    directory: str, storage_options: str | None = None, key_env: str | None = None, key_file: str | None = None
) -> Catalog:
    """Look at a directory; raise if there is nothing to see.

    Raises:
        StorageError: If there is no such directory, or no record in it.
    """
    catalog = look_anyway(directory, storage_options, key_env, key_file)
    refuse_empty(catalog)
    return catalog


def look_anyway(
    directory: str, storage_options: str | None = None, key_env: str | None = None, key_file: str | None = None
) -> Catalog:
    """Look at a directory, with a record in it or without.

    Raises:
        StorageError: If there is no such directory.
    """
    catalog = look_at(open_place(directory, storage_options), key_of(key_env, key_file))
    if isinstance(catalog.storage, SupportsPaths):
        catalog = attrs.evolve(catalog, place=directory)  # As it was typed.
    return catalog


def refuse_empty(catalog: Catalog) -> None:
    """Raise `StorageError` if a directory has no record, with what to do about what it has."""
    if catalog.has_records:
        return
    files = sorted(path for path in catalog.files if not path.startswith(f"{HOME}/"))
    if catalog.below:
        msg = (
            f"{catalog.place} has no checkpoint of its own, and these directories below have: "
            f"{some_of(catalog.below)}. Name one of them; 'checkpointer ls {catalog.place}' lists them all"
        )
    elif files:
        msg = (
            f"{catalog.place} has no record, but files such as {', '.join(files[:3])}; "
            "'checkpointer adopt' makes records of what Lightning, the HF Trainer or torch.save wrote"
        )
    else:
        msg = f"{catalog.place} holds no checkpoint"
    raise StorageError(msg)


def check_out(path: str, key_env: str | None, key_file: str | None) -> None:
    """Refuse a new file that would replace a checkpoint or an alias, or lie in a signed directory without its key.

    Raises:
        NameTakenError: If a directory above has a checkpoint or an alias at this path.
        UntrustedError: If a directory above is signed, and there is no key.
    """
    key = key_of(key_env, key_file)
    place = Path(path).absolute()
    for folder in place.parents:
        if (folder / HOME).is_dir():
            catalog = look_at(open_place(str(folder)), key)
            refuse_unsigned(catalog.signed, folder, key)
            name = place.relative_to(folder).as_posix()
            if name in catalog.aliases or (folder / record_path(name)).exists():
                msg = f"{path} is a checkpoint of {folder}, which is not replaced; name a new file"
                raise NameTakenError(msg)


def check_extension(path: str, *known: str) -> None:
    """Refuse a new file whose extension says that it is something else.

    Raises:
        PolicyError: If it has none of the extensions that are ``known``.
    """
    if not path.lower().endswith(known):
        msg = f"the extension of {path!r} is not {' or '.join(known)}, which is what is written; name such a file"
        raise PolicyError(msg)


@contextlib.contextmanager
def writing(directory: str, storage_options: str | None = None, *, new: bool = False) -> Iterator[tuple[Storage, str]]:
    """Open a directory to change it; yields the storage and the id of this writer. ``new``: it need not be there."""
    owner = new_owner()
    try:
        opened = _open(directory, owner, storage_options) if new else None
        storage = opened or open_place(directory, storage_options, owner)
        yield storage, owner
        if isinstance(storage, SupportsSweep):
            storage.close()
    finally:
        release(owner)
