"""``checkpointer best``: the path of the best checkpoint, for scripts."""

from __future__ import annotations

from typing import Annotated

import typer

from checkpointer.cli import options, output
from checkpointer.errors import NotFoundError, PolicyError
from checkpointer.policy.ranking import Metric
from checkpointer.policy.yaml_codec import suggest
from checkpointer.records.manifest import Manifest
from checkpointer.records.record import Record
from checkpointer.tools.catalog import Catalog
from checkpointer.tools.query import metric_names

By = Annotated[str | None, typer.Option("--by", metavar="METRIC", help="The metric that says which is best.")]
WhichMode = Annotated[options.Mode | None, typer.Option("--mode", help="Whether its smallest or largest value is.")]


def best_command(
    directory: options.Directory,
    by: By = None,
    mode: WhichMode = None,
    policy: options.PolicyFile = None,
    run: options.Run = None,
    storage_options: options.StorageOptions = None,
    key_env: options.KeyEnv = None,
    key_file: options.KeyFile = None,
    as_json: options.Json = False,
) -> None:
    """Print the path of the best checkpoint, and nothing else.

    Which one that is, a metric says (--by and --mode), a policy's first KeepBest, or else the `best` alias.
    """
    catalog = options.look(directory, storage_options, key_env, key_file)
    record = best_first(catalog, catalog.manifest(run), by, mode, policy)[0]
    path = catalog.location(record.name)
    if as_json:
        output.print_json(record.to_dict() | {"path": path})
    else:
        output.print_line(path)
    output.leave_if(output.say_damaged(catalog))


def best_first(
    catalog: Catalog, manifest: Manifest, by: str | None, mode: options.Mode | None, policy: str | None
) -> list[Record]:
    """Return the ranked checkpoints, best first, at least one."""
    if (by is None) != (mode is None):
        msg = "--by and --mode belong together: --by val_loss --mode min"
        raise PolicyError(msg)
    if by is not None and policy is not None:
        msg = "both --by and --policy are given; pass the one that says which is best"
        raise PolicyError(msg)
    if not manifest.live:
        output.say_damaged(catalog)
        msg = f"{catalog.place} has no checkpoint that counts"
        raise NotFoundError(msg)
    if by is not None and mode is not None:
        names = dict.fromkeys((*metric_names(manifest.history), "step", "epoch"))
        if by not in names:
            msg = f"no checkpoint of the run has the metric {by!r}{suggest(by, names)}"
            raise NotFoundError(msg)
        ranked = Metric(by, mode=mode.value).ranked(manifest.history)
    elif policy is not None:
        chosen = options.read_policy(policy)
        if chosen.ranking is None:
            msg = f"{policy} has no KeepBest, so no best; pass --by METRIC --mode min or max"
            raise PolicyError(msg)
        ranked = chosen.best_first(manifest.history)
    else:
        ranked = [r for r in manifest.live if any(alias.startswith("best") for alias in catalog.aliases_of(r))]
    if not ranked:
        have = ", ".join(metric_names(manifest.history)) or "none"
        unknown = any(alias.startswith("best") for alias, target in catalog.aliases.items() if not target)
        why = "does not say which checkpoint its best alias is a copy of" if unknown else "has no best alias"
        msg = f"which is best? {catalog.place} {why}; pass --by METRIC --mode min or max (metrics: {have})"
        raise NotFoundError(msg)
    return ranked
