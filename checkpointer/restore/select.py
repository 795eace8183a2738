"""Selects the checkpoints that a restore tries, in order."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

from checkpointer._display import some_of
from checkpointer.commit.index import HOME, RECORDS, directories_below, record_path
from checkpointer.errors import (
    CorruptError,
    NotFoundError,
    NoValidCheckpointError,
    RecordError,
    RestoreError,
    UntrustedError,
)
from checkpointer.policy.policy import Policy
from checkpointer.ports import Storage
from checkpointer.records.manifest import Manifest
from checkpointer.records.record import Record, commit_order


def select(
    which: str | int | None,
    policy: Policy,
    manifest: Manifest,
    contents: Literal["full", "any"],
    *,
    damaged: Mapping[str, RecordError] = MappingProxyType({}),
) -> tuple[Record, ...]:
    """Return the records to try, in order. Only the newest and the best have others to fall back to.

    ``damaged`` are the record files that cannot be read or trusted, by path.

    Raises:
        NotFoundError: If no record has that name or step.
        CorruptError: If the record of that name cannot be read.
        UntrustedError: If the record of that name is not signed with the manager's key.
        RestoreError: If the record of that name has only weights, and ``contents="full"``.
    """
    aliases = {policy.name.last_file: "last", policy.name.best_file: "best"}
    if isinstance(which, str) and which not in manifest.by_name:
        which = aliases.get(which, which)
    if which in (None, "last"):
        return tuple(r for r in reversed(manifest.live) if contents == "any" or r.contents == "full")
    if which == "best":
        if policy.ranking is None:
            raise _nothing_ranks(manifest)
        return tuple(policy.best_first(r for r in manifest.history if contents == "any" or r.contents == "full"))
    record = _named(which, policy, manifest, damaged)
    if contents == "full" and record.contents == "weights":
        msg = f"{record.name} holds only weights and cannot resume a run; pass contents='any' to load them"
        raise RestoreError(msg)
    return (record,)


def _named(which: str | int | None, policy: Policy, manifest: Manifest, damaged: Mapping[str, RecordError]) -> Record:
    names = [] if which is None or isinstance(which, int) else [which, f"{which}{policy.name.suffix}"]
    if isinstance(which, int):
        # An abandoned checkpoint is found by its step only if no other one has that step.
        found = [r for r in manifest.own if r.step == which]
        found.sort(key=lambda r: (manifest.counts(r), r.kind == "regular", commit_order(r)))
    else:
        found = [r for name in names if (r := manifest.by_name.get(name))][:1]
        found = found or [r for r in manifest.records if which and r.name.rpartition(".")[0] == which]
    if found:
        return found[-1]
    for refusal in [damaged[path] for name in names if (path := record_path(name)) in damaged]:
        raise (UntrustedError if isinstance(refusal, UntrustedError) else CorruptError)(str(refusal)) from refusal
    newest = ", ".join(f"{r.name} (step {r.step})" for r in manifest.records[-10:])
    have = f"the newest are: {newest}" if newest else "the directory has no checkpoint"
    refused = "".join(f"; {refusal}" for refusal in [*damaged.values()][:3])
    if isinstance(which, int) and (others := [r for r in manifest.records if r.step == which]):
        have = "; ".join(f"run {r.run} has {r.name}: pass run={r.run!r}, or this name" for r in others)
    msg = f"no checkpoint {'at step ' if isinstance(which, int) else ''}{which!r}; {have}{refused}"
    raise NotFoundError(msg)


def _nothing_ranks(manifest: Manifest) -> RestoreError:
    """Return the error of a policy without a ranking: what the caller can do, and which metrics there are."""
    metrics = dict.fromkeys(name for record in manifest.live for name in record.metrics)
    have = f"the checkpoints have {some_of([*metrics])}" if metrics else "no checkpoint has a metric"
    msg = (
        "there is no best: no policy with a KeepBest says which metric counts. Name a checkpoint or its step "
        "('checkpointer ls DIRECTORY --sort METRIC' puts them in order), or pass a policy with "
        f"KeepBest(k, METRIC, mode='min' or 'max'); {have}"
    )
    return RestoreError(msg)


def _ranked_elsewhere(policy: Policy, manifest: Manifest) -> str:
    """Return why nothing of the run is ranked, as far as records show it, and the other runs that have a best one."""
    metric = f": none of run {manifest.run} has {policy.ranking.name}" if policy.ranking and manifest.live else ""
    best = {r.run: r for r in reversed(policy.best_first(manifest.records)) if r.run != manifest.run}
    others = [f"run {run} has {record.name}: pass run={run!r}, or this name" for run, record in best.items()]
    return "; ".join((metric, *others))


def check_empty(which: object, policy: Policy, manifest: Manifest, storage: Storage | None) -> None:
    """Raise if there is something that a restore could mean, so that training does not start over silently.

    With ``storage`` files without a record count, too.
    """
    if which not in (None, "last", policy.name.last_file) and not policy.best_first(manifest.history):
        msg = f"there is no {which!r}: no checkpoint of the run is ranked{_ranked_elsewhere(policy, manifest)}"
        raise NotFoundError(msg)
    if manifest.live:
        msg = "there are only weights, which cannot resume a run; pass contents='any' to load them"
        raise RestoreError(msg)
    if storage is None or manifest.records:
        return
    there = storage.list()
    below = directories_below(there, RECORDS)
    if below:
        msg = (
            f"{storage} has no checkpoint of its own, but these directories below have: {some_of(below)}. Training "
            "does not start over silently: name one of them, or use an empty directory"
        )
        raise NoValidCheckpointError(msg)
    suffix = policy.name.suffix
    files = sorted(path for path in there if path.endswith(suffix) and not path.startswith(f"{HOME}/"))
    # A process that was replaced may have committed a checkpoint since the records were read.
    files = [path for path in files if record_path(path) not in there]
    if files:
        msg = (
            f"{storage} has no record, but files such as {', '.join(files[:3])}. Training does not start over "
            "silently: load one of them yourself, or use an empty directory"
        )
        raise NoValidCheckpointError(msg)
