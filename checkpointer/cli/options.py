"""The arguments and options that several commands have, and how a directory is opened from them."""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_type_hints

import attrs
import typer

from checkpointer._display import count_text, some_of
from checkpointer.cli import output
from checkpointer.commit.index import HOME, record_path
from checkpointer.commit.journal import Journal
from checkpointer.commit.signing import HMACKey, refuse_unsigned
from checkpointer.errors import CheckpointerError, NameTakenError, NotFoundError, PolicyError, StorageError
from checkpointer.policy.policy import Policy
from checkpointer.policy.yaml_codec import MAX_YAML_BYTES
from checkpointer.ports import Storage, SupportsPaths, SupportsSweep
from checkpointer.storage import open_storage
from checkpointer.storage.owner import temporary_owner
from checkpointer.storage.retry import Retry
from checkpointer.tools.catalog import Catalog, look_at
from checkpointer.tools.payloads import Payload, directories_above, payload_at, similar
from checkpointer.tools.policies import Policies
from checkpointer.tools.policy_file import check_policy
from checkpointer.tools.query import FIELDS, metric_names


def complete_name(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return the names and aliases in the directory that the shell has on its line already."""
    catalog = _for_completion(ctx)
    names = [*catalog.aliases, *(record.name for record in reversed(catalog.records))] if catalog else []
    return [name for name in names if name.startswith(incomplete)]


def complete_metric(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return the metrics in the directory that the shell has on its line already."""
    catalog = _for_completion(ctx)
    return [name for name in metric_names(catalog.records if catalog else ()) if name.startswith(incomplete)]


def complete_field(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return the fields and metrics to sort by."""
    return [*complete_metric(ctx, incomplete), *(field for field in FIELDS if field.startswith(incomplete))]


def _for_completion(ctx: typer.Context) -> Catalog | None:
    """Look at the directory; None if it is a URL, because the shell would wait for the server."""
    items = ctx.params.get("items") or ()
    # While the value of an option is completed, the arguments are not parsed.
    place = ctx.params.get("directory") or ctx.params.get("place") or next(iter((*items, *ctx.args)), "")
    if "://" in place or not os.path.isdir(place):
        return None
    with contextlib.suppress(CheckpointerError, OSError):
        return look_at(open_storage(place, ""))
    return None


def argument(metavar: str, help: str, complete: Callable[..., list[str]] | None = None) -> Any:
    """Return an argument of a command; ``complete`` completes it in the shell."""
    return typer.Argument(metavar=metavar, help=help, show_default=False, autocompletion=complete)


def option(names: str, help: str, complete: Callable[..., list[str]] | None = None, **more: Any) -> Any:
    """Return an option of a command; ``names`` are as in its help: ``--sort -s FIELD``."""
    parts = names.split()
    flags = [part for part in parts if part.startswith("-")]
    metavar = next((part for part in parts if part not in flags), None)
    return typer.Option(*flags, metavar=metavar, help=help, autocompletion=complete, **more)


Directory = Annotated[str, argument("DIRECTORY", "A path or an fsspec URL.")]
StorageOptions = Annotated[
    str | None,
    option(
        "--storage-options JSON",
        "Options for fsspec, as JSON or @FILE. fsspec also reads its own configuration and environment.",
    ),
]
KeyEnv = Annotated[str | None, option("--key-env NAME", "Environment variable with the key of signed records.")]
KeyFile = Annotated[str | None, option("--key-file FILE", "File with the key.")]
Json = Annotated[bool, option("--json", "Print JSON, for scripts.")]
Apply = Annotated[bool, option("--apply", "Remove them. Without this they are only shown.")]
Match = Annotated[str, option("--match", "Only tensors and values whose name contains this.")]
PolicyFile = Annotated[str | None, option("--policy -p FILE", "A policy as YAML, as Policy.to_yaml writes it.")]
RequiredPolicyFile = Annotated[str, option("--policy -p FILE", "The policy, as YAML.", show_default=False)]
Run = Annotated[str | None, option("--run ID", "The run, or RUN/LABEL. Without it: the run of the newest checkpoint.")]
Among = Annotated[str | None, option("--run ID", "Only checkpoints of this run, or RUN/LABEL.")]

_mixed: Final[list[str]] = []
"""Directories of this command that have signed records and others, and were read without the key."""
PATIENCE_S: Final = 30.0
"""Seconds that a server may be away. A training waits longer; at a terminal the cause is often a typo in the host."""


# Groups of options


@attrs.frozen(kw_only=True)
class Access:
    """Options that open a directory."""

    storage_options: StorageOptions = None
    key_env: KeyEnv = None
    key_file: KeyFile = None

    @property
    def key(self) -> HMACKey | None:
        """The key of signed records, if one is asked for."""
        if self.key_env is not None and self.key_file is not None:
            msg = "both --key-env and --key-file are given; pass one"
            raise PolicyError(msg)
        if self.key_env is not None:
            return HMACKey.from_env(self.key_env)
        return None if self.key_file is None else HMACKey.from_file(self.key_file)


@attrs.frozen(kw_only=True)
class Ranking:
    """Options that say which checkpoint is best."""

    by: Annotated[
        str | None, option("--by METRIC", "The metric that says which checkpoint is best.", complete_metric)
    ] = None
    mode: Annotated[
        Literal["min", "max"] | None, option("--mode", "Whether the smallest or the largest value is best.")
    ] = None
    policy: PolicyFile = None


def expanded(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command whose groups of options are expanded: each field becomes an option, after the command's own."""
    # Not get_type_hints: in Python 3.10 it makes an Annotated type with the default None a plain Optional.
    own = inspect.signature(command, eval_str=True).parameters.values()
    groups = {parameter.name: parameter.annotation for parameter in own if attrs.has(parameter.annotation)}
    parameters = [parameter for parameter in own if parameter.name not in groups]
    for kind in groups.values():
        types = get_type_hints(kind, include_extras=True)
        parameters += [
            inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=types[f.name])
            for f in attrs.fields(kind)
        ]

    @functools.wraps(command)
    def run(**given: Any) -> None:
        made = {name: kind(**{f.name: given.pop(f.name) for f in attrs.fields(kind)}) for name, kind in groups.items()}
        _mixed.clear()
        command(**given, **made)
        output.leave_if(bool(_mixed))

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


# Directories


def open_place(directory: str, access: Access, owner: str = "", *, new: bool = False) -> Storage:
    """Return the storage. Unless it may be ``new``, a local directory must exist, because no reader may make it."""
    options = {"retry": Retry(PATIENCE_S), **_parse_options(access.storage_options)}
    storage = open_storage(directory, owner, options)
    if isinstance(storage, SupportsPaths) and not (new or os.path.isdir(path := storage.local_path("").rstrip("/"))):
        msg = f"there is no directory {path}{similar(Path(path), folders=True)}"
        raise StorageError(msg)
    return storage


def _parse_options(text: str | None) -> dict[str, Any]:
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
    # The message does not quote the text, because it holds credentials.
    msg = '--storage-options is not a JSON object; write \'{"key": "value"}\', or @FILE with such text in it'
    raise PolicyError(msg)


def read_policy(path: str) -> Policy:
    """Read a policy file; an error names the file and the line."""
    policy, problems = check_policy(read_policy_file(path))
    if policy is None:
        msg = "; ".join(f"{path}, {problem}" for problem in problems[:3])
        raise PolicyError(msg)
    return policy


def read_policy_file(path: str) -> bytes:
    """Return the bytes of a policy file, at most one more than are parsed."""
    try:
        with open(path, "rb") as stream:
            return stream.read(MAX_YAML_BYTES + 1)
    except FileNotFoundError as error:
        msg = f"there is no policy file {path}{similar(Path(path).absolute())}"
        raise NotFoundError(msg) from error


def policies(catalog: Catalog, path: str | None) -> Policies:
    """Return the policy of each run: that of the file, else the one that the run has noted."""
    return Policies(catalog, None if path is None else read_policy(path))


def look(directory: str, access: Access, *, below: bool = False, begun: bool = False) -> Catalog:
    """Look at a directory. It must have a record, or, if ``below`` is set, one of the directories below it.

    If ``begun`` is set, it is enough that a first save had begun there.
    """
    catalog = look_at(open_place(directory, access), access.key)
    if isinstance(catalog.storage, SupportsPaths):
        catalog = attrs.evolve(catalog, place=directory)  # As it was typed.
    _announce(catalog)
    is_begun = begun and any(path.startswith(f"{HOME}/") for path in catalog.files)
    if not (catalog.has_records or is_begun or (below and catalog.below)):
        raise StorageError(_what_is_there(catalog))
    return catalog


def _announce(catalog: Catalog) -> None:
    """Say if the signatures of a directory were not checked."""
    if unchecked := unchecked_text(catalog):
        output.say(f"{catalog.place}: {unchecked}")


def payload(place: str, access: Access, usage: str) -> Payload:
    """Return the file or folder at a path or URL; if it is a directory of checkpoints, the error has the ``usage``."""
    found = payload_alone(place, access)
    if found is None:
        catalog = look(place, access)
        msg = (
            f"{place} is a directory of checkpoints ({count_text(len(catalog.records), 'checkpoint')}); name one of "
            f"them: 'checkpointer {usage}'. NAME may be a step or 'last'; 'checkpointer ls {place}' lists the names"
        )
        raise NotFoundError(msg)
    return found


def payload_alone(place: str, access: Access) -> Payload | None:
    """Return the file or folder at a path or URL; None if it is a directory of checkpoints."""
    found = payload_at(place, lambda directory: open_place(directory, access), access.key)
    if found is not None and found.catalog is not None:
        _announce(found.catalog)
    return found


def unchecked_text(catalog: Catalog) -> str:
    """Return how many records are signed and were not checked; empty if none is, or the key was given.

    If there are records without a signature among them, the command ends with the exit code that says so.
    """
    if not catalog.is_unchecked:
        return ""
    if catalog.is_mixed:
        _mixed.append(catalog.place)
    are = "record is" if catalog.total == 1 else "records are"
    return (
        f"{catalog.signed} of {catalog.total} {are} signed, and no signature was checked: pass --key-env or --key-file"
    )


def _what_is_there(catalog: Catalog) -> str:
    if catalog.below:
        return (
            f"{catalog.place} has no checkpoint of its own, and these directories below have: "
            f"{some_of(catalog.below)}. Name one of them; 'checkpointer ls {catalog.place}' lists them all"
        )
    files = sorted(path for path in catalog.files if not path.startswith(f"{HOME}/"))
    if above := _records_above(catalog, files):
        return above
    if files:
        return (
            f"{catalog.place} has no record, but files such as {', '.join(files[:3])}; "
            "'checkpointer adopt' makes records of what Lightning, the HF Trainer or torch.save wrote, and "
            "'checkpointer show' shows one file"
        )
    return f"{catalog.place} holds no checkpoint"


def _records_above(catalog: Catalog, files: list[str]) -> str:
    """Return where the records of these files are, if they are in a directory above; else an empty text."""
    if not isinstance(catalog.storage, SupportsPaths):
        return ""
    for above, folder in directories_above(Path(os.path.abspath(catalog.storage.local_path("")))):
        recorded = [
            name for name in (f"{folder}/{file}" for file in files) if os.path.exists(above / record_path(name))
        ]
        if recorded:
            place = os.path.relpath(above) if not os.path.isabs(catalog.place) else str(above)
            found = look_at(open_storage(str(above), ""), catalog.trust)
            runs = dict.fromkeys(found.id_of(r.run, r.label) for r in found.records if r.name in recorded)
            which = f" with --run {next(iter(runs))}" if len(runs) == 1 and len(found.runs) > 1 else ""
            return f"{catalog.place} has no record of its own; those of its files are in {place}: pass {place}{which}"
    return ""


def check_source(source: str) -> None:
    """Raise `NotFoundError` if a local source of metrics is not there."""
    if "://" not in source and not os.path.exists(source):
        msg = f"there is no file or directory {source}{similar(Path(source).absolute())}"
        raise NotFoundError(msg)


def check_out(path: str, access: Access, *known: str) -> None:
    """Refuse a new file that would replace a checkpoint or an alias, or lie in a signed directory without its key."""
    place, key = Path(path).absolute(), access.key
    if not place.parent.is_dir():
        hint = similar(place.parent, folders=True)
        msg = f"there is no directory {place.parent} to write {place.name} to{hint}; make it first"
        raise StorageError(msg)
    for folder, name in directories_above(place):
        catalog = look_at(open_place(str(folder), Access()), key)
        refuse_unsigned(catalog.signed, folder, key)
        if name in catalog.aliases or os.path.exists(folder / record_path(name)):
            msg = f"{path} is a checkpoint of {folder}, and is not replaced; name a new file"
            raise NameTakenError(msg)
    if known and not path.lower().endswith(known):
        msg = f"the extension of {path!r} is not {' or '.join(known)}; name a file with such an extension"
        raise PolicyError(msg)


@contextlib.contextmanager
def changing(directory: str, access: Access) -> Iterator[tuple[Catalog, Journal]]:
    """Open a directory to change its records; yields what is there, and the journal that writes them."""
    key = access.key
    with writing(directory, access) as (storage, owner):
        yield look_at(storage, key), Journal(storage, owner, key)


@contextlib.contextmanager
def writing(directory: str, access: Access, *, new: bool = False) -> Iterator[tuple[Storage, str]]:
    """Open a directory to change it; yields the storage and the id of this writer. ``new``: it need not exist."""
    with temporary_owner() as owner:
        storage = open_place(directory, access, owner, new=new)
        yield storage, owner
        if isinstance(storage, SupportsSweep):
            storage.close()
