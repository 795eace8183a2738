"""``checkpointer last``: the path of the newest checkpoint, for scripts."""

from __future__ import annotations

from checkpointer.cli import options, output
from checkpointer.errors import NotFoundError


def last_command(
    directory: options.Directory,
    run: options.Run = None,
    storage_options: options.StorageOptions = None,
    key_env: options.KeyEnv = None,
    key_file: options.KeyFile = None,
    as_json: options.Json = False,
) -> None:
    """Print the path of the newest checkpoint that counts, rescues included, and nothing else."""
    catalog = options.look(directory, storage_options, key_env, key_file)
    newest = catalog.manifest(run).newest
    if newest is None:
        output.say_damaged(catalog)
        msg = f"{catalog.place} has no checkpoint that counts"
        raise NotFoundError(msg)
    path = catalog.location(newest.name)
    if as_json:
        output.print_json(newest.to_dict() | {"path": path})
    else:
        output.print_line(path)
    # A damaged record may be that of a newer one.
    output.leave_if(output.say_damaged(catalog))
