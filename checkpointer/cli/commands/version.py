"""``checkpointer version``: the versions that a report of a problem needs."""

from __future__ import annotations

import platform
from importlib import metadata

from checkpointer.cli import options, output

_PACKAGES = (
    *("torch", "safetensors", "fsspec", "lightning", "pytorch-lightning", "transformers", "s3fs", "gcsfs", "adlfs"),
    *("paramiko", "typer"),
)


def version_command(as_json: options.Json = False) -> None:
    """Print the versions of this library, of Python, of torch and of the drivers and hosts. Imports none of them.

    Example: checkpointer version
    """
    from checkpointer import __version__
    from checkpointer.tools.doctor import packages

    found = {"torch-checkpointer": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    bad = [one.text for one in packages() if one.level == "BAD"]
    if as_json:
        output.print_json({"versions": found, "problems": bad})
    else:
        output.print_table(["", ""], list(found.items()))
        for text in bad:
            output.print_line(f"BAD   {text}")
    output.leave_if(bool(bad))
