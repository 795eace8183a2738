"""``checkpointer last`` and ``best``: the path of one checkpoint, for scripts."""

from __future__ import annotations

from checkpointer.cli import options, output
from checkpointer.errors import NotFoundError, PolicyError
from checkpointer.records.manifest import Manifest
from checkpointer.records.record import Record
from checkpointer.tools.catalog import Catalog
from checkpointer.tools.query import metric_names


def last_command(
    directory: options.Directory, access: options.Access, run: options.Run = None, as_json: options.Json = False
) -> None:
    """Print the path of the newest checkpoint that counts, rescues included, and nothing else.

    Example: checkpointer last runs/digits
    """
    catalog = options.look(directory, access)
    newest = catalog.manifest(run).newest
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
    """Print the path of the best checkpoint, and nothing else.

    A metric (--by and --mode) or the first KeepBest of a policy ranks them. Without both, the policy counts that the
    run noted in the directory; if it noted none, the `best` alias is followed.

    Example: checkpointer best runs/digits --by val_loss --mode min
    """
    catalog = options.look(directory, access)
    ranked = best_first(catalog, catalog.manifest(run), ranking, access)
    output.print_path(catalog, ranked[0], as_json=as_json)


def best_first(catalog: Catalog, manifest: Manifest, ranking: options.Ranking, access: options.Access) -> list[Record]:
    """Return the ranked checkpoints, best first, at least one."""
    metric = ranking.metric((*metric_names(manifest.history), "step", "epoch")) if manifest.live else None
    if ranking.by is not None and ranking.policy is not None:
        msg = "both --by and --policy are given; pass the one that says which is best"
        raise PolicyError(msg)
    if not manifest.live:
        raise output.no_checkpoint(catalog)
    if metric is not None:
        ranked = metric.ranked(manifest.history)
    elif ranking.policy is not None:
        policy = options.read_policy(ranking.policy)
        if policy.ranking is None:
            msg = f"{ranking.policy} has no KeepBest, so no best; pass --by METRIC --mode min or max"
            raise PolicyError(msg)
        ranked = policy.best_first(manifest.history)
    elif (noted := options.policies(catalog, None).of(manifest.run, manifest.label)) and noted.ranking:
        ranked = noted.best_first(manifest.history)
    else:
        ranked = [r for r in manifest.live if any(alias.startswith("best") for alias in catalog.aliases_of(r))]
    if not ranked:
        have = ", ".join(metric_names(manifest.history)) or "none"
        unknown = any(alias.startswith("best") for alias, target in catalog.aliases.items() if not target)
        why = "does not say which checkpoint its best alias is a copy of" if unknown else "has no best alias"
        msg = f"which is best? {catalog.place} {why}; pass --by METRIC --mode min or max (metrics: {have})"
        raise NotFoundError(msg)
    return ranked
