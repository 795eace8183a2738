"""Plans what a policy removes from a directory, with the reasons, and removes it. Pins what it must not remove."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import attrs

from checkpointer.commit.index import HOME, parse_json, read_bounded
from checkpointer.commit.journal import Journal, holding
from checkpointer.commit.lease import LEASE_S, as_lease
from checkpointer.commit.payload_names import location
from checkpointer.commit.recovery import retire
from checkpointer.commit.signing import refuse_unsigned
from checkpointer.commit.writer_marks import refuse_if_live
from checkpointer.errors import NameTakenError, RestoreError, StorageError
from checkpointer.policy.decide import explain
from checkpointer.policy.policy import Policy
from checkpointer.policy.retention import KeepBest, KeepLast, Rule
from checkpointer.ports import Storage, SupportsSweep
from checkpointer.records.manifest import Manifest
from checkpointer.records.record import Entry, Record
from checkpointer.storage.local_upload import FULL
from checkpointer.tools.catalog import Catalog


@attrs.frozen(kw_only=True)
class Pruning:
    """The checkpoints that stay and those that go, each with the reason."""

    kept: Mapping[str, str]
    going: Mapping[str, str]
    records: tuple[Record, ...] = ()
    """The checkpoints that go, oldest first."""

    @property
    def bytes(self) -> int:
        """Bytes that are freed."""
        return sum(record.size for record in self.records)


def plan_pruning(
    policy: Policy, manifest: Manifest, aliases: Mapping[str, str] | None = None, *, abandoned: bool = False
) -> Pruning:
    """Return which checkpoints of a run a policy keeps. Pure; only the run's own checkpoints are ever removed.

    Args:
        policy: What to keep; its trigger does not count.
        manifest: The records, as the run sees them.
        aliases: Aliases that are there, and what they stand for: that is kept.
        abandoned: Also remove what the run left behind when it went back to an earlier step, and what a process has
            saved after another one had taken over the run.
    """
    reasons = {name: "; ".join(why) for name, why in explain(policy, manifest).items()}
    for alias, name in (aliases or {}).items():
        # If the policy itself keeps what `last` points to, its reason says so.
        if name and not (name in reasons and policy.last and alias == policy.name.last_file):
            reasons[name] = "; ".join(filter(None, (reasons.get(name, ""), f"{alias} points to it")))
    kept: dict[str, str] = {}
    going: dict[str, str] = {}
    why_not = _why_not(policy, manifest)
    for record in manifest.own:
        if record.name in reasons:
            kept[record.name] = reasons[record.name]
        elif record.pinned:
            kept[record.name] = "pinned"
        elif not (why_abandoned := manifest.why_abandoned(record)):
            going[record.name] = why_not.get(record.name, "a rescue, and a regular one came after it")
        elif abandoned:
            going[record.name] = why_abandoned
        else:
            kept[record.name] = f"{why_abandoned}; --abandoned removes it"
    return Pruning(kept=kept, going=going, records=tuple(r for r in manifest.own if r.name in going))


def _why_not(policy: Policy, manifest: Manifest) -> dict[str, str]:
    """Return for each checkpoint of the history why no rule keeps it, if none does."""
    history = manifest.history
    places = [_places(rule, history) for rule in policy.rules]
    why = {r.name: "; ".join(place[r.name] for place in places) or "the policy has no rule" for r in history}
    if policy.limits:
        limit = f"beyond the limit: {' and '.join(map(str, policy.limits))}"
        why |= {name: limit for rule in policy.rules for name in rule.keep(history)}
    return why


def _places(rule: Rule, history: Sequence[Record]) -> dict[str, str]:
    if isinstance(rule, KeepBest):
        ranked = rule.ranked(history)
        places = {record.name: f"#{n} of {len(ranked)}" for n, record in enumerate(ranked, start=1)}
        beyond = f"by {rule.metric}, beyond the best {rule.k}"
        return {record.name: f"{places.get(record.name, 'not ranked')} {beyond}" for record in history}
    if isinstance(rule, KeepLast):
        return {record.name: f"{n} newer, beyond the last {rule.n}" for n, record in enumerate(reversed(history))}
    return {record.name: f"not kept by {rule}" for record in history}


def prune(catalog: Catalog, pruning: Pruning, journal: Journal) -> tuple[Record, ...]:
    """Remove what goes, by the steps of `checkpointer.commit.transaction`: a kill in between leaves nothing half.

    Returns:
        What was removed. If a payload cannot be deleted, there is a warning, and its record says that it is to go.

    Raises:
        UntrustedError: If the directory has signed records, and the journal has no key.
        AliasInUseError: If a process writes to the directory, or may do so on another machine.
        RunInUseError: If a process trains the run.
        RestoreError: If records are damaged, because the policy might keep their checkpoints.
    """
    _refuse(catalog, journal)
    if catalog.damaged:
        msg = (
            f"{catalog.place} has damaged records ({', '.join(catalog.damaged)}), and their checkpoints may be better "
            "than those that the policy keeps; nothing was removed. Repair or remove these records first"
        )
        raise RestoreError(msg)
    return _remove(pruning.records, journal)


def why_not_removed(catalog: Catalog, record: Record) -> str:
    """Return why a checkpoint may not be removed by its name; empty if it may."""
    if record.pinned:
        return f"it is pinned; 'checkpointer unpin {catalog.place} {record.name}' comes first"
    aliases = catalog.aliases_of(record)
    if aliases:
        return f"{aliases[0]} points to it; delete {aliases[0]} first, if no program needs it"
    return ""


def remove(catalog: Catalog, records: Sequence[Record], journal: Journal) -> tuple[Record, ...]:
    """Remove checkpoints by the steps of `checkpointer.commit.transaction`; return them.

    Raises:
        NameTakenError: If one may not be removed; see `why_not_removed`. Nothing was removed.
        UntrustedError, AliasInUseError, RunInUseError: See `prune`.
    """
    _refuse(catalog, journal)
    for record in records:
        if why := why_not_removed(catalog, record):
            msg = f"{record.name} stays: {why}; nothing was removed"
            raise NameTakenError(msg)
    runs = dict.fromkeys((record.run, record.label) for record in records)
    removed = [_remove([r for r in records if (r.run, r.label) == run], journal) for run in runs]
    return tuple(record for some in removed for record in some)


def set_pinned(catalog: Catalog, records: Sequence[Record], journal: Journal, *, pinned: bool) -> tuple[Record, ...]:
    """Pin checkpoints, or let the rules decide about them again; return those that changed.

    Raises:
        UntrustedError, AliasInUseError, RunInUseError: See `prune`.
    """
    _refuse(catalog, journal)
    changing = [record for record in records if record.pinned != pinned]
    if isinstance(journal.storage, SupportsSweep):
        journal.storage.prepare()
    for run in dict.fromkeys((record.run, record.label) for record in changing):
        own = [record for record in changing if (record.run, record.label) == run]
        with holding(journal, *run, as_lease(LEASE_S, None)), journal.changing(aliases=[r.name for r in own]):
            for record in own:
                if _is_there(journal, record):
                    journal.put(Entry(record=attrs.evolve(record, pinned=pinned)))
    return tuple(changing)


def _refuse(catalog: Catalog, journal: Journal) -> None:
    """Raise an error if the key is missing, or another process writes to the directory."""
    refuse_unsigned(catalog.signed, catalog.place, journal.trust)
    refuse_if_live(journal.storage, catalog.place, _owners(catalog))


def _remove(records: Sequence[Record], journal: Journal) -> tuple[Record, ...]:
    """Remove checkpoints of one run."""
    if not records:
        return ()
    if isinstance(journal.storage, SupportsSweep):
        with _saying_how_on_a_full_disk(journal.storage, records[0]):
            journal.storage.prepare()
    with holding(journal, records[0].run, records[0].label, as_lease(LEASE_S, None)):
        going = [record for record in records if _is_there(journal, record)]
        entries = [journal.retiring(record) for record in going]
        with journal.changing(*entries) as failed:
            retire(journal, going, failed)
    return tuple(going)


@contextlib.contextmanager
def _saying_how_on_a_full_disk(storage: Storage, record: Record) -> Iterator[None]:
    """If the block fails because the disk is full, say how to remove a checkpoint there all the same."""
    try:
        yield
    except StorageError as error:
        if not isinstance(error.__cause__, OSError) or error.__cause__.errno not in FULL:
            raise
        msg = (
            f"{error}. Each removal is noted first, which takes a few kB: delete one file yourself, such as "
            f"{location(storage, record.name)}, and run the command again"
        )
        raise StorageError(msg) from error


def _is_there(journal: Journal, record: Record) -> bool:
    """Return whether the record is as it was planned with: it may have been pinned since."""
    entry = journal.find(record.name)
    return entry is not None and entry.record == record


def _owners(catalog: Catalog) -> Iterator[str]:
    """Yield the owners of unfinished writes, and of aliases."""
    yield from (entry.owner for entry in catalog.unfinished)
    for path in catalog.files:
        if path.startswith(f"{HOME}/aliases/"):
            data = parse_json(read_bounded(catalog.storage, path), path)
            if isinstance(data, dict) and isinstance(data.get("owner"), str):
                yield data["owner"]
