"""``checkpointer doctor``: try a directory or URL before a long run."""

from __future__ import annotations

import contextlib
from typing import Annotated

import attrs

from checkpointer.cli import options, output
from checkpointer.cli.commands.simulate import as_bytes
from checkpointer.ports import SupportsPaths
from checkpointer.tools.doctor import Found, diagnose, leaving_no_folder


def doctor_command(
    directory: options.Directory,
    access: options.Access,
    size: Annotated[
        str, options.option("--size BYTES", "Size of a checkpoint, such as 20GB.", show_default=False)
    ] = "",
    as_json: options.Json = False,
) -> None:
    """Try a directory or URL, which need not exist: permissions, how files are replaced, fsync, speed, clock, space.

    It writes a few MB and removes them. Exits with 1 if a training would fail there, or could lose data.

    Example: checkpointer doctor runs/digits --size 20GB
    """
    found = []
    place = options.open_place(directory, access, new=True)
    tidy = leaving_no_folder(place.local_path("")) if isinstance(place, SupportsPaths) else contextlib.nullcontext()
    with tidy, options.writing(directory, access, new=True) as (storage, _):
        for one in diagnose(storage, as_bytes(size) if size else None):
            found.append(one)
            if not as_json:
                _print(one)
    if as_json:
        output.print_json([attrs.asdict(one) for one in found])
    output.leave_if(any(one.level == "BAD" for one in found))


def _print(found: Found) -> None:
    style = {"BAD": "red", "note": "bold"}.get(found.level, "")
    output.print_marked(f"{found.level:4}", style, f"  {found.topic}: {found.text}")
    output.flush()
