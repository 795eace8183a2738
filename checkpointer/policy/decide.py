"""What becomes of one observation under a policy: pure functions of the policy, the observation and the records."""

from __future__ import annotations

import contextlib
from bisect import bisect_left
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain, islice, product, zip_longest
from typing import ClassVar, Final, Literal

import attrs

from checkpointer._display import lines_html, number_text, size_text, table_html
from checkpointer._secrets import without_secrets
from checkpointer.errors import NamingError
from checkpointer.policy.policy import Policy
from checkpointer.policy.retention import KeepBest
from checkpointer.policy.triggers import Trigger
from checkpointer.records.manifest import Manifest
from checkpointer.records.record import Kind, Observation, Ordered, Progress, Record, commit_order

MAX_RELIED_ON: Final = 32
"""How many checkpoints are looked at before others are retired."""

_CANDIDATE = "\0candidate"
"""Name of the record that is being decided on, until it has one: no file can be called so."""


@attrs.frozen(kw_only=True)
class _Change:
    name: str
    """File name of the checkpoint, relative to the directory."""
    retire: tuple[str, ...] = ()
    """Checkpoints that no rule keeps once this is done."""
    reason: str
    """Why."""
    observation: Observation
    """What is saved, or whose metrics are attached: the commit needs nothing else."""
    _verb: ClassVar[str]

    def __str__(self) -> str:
        retires = f"; retires {', '.join(self.retire)}" if self.retire else ""
        return f"{self._verb} {self.name}: {self.reason}{retires}"

    def _repr_html_(self) -> str:
        title = f"{self._verb.capitalize()} {self.name}"
        return lines_html(title, [("why", self.reason), ("retires", "\n".join(self.retire))])


@attrs.frozen(kw_only=True)
class Save(_Change):
    """The observation is saved. Truthy."""

    kind: Kind = "regular"
    """``"rescue"`` if an exception or a signal asked for it."""
    replaces: bool = False
    """Whether a checkpoint has that name and is replaced: of this run, or without a version counter of any."""
    _verb = "save"

    def __bool__(self) -> Literal[True]:
        return True


@attrs.frozen(kw_only=True)
class Attach(_Change):
    """The step is saved already: its record gets the new metrics and a new rank. Falsy, as nothing is written."""

    _verb = "attach metrics to"

    def __bool__(self) -> Literal[False]:
        return False


@attrs.frozen(kw_only=True)
class Skip:
    """Nothing is saved. Falsy."""

    reason: str
    """Why not."""
    due: bool = False
    """Whether the observation was due; a declined one counts for the triggers."""
    waiting: str = ""
    """Whether the due point is still open: the next observation that has the metric takes it."""

    def __bool__(self) -> Literal[False]:
        return False

    def __str__(self) -> str:
        return f"skip: {self.reason}"

    def _repr_html_(self) -> str:
        return lines_html("Skip", [("why", self.reason)])


Decision = Save | Attach | Skip


def decide(
    policy: Policy,
    now: Observation,
    manifest: Manifest,
    *,
    since: Progress | None = None,
    owed: str = "",
    is_writing: bool = False,
) -> Decision:
    """Decide what to do with one observation. Pure: the same arguments give the same answer, nothing else counts.

    Args:
        policy: The policy.
        now: The observation.
        manifest: The records, as the run sees them.
        since: The last due observation; None takes the newest record's.
        owed: Why it is due whatever the trigger says: an earlier due point that still waits for a metric, or the end.
        is_writing: Whether a save is still being written in the background.

    Raises:
        NamingError: If the template asks for something that is neither reported nor known.

    Example:
        >>> from checkpointer import EverySteps, KeepLast, Manifest, Observation, Policy, decide
        >>> policy = Policy(EverySteps(10), [KeepLast(1)])
        >>> decide(policy, Observation(metrics={}, step=10, epoch=0, time=0.0), Manifest()).name
        'epoch=0-step=10.ckpt'
        >>> decide(policy, Observation(metrics={}, step=11, epoch=0, time=0.0), Manifest()).name
        'epoch=0-step=11.ckpt'
    """
    saved = manifest.at_step(now.step)
    if saved is not None:
        return _attach(policy, now, manifest, saved)
    if since is None:
        since = manifest.progress_at(manifest.newest)
    due = policy.when.due(_place(now, is_writing=is_writing), since) or owed
    return _save_or_skip(policy, now, manifest, due) if due else Skip(reason=f"not due: {policy.when}")


def _place(now: Observation, *, is_writing: bool) -> Progress:
    return attrs.evolve(now.progress, is_writing=True) if is_writing else now.progress


def advance(
    decision: Decision, now: Observation, when: Trigger, *, since: Progress, owed: str, is_writing: bool = False
) -> tuple[Progress, str]:
    """Return the last due observation, and why it still waits for a metric, once a decision is carried out.

    A save that fails counts too: the next due point is another one. A rescue changes nothing. ``since`` and ``owed``
    are what holds before it, ``is_writing`` what `decide` was given.
    """
    if isinstance(decision, Save):
        return (now.progress.after([since]), "") if decision.kind == "regular" else (since, owed)
    if isinstance(decision, Skip) and decision.due:
        return now.progress.after([since]), decision.waiting
    # The step is saved already, and that answers this due point: it must not come up again at the next step.
    answered = when.due(_place(now, is_writing=is_writing), since)
    return (now.progress.after([since]), owed) if answered else (since, owed)


def after(decision: Decision, manifest: Manifest, policy: Policy | None = None) -> Manifest:
    """Return the manifest as it will be once the decision is carried out; size and digest are not known yet.

    A host that keeps its own account in the very file that is being saved needs it before. With the policy, what
    happens to a slot under ``last`` is foreseen too.
    """
    if isinstance(decision, Attach):
        return _attached(decision, manifest, policy)
    if not isinstance(decision, Save):
        return manifest
    candidate = attrs.evolve(
        _candidate(decision.observation, manifest), name=decision.name, kind=decision.kind, reason=decision.reason
    )
    foreseen = manifest.without(*decision.retire).with_record(candidate)
    if policy is not None and policy.last and decision.kind == "regular" and decision.name != policy.name.last_file:
        return foreseen.without(policy.name.last_file)  # The alias takes the slot's place.
    return foreseen


def own_name(policy: Policy, record: Record, manifest: Manifest, taken: Container[str] | None = None) -> str:
    """Return the name that the template gives a checkpoint, whatever alias it is written under now."""
    taken = _Taken(manifest, policy.aliases) if taken is None else taken
    return policy.name.free_name(_stem(policy, record, manifest, policy.name.keys), taken)


def _stem(policy: Policy, what: Observation | Record, manifest: Manifest, known: Iterable[str] = ()) -> str:
    known = manifest.seen.union(policy.known_metrics, known)
    return policy.name.stem(what.metrics, step=what.step, epoch=what.epoch, known=known)


def _attached(decision: Attach, manifest: Manifest, policy: Policy | None) -> Manifest:
    saved = manifest.by_name.get(decision.name) or manifest.at_step(decision.observation.step)
    if saved is None:
        return manifest
    if policy is not None and saved.name in policy.aliases:
        moved = attrs.evolve(saved, name=own_name(policy, saved, manifest))
        manifest, saved = manifest.without(saved.name).with_record(moved), moved
    foreseen = manifest.with_record(saved.attached(decision.observation))
    return foreseen.without(*(decision.retire if policy is None else surplus(policy, foreseen)))


def _save_or_skip(policy: Policy, now: Observation, manifest: Manifest, due: str) -> Save | Skip:
    candidate = _candidate(now, manifest)
    extended = manifest.with_record(candidate)
    reasons = Reasons(policy, extended)
    # What only the alias wants has no name of its own: with last="copy" it is written under the alias itself.
    kept = tuple(why for why in reasons.of(_CANDIDATE) if why is not _NEWEST)
    absent = _absent(policy, now)
    if not kept and not policy.last:
        if absent:
            have = ", ".join(sorted(now.metrics)) or "none"
            return Skip(reason=f"{due}; waiting for {', '.join(absent)} (reported: {have})", due=True, waiting=due)
        return Skip(reason=f"{due}; {_declined(policy, now)}", due=True)
    retire = reasons.surplus
    why = f"{due}; kept: {' and '.join(kept) or 'last'}"
    if policy.last == "copy" and not kept and not absent:
        name = policy.name.last_file
        return Save(name=name, retire=retire, reason=why, observation=now, replaces=name in manifest.by_name)
    return _named(policy, now, manifest, candidate, retire, why)


def _named(
    policy: Policy, now: Observation, manifest: Manifest, candidate: Record, retire: tuple[str, ...], why: str
) -> Save:
    taken = _Taken(manifest, policy.aliases)
    replaceable = _replaceable(policy, manifest, retire)
    name = policy.name.free_name(_stem(policy, now, manifest), taken, replaceable=replaceable)
    replaces = name in manifest.by_name
    if replaces:
        # What is replaced takes no place among the k or the last n.
        retire = surplus(policy, manifest.without(name).with_record(candidate))
    return Save(name=name, retire=retire, reason=why, observation=now, replaces=replaces)


def _attach(policy: Policy, now: Observation, manifest: Manifest, saved: Record) -> Attach | Skip:
    news = {key: value for key, value in now.metrics.items() if repr(saved.metrics.get(key)) != repr(value)}
    ends = now.epoch_end and now.epoch == saved.epoch and not saved.epoch_end
    if not news and not ends:
        return Skip(reason=f"step {now.step} is saved already as {saved.name}")
    attached = manifest.with_record(attrs.evolve(saved, metrics={**saved.metrics, **news}))
    what = ", ".join(sorted(news)) or "the end of its epoch"
    why = f"step {now.step} is saved already as {saved.name}; attached {what}"
    return Attach(name=saved.name, retire=surplus(policy, attached), reason=why, observation=now)


def decide_rescue(policy: Policy, now: Observation, manifest: Manifest, why: str) -> Save:
    """Decide on a rescue: never over anything, never ranked, nothing retired for it."""
    taken, name = _Taken(manifest, policy.aliases), ""
    if policy.name.rescue == "template":
        with contextlib.suppress(NamingError):  # A rescue must not fail because of its name.
            name = _stem(policy, now, manifest) + policy.name.suffix
    if not name or name in taken:
        name = policy.name.free_name(f"rescue{policy.name.join}step{policy.name.equals}{now.step}", taken)
    # The text of an exception may have a URL with a password.
    return Save(name=name, reason=f"rescue: {without_secrets(why)}", observation=now, kind="rescue")


_NEWEST = "newest (last points here)"


@attrs.frozen(eq=False)
class Reasons:
    """Why the checkpoints of a run live under a policy. Follows from the whole history."""

    policy: Policy
    manifest: Manifest

    def of(self, name: str) -> tuple[str, ...]:
        """Return every reason for one checkpoint; empty if nothing keeps it."""
        rules = () if name in self._dropped else self._by_rule
        return tuple(kept[name] for kept in (*rules, *self._always) if name in kept)

    @cached_property
    def surplus(self) -> tuple[str, ...]:
        """The names of this run that nothing keeps, oldest first, without what another program has written."""
        slot = self.policy.name.last_file if self.policy.last else None
        kept = (self._ruled - self._dropped).union(*self._always)
        going = [record for record in self.manifest.live if record.name not in kept and record.name != slot]
        return tuple([record.name for record in going if not record.is_adopted])

    @cached_property
    def _history(self) -> tuple[Record, ...]:
        """What rules look at. The ``last`` slot is not among it: the next save overwrites it."""
        history, slot = self.manifest.history, self.policy.name.last_file
        if not self.policy.last or slot not in self.manifest.by_name:
            return history
        return Ordered([record for record in history if record.name != slot])

    @cached_property
    def _newest(self) -> dict[str, str]:
        """The checkpoint that ``last`` names. It counts as kept by a rule, so that a limit sees it as the newest."""
        return {record.name: _NEWEST for record in self.manifest.history[-1:] if self.policy.last}

    @cached_property
    def _by_rule(self) -> tuple[Mapping[str, str], ...]:
        """What each rule keeps, then what is pinned, and the newest."""
        pinned = {record.name: "pinned" for record in self._history if record.pinned}
        return (*(rule.keep(self._history) for rule in self.policy.rules), pinned, self._newest)

    @cached_property
    def _ruled(self) -> set[str]:
        """The names that some rule keeps."""
        return set().union(*self._by_rule)

    @cached_property
    def _dropped(self) -> set[str]:
        """What limits take away from the rules. No limit takes a pinned checkpoint."""
        dropped: set[str] = set()
        for limit in self.policy.limits:
            names = self._ruled - dropped
            kept = Ordered([record for record in self._history if record.name in names])
            going = limit.drop(kept, self.policy.best_rule)
            dropped.update(record.name for record in kept if record.name in going and not record.pinned)
        return dropped

    @cached_property
    def _always(self) -> tuple[Mapping[str, str], ...]:
        """What is kept whatever a limit says."""
        newest = self._newest if self._newest.keys() <= self._dropped else {}
        source = self.manifest.resumed
        resumed = {source: "resumed from"} if source and source in self.manifest.by_name else {}
        newest_regular = [*map(commit_order, self.manifest.history[-1:])]
        rescues = {
            record.name: "pinned" if record.pinned else record.reason
            for record in self.manifest.live
            if record.kind == "rescue" and (record.pinned or [commit_order(record)] > newest_regular)
        }
        return newest, resumed, rescues

    def relied_on(self, going: Iterable[Record]) -> tuple[Record, ...]:
        """Return what has to exist before these records may go: the best of each rule, then what else is kept instead.

        The most important come first. There are at most `MAX_RELIED_ON`, because each is looked at on the storage.
        Without records that go it is the best of each rule alone.
        """
        going = tuple(going)
        gone, there = {record.name for record in going}, self.manifest.by_name
        has_slot = self._history is not self.manifest.history
        named = self.policy.best_of(self.manifest.history) if has_slot else None  # It may be the slot.
        ranked = zip(self.policy.rules, self._by_rule, strict=False)
        bests = (next(iter(kept), "") for rule, kept in ranked if isinstance(rule, KeepBest))
        others = self._kept_instead([r for r in going if r.kind == "regular"][:MAX_RELIED_ON])
        names = dict.fromkeys(chain((named.name,) if named else (), bests, others))
        return tuple(islice((there[name] for name in names if name in there and name not in gone), MAX_RELIED_ON))

    def _kept_instead(self, going: Sequence[Record]) -> Iterator[str]:
        """Yield names that rules keep: the most important, for each record that goes the ones before it, and more."""
        by_rule = self._by_rule[: len(self.policy.rules)] if going else ()
        first = (islice(kept, MAX_RELIED_ON) for kept in by_rule)
        by_importance = chain.from_iterable(zip_longest(*first, fillvalue=""))
        yield from islice(by_importance, MAX_RELIED_ON // 2)
        for record, kept in product(going, by_rule):
            place = bisect_left(self._history, commit_order(record), key=commit_order)
            yield next((one.name for one in reversed(self._history[:place]) if one.name in kept), "")
        yield from by_importance


def explain(policy: Policy, manifest: Manifest) -> dict[str, tuple[str, ...]]:
    """Return why each checkpoint of the run is kept, by name; what is not in it is `surplus`.

    Example:
        >>> from checkpointer import EverySteps, KeepLast, Manifest, Policy, explain
        >>> explain(Policy(EverySteps(10), [KeepLast(1)]), Manifest())
        {}
    """
    reasons = Reasons(policy, manifest)
    return {record.name: why for record in manifest.records if (why := reasons.of(record.name))}


def manifest_html(policy: Policy, manifest: Manifest, where: str) -> str:
    """Return the run's checkpoints as a table for a notebook: name, step, metrics, size, and why each is kept."""
    why = explain(policy, manifest)
    rows = []
    for record in manifest.live:
        metrics = "\n".join(f"{name}={number_text(value)}" for name, value in record.metrics.items())
        reasons = "\n".join(why.get(record.name, ()))
        rows.append([record.name, str(record.step), metrics, size_text(record.size), reasons])
    return table_html(["name", "step", "metrics", "size", "why"], rows, f"{where}: {policy}")


def surplus(policy: Policy, manifest: Manifest) -> tuple[str, ...]:
    """Return the names of this run that a save retires, oldest first. Follows from the whole history.

    Adopted checkpoints are not among them: a training removes no file that another program has written.
    """
    return Reasons(policy, manifest).surplus


@attrs.frozen
class _Taken:
    """The names in use, without a set of them all."""

    manifest: Manifest
    aliases: Container[str]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and (self.manifest.is_taken(name) or name in self.aliases)


def _replaceable(policy: Policy, manifest: Manifest, retired: Iterable[str]) -> set[str]:
    """Return the names that a save may take: of what it retires, and without a version counter of what may go.

    These may be another run's, but not another label's, whose manager may be alive, nor abandoned ones of this run.
    """
    names = set(retired)
    if not policy.name.version_counter:
        lost = {record.name: record for record in reversed(manifest.aside) if record.name not in manifest.foreign}
        for name, record in (lost | manifest.by_name).items():
            is_abandoned = record.run == manifest.run and not manifest.counts(record)
            if record.label == manifest.label and not record.pinned and not is_abandoned:
                names.add(name)
    # A name that is foreign although a record has it may be changed by another writer.
    return (names - manifest.foreign).difference(policy.aliases, [manifest.resumed])


def _candidate(now: Observation, manifest: Manifest) -> Record:
    return manifest.draft(_CANDIDATE, now, size=manifest.history[-1].size if manifest.history else 0)


def _ranking_rules(policy: Policy, now: Observation) -> list[KeepBest]:
    return [r for r in policy.keep if isinstance(r, KeepBest) and (now.step > r.after_step or not r.after_step)]


def _absent(policy: Policy, now: Observation) -> list[str]:
    rules = _ranking_rules(policy, now)
    return list(dict.fromkeys(rule.metric.name for rule in rules if rule.metric.value(now) is None))


def _declined(policy: Policy, now: Observation) -> str:
    rules = _ranking_rules(policy, now)
    ranked = [f"{rule.metric.name}={rule.metric.value(now):.6g} is not in {rule}" for rule in rules]
    return "; ".join(ranked) or f"no rule keeps it: {' and '.join(map(str, policy.rules)) or 'none given'}"
