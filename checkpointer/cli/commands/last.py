"""``checkpointer last``: the path of the newest checkpoint, for scripts."""

from __future__ import annotations

from checkpointer.cli import options, output


def last_command(
    directory: options.Directory, access: options.Access, run: options.Run = None, as_json: options.Json = False
) -> None:
    """Print the path of the newest checkpoint that counts, rescues included, and nothing else."""
    catalog = options.look(directory, access)
    newest = catalog.manifest(run).newest
    if newest is None:
        raise output.no_checkpoint(catalog)
    output.print_path(catalog, newest, as_json=as_json)
