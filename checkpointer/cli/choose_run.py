"""How commands choose a run and its checkpoints. If there are several runs, they say which one they chose."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import attrs

from checkpointer._display import some_of
from checkpointer.cli import options, output
from checkpointer.errors import NotFoundError, PolicyError
from checkpointer.policy.policy import Policy
from checkpointer.policy.ranking import Metric
from checkpointer.policy.yaml_codec import suggest
from checkpointer.records.manifest import Manifest
from checkpointer.records.record import Record
from checkpointer.tools.adopt_names import copy_of
from checkpointer.tools.catalog import Catalog
from checkpointer.tools.query import metric_names

_MOST_RUNS = 3
"""So many other runs are named."""


@attrs.frozen(kw_only=True)
class Chosen:
    """A run of a directory, and the records as its own manager sees them."""

    catalog: Catalog
    manifest: Manifest

    @property
    def id(self) -> str:
        """The value of ``--run`` that stands for it."""
        return self.catalog.id_of(self.manifest.run, self.manifest.label)

    @property
    def policy(self) -> Policy | None:
        """The policy that the run has noted."""
        return options.policies(self.catalog, None).of(self.manifest.run, self.manifest.label)

    def again(self, catalog: Catalog) -> Chosen:
        """Return the run in a later look at the directory."""
        own = self.manifest
        return Chosen(catalog=catalog, manifest=catalog.manifest(*((own.run, own.label) if own.own else ())))

    def others(self, have: Callable[[Chosen], object], what: str) -> str:
        """Return a hint that names the other runs that have something; empty if none has it."""
        runs = [Chosen(catalog=self.catalog, manifest=self.catalog.manifest(*one)) for one in self.catalog.runs]
        ids = [run.id for run in runs if run.id != self.id and have(run)]
        if not ids:
            return ""
        verb = f"run {ids[0]} has" if len(ids) == 1 else f"runs {some_of(ids)} have"
        return f"; {verb} {what}: pass --run {ids[-1]}"


def choose(catalog: Catalog, run: str | None) -> Chosen:
    """Return the run of an id, else that of the newest checkpoint. If there are several, say which one it is."""
    found = catalog.named(run)
    chosen = Chosen(catalog=catalog, manifest=catalog.manifest(*found[-1]) if found else catalog.manifest())
    if len(found) > 1:
        what = f"{len(found)} runs" if run is None else f"{len(found)} labels of run {run}"
        # The records are in commit order, so the last one of a run stays.
        newest = {(record.run, record.label): record.name for record in catalog.records}
        own, *others = reversed(found)
        named = [f"{catalog.id_of(*one)} (newest: {newest[one]})" for one in others[:_MOST_RUNS]]
        more = f" and {len(others) - _MOST_RUNS} more" if len(others) > _MOST_RUNS else ""
        output.say(
            f"{catalog.place} has {what}; this is run {chosen.id}, because it has the newest checkpoint, "
            f"{newest[own]}; --run takes another one: {', '.join(named)}{more}"
        )
    return chosen


def find(catalog: Catalog, which: str, run: str | None, policy: str | None = None) -> Record:
    """Return the checkpoint of a name, step or alias. `last` and `best` are what the commands of that name print."""
    if which not in ("last", "best") or any(record.name == which for record in catalog.records):
        return catalog.find(which, run)
    chosen = choose(catalog, run)
    if which == "best":
        return best_first(chosen, options.Ranking(policy=policy))[0]
    if chosen.manifest.newest is None:
        raise output.no_checkpoint(catalog)
    return chosen.manifest.newest


def find_all(catalog: Catalog, names: Iterable[str], run: str | None) -> list[Record]:
    """Return the checkpoints of names, steps and aliases, each one once."""
    return [*{(found := find(catalog, name, run)).name: found for name in names}.values()]


def best_first(chosen: Chosen, ranking: options.Ranking) -> list[Record]:
    """Return the ranked checkpoints, best first, at least one."""
    history = chosen.manifest.history
    if ranking.by is not None and ranking.policy is not None:
        msg = "both --by and --policy are given; pass the one that says which is best"
        raise PolicyError(msg)
    if not chosen.manifest.live:
        raise output.no_checkpoint(chosen.catalog)
    metric = metric_of(ranking, chosen)
    if metric is None and ranking.policy is not None:
        policy = options.read_policy(ranking.policy)
        if policy.best_rule is None:
            msg = f"{ranking.policy} has no KeepBest, so it ranks nothing; pass --by METRIC --mode min or max"
            raise PolicyError(msg)
        _check_metric(policy.best_rule.metric, chosen)
        return policy.best_first(history)
    ranked = _ranked(chosen) if metric is None else metric.ranked(history)
    if not ranked:
        raise _no_best(chosen)
    return ranked


def metric_of(ranking: options.Ranking, chosen: Chosen) -> Metric | None:
    """Return the metric that ``--by`` names; None if it is not given."""
    if (ranking.by is None) != (ranking.mode is None):
        given = f"--by {ranking.by or 'METRIC'} --mode {ranking.mode or 'min, or --mode max'}"
        msg = f"--by and --mode belong together: {given}"
        raise PolicyError(msg)
    if ranking.by is None or ranking.mode is None:
        return None
    metric = Metric(ranking.by, mode=ranking.mode)
    _check_metric(metric, chosen)
    return metric


def _check_metric(metric: Metric, chosen: Chosen) -> None:
    if problem := lacking(metric, chosen):
        raise NotFoundError(problem)


def lacking(metric: Metric, chosen: Chosen) -> str:
    """Return the message that no checkpoint of a run has a metric; empty if one has it."""

    def has_it(one: Chosen) -> bool:
        return any(metric.value(record) is not None for record in one.manifest.history)

    if has_it(chosen):
        return ""
    hint = chosen.others(has_it, "it") or suggest(metric.name, dict.fromkeys(metric_names(chosen.manifest.history)))
    return f"no checkpoint of run {chosen.id} has the metric {metric.name!r}{hint}"


def not_noted(chosen: Chosen, hint: str = "") -> NotFoundError:
    """Return the error of a run that has not noted its policy; it names the other runs that have."""
    others = chosen.others(lambda one: one.policy, "noted one")
    return NotFoundError(f"run {chosen.id} in {chosen.catalog.place} has not noted its policy{others}{hint}")


def _ranked(chosen: Chosen) -> list[Record]:
    """Return what the run itself says: by the policy that it noted, else by an alias or a name that says best."""
    manifest, policy = chosen.manifest, chosen.policy
    if policy is not None and policy.ranking is not None:
        return policy.best_first(manifest.history)
    targets = {target for alias, target in chosen.catalog.aliases.items() if _says_best(alias)}
    found = [record for record in manifest.live if record.name in targets]
    return found or [record for record in manifest.live if record.is_adopted and _says_best(record.name)]


def _says_best(name: str) -> bool:
    return "best" in copy_of(name)


def _no_best(chosen: Chosen) -> NotFoundError:
    catalog, have = chosen.catalog, ", ".join(metric_names(chosen.manifest.history)) or "none"
    unknown = any(_says_best(alias) for alias, target in catalog.aliases.items() if not target)
    why = "does not say which checkpoint its best alias is a copy of" if unknown else "has no best alias"
    others = chosen.others(_ranked, "one")
    how = f"'checkpointer best' takes --by METRIC --mode min or max (metrics: {have})"
    return NotFoundError(f"which is best? run {chosen.id} in {catalog.place} {why}{others}; {how}")
