"""``checkpointer last`` and ``best``: the path of one checkpoint, for scripts."""

from __future__ import annotations

from checkpointer.cli import options, output
from checkpointer.cli.choose_run import best_first, choose


def last_command(
    directory: options.Directory, access: options.Access, run: options.Run = None, as_json: options.Json = False
) -> None:
    """Print only the path of the newest checkpoint that counts, also if it is a rescue.

    Example: checkpointer last runs/digits
    """
    catalog = options.look(directory, access)
    newest = choose(catalog, run).manifest.newest
    if newest is None:
        raise output.no_checkpoint(catalog)
    output.print_path(catalog, newest, as_json=as_json)


def best_command(
    directory: options.Directory,
    access: options.Access,
    ranking: options.Ranking,
    run: options.Run = None,
    as_json: options.Json = False,
) -> None:
    """Print only the path of the best checkpoint.

    --by and --mode rank by a metric; --policy ranks by its first KeepBest. Without them the policy ranks that the run
    noted in the directory. If the run noted none, it is the checkpoint that the alias `best` points to, or an adopted
    file of that name.

    Example: checkpointer best runs/digits --by val_loss --mode min
    """
    catalog = options.look(directory, access)
    output.print_path(catalog, best_first(choose(catalog, run), ranking)[0], as_json=as_json)
