"""The orders in which several writers of one run can act keep the promises about terms, as far as they are searched."""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import attrs
import pytest
from support.interleave import (
    Disk,
    Env,
    Model,
    Moment,
    Notes,
    Operation,
    Report,
    Scenario,
    World,
    deterministic,
    on_host,
)
from support.plain_format import PlainFormat
from support.sampling import third

from checkpointer import CheckpointManager, EverySteps, KeepBest, KeepLast, Naming, Policy
from checkpointer.commit import directory, index, lease, payload_names, recovery, transaction
from checkpointer.commit import holder as holder_module
from checkpointer.commit import journal as journal_module
from checkpointer.commit.aliases import Aliases
from checkpointer.commit.changes import clear_changes
from checkpointer.commit.journal import Journal
from checkpointer.commit.payload_names import Names
from checkpointer.commit.terms import Term
from checkpointer.errors import CheckpointerError, SaveError
from checkpointer.records.record import Entry, Record
from checkpointer.restore import load as restoring
from checkpointer.storage.owner import is_live
from checkpointer.testing import FakeClock

BOUND = os.environ.get("CHECKPOINTER_STATES", "500")
STATES = None if BOUND == "all" else int(BOUND)
"""How many states of each scenario are visited; those with the fewest changes of the writer come first."""
RUN = "r"
LOSSES = {1: 0.5, 2: 0.9, 3: 0.7, 4: 0.3, 5: 0.8, 6: 0.2}
Chain = tuple[str, ...]
"""The states that a state descends from, and itself, such as ``("A1", "A2", "B3")``: writer and step."""


def loss_of(state: str) -> float:
    return LOSSES[int(state[1:])]


# Writers


@attrs.frozen
class Training:
    """A training that restores, makes some steps, saves each, and closes."""

    policy: Policy
    saves: int = 2
    late: bool = False
    """Whether the metrics come after the save."""
    takeover: bool = True

    def __call__(self, env: Env) -> None:
        try:
            self._train(env)
        except (CheckpointerError, OSError) as error:
            env.note("error", type(error).__name__, str(error))

    def _train(self, env: Env) -> None:
        history: list[str] = []
        manager = env.keep(
            CheckpointManager(
                env.storage,
                self.policy,
                state=lambda: {"history": history},
                format=PlainFormat(),
                run=RUN,
                clock=FakeClock(1000.0),
                takeover=self.takeover,
            )
        )
        try:
            restored = manager.restore()
            history += restored.state["history"] if restored else []
            env.note("restored", tuple(history))
            for step in range(len(history) + 1, len(history) + 1 + self.saves):
                history.append(f"{env.writer}{step}")
                self._save(env, manager, history, step)
        finally:
            manager.close()
            env.note("closed", manager.policy.name.last_file)

    def _save(self, env: Env, manager: CheckpointManager, history: Sequence[str], step: int) -> None:
        metrics = {"loss": loss_of(history[-1]), "turn": float(step % 2)}
        env.note("began", tuple(history))
        try:
            decision = manager.observe({} if self.late else metrics, step=step, epoch=0, epoch_end=False)
            if not decision:
                env.note("declined", tuple(history), decision.reason)
            if self.late:
                manager.observe(metrics, step=step, epoch=0, epoch_end=False)
        except SaveError as error:
            env.note("failed", tuple(history), str(error))
        else:
            env.note("acked", tuple(history), manager.policy.name.last_file)


# Laws


def of_kind(notes: Notes, *kinds: str) -> list[Any]:
    return [note[1] for note in notes if note[0] in kinds]


def is_of_a_fault(error: str, text: str) -> bool:
    """Return whether a writer may end with this error if a request fails."""
    return error in ("SaveError", "StorageError", "OSError") or "injected: " in text


def is_claim(operation: Operation) -> bool:
    """Return whether an operation takes the run over, if it succeeds."""
    path = operation.path
    if path.startswith(".checkpointer/terms/"):
        return operation.what in ("publish", "write") and path.endswith(".json")
    return False


@attrs.frozen
class Seen:
    """What a reader finds."""

    final: Chain
    """The state that it restores."""
    best: Record | None = None


@attrs.frozen
class Laws:
    """What is true at every moment, even if no operation follows."""

    policy: Policy
    is_ranked: bool = False
    _known: dict[Any, Any] = attrs.field(factory=dict, init=False)
    """What a reader found, and what a successor did, by all that it depends on: it is the same in many states."""

    def __call__(self, model: Model, moment: Moment) -> str | None:
        try:
            self._check_errors(model, moment)
            self._check_learned(model, moment)
            final = self._check_reader(model, moment)
            one_host = bool(model.scenario.hosts)
            alive = [one_host and model.is_live(moment.world, f"~{ord(name):x}") for name in model.names]
            key = (moment.world.disk_id, *alive, one_host and moment.is_over)
            self._once(key, lambda: self._check_successor(model, moment, final))
        except AssertionError as error:
            return str(error)
        except CheckpointerError as error:
            return f"a reader or a successor gets {type(error).__name__}: {error}"
        return None

    def _once(self, key: Any, find: Callable[[], Any]) -> Any:
        """Return what was found for this key, or raise the error that was raised then."""
        if key not in self._known:
            try:
                self._known[key] = find()
            except (AssertionError, CheckpointerError) as error:
                self._known[key] = error.with_traceback(None)
        found = self._known[key]
        if isinstance(found, Exception):
            raise found
        return found

    def _check_errors(self, model: Model, moment: Moment) -> None:
        is_faulty = bool(moment.lost or moment.failed)
        holders = moment.world.claims
        for i, node in enumerate(moment.nodes):
            for note in node.notes:
                if note[0] == "failed":
                    assert is_faulty, f"{model.names[i]} could not save, without a fault: {note[2]}"
                assert note[0] != "declined", f"{model.names[i]} did not save: {note[2]}"
                if note[0] == "error" and note[1] == "FencedError":
                    assert i in holders, f"{model.names[i]} was fenced without a term"
                    assert holders[-1] != i, f"{model.names[i]} has the highest term, and was fenced: {note[2]}"
                elif note[0] == "error" and not (is_faulty and is_of_a_fault(*note[1:3])):
                    assert note[1] == "RunInUseError", f"{model.names[i]} got {note[1]}: {note[2]}"

    def _check_learned(self, model: Model, moment: Moment) -> None:
        holders = moment.world.claims
        for number, (taker, before) in enumerate(moment.claims):
            for i in {*holders} - {taker}:
                if max(n for n, holder in enumerate(holders) if holder == i) > number:
                    continue
                later = moment.nodes[i].notes[len(before[i]) :]
                began = [note[1] for note in later if note[0] == "began"]
                acked = [note[1] for note in later if note[0] == "acked" and note[1] in began]
                assert not acked, f"{model.names[i]} saved {acked[0][-1]} after the takeover, without an error"

    def _least(self, claims: Any, notes: Sequence[Notes]) -> Chain:
        """Return the newest state that the run must go on from."""
        if not claims:
            return ()
        holder, before = claims[-1]
        mine = of_kind(notes[holder], "acked") or of_kind(notes[holder], "restored")
        return mine[-1] if mine else self._least(claims[:-1], before)

    def _acknowledged(self, claims: Any, notes: Sequence[Notes]) -> set[str]:
        """Return each state that was acknowledged while its writer had the highest term."""
        if not claims:
            return set()
        holder, before = claims[-1]
        return {chain[-1] for chain in of_kind(notes[holder], "acked")} | self._acknowledged(claims[:-1], before)

    def _seen(self, disk: Disk) -> Seen:
        """Return what a reader finds; it changes nothing."""
        reader = CheckpointManager(disk, self.policy, format=PlainFormat(), run=RUN)
        restored = reader.restore()
        final: Chain = tuple(restored.state["history"]) if restored else ()
        self._check_records(disk, reader, final)
        best = reader.best if self.is_ranked else None
        if best is None:
            return Seen(final)
        restored = reader.restore("best")
        assert restored is not None
        assert best.metrics["loss"] == loss_of(restored.state["history"][-1])
        return Seen(final, best)

    def _check_reader(self, model: Model, moment: Moment) -> Chain:
        notes = [node.notes for node in moment.nodes]
        for number, (holder, before) in enumerate(moment.claims):
            went_on = of_kind(notes[holder], "restored")
            least = self._least(moment.claims[:number], before)
            assert not went_on or went_on[0][: len(least)] == least, (
                f"{model.names[holder]} went on from {went_on[0]}, and {least} was acknowledged"
            )
        least = self._least(moment.claims, notes)
        seen: Seen = self._once(moment.world.disk_id, lambda: self._seen(moment.world.disk))
        final = seen.final
        assert final[: len(least)] == least, f"a restore gives {final}, and the run is at {least}"
        if moment.claims:
            holder = moment.claims[-1][0]
            writers = {one[0] for one in final[len(least) :]}
            went_on = of_kind(notes[holder], "restored")
            assert not went_on or writers <= {model.names[holder]}, f"a restore gives {final} of an older term"
        if self.is_ranked:
            self._check_best(seen, self._acknowledged(moment.claims, notes))
        self._check_alias(moment, final)
        return final

    def _check_records(self, disk: Disk, reader: CheckpointManager, final: Chain) -> None:
        for record in reader.records:
            loaded = restoring.load(disk, lambda _: PlainFormat(), record, weights_only=True, map_location="cpu").state[
                "history"
            ]
            assert final[: len(loaded)] == tuple(loaded), f"{record.name} holds {loaded}, and the run is at {final}"

    def _check_best(self, seen: Seen, acknowledged: set[str]) -> None:
        there = [loss_of(one) for one in seen.final if one in acknowledged]
        if there:
            best = seen.best
            assert best is not None, "there is no best checkpoint"
            assert best.metrics["loss"] <= min(there), f"the best is {best.name}, and one was better: {min(there)}"

    def _check_alias(self, moment: Moment, final: Chain) -> None:
        if not moment.claims or not self.policy.last:
            return
        disk, node = moment.world.disk, moment.nodes[moment.claims[-1][0]]
        if node.notes and node.notes[-1][0] == "acked":
            alias = node.notes[-1][2]
            # If a request for it has failed, the next save or the end of the writer tries again.
            may_lag = bool(moment.lost or moment.failed)
            if may_lag and alias not in disk.list():
                return
            try:
                there = tuple(json.loads(disk._read(alias))["history"])
            except (FileNotFoundError, ValueError) as error:
                msg = f"{alias} does not lead to a checkpoint: {error!r}"
                raise AssertionError(msg) from None
            is_right = final[: len(there)] == there if may_lag else final == there
            assert is_right, f"{alias} holds {there}, and the run is at {final}"

    def _check_successor(self, model: Model, moment: Moment, final: Chain) -> None:
        """One more process takes over, saves, and everything is right. On the same host it leaves no lost files."""
        with on_host(model, moment.world):
            self._succeed(model, moment, final)

    def _succeed(self, model: Model, moment: Moment, final: Chain) -> None:
        disk, history = moment.world.disk.copied(), list[str]()
        manager = CheckpointManager(
            disk,
            self.policy,
            state=lambda: {"history": history},
            format=PlainFormat(),
            run=RUN,
            clock=FakeClock(1000.0),
            takeover=True,
        )
        restored = manager.restore()
        history += restored.state["history"] if restored else []
        assert final == tuple(history), f"a successor goes on from {history}, and a reader from {final}"
        step = len(history) + 1
        history.append(f"Z{step}")
        LOSSES.setdefault(step, 0.6)
        metrics = {"loss": loss_of(history[-1]), "turn": float(step % 2)}
        manager.observe(metrics, step=step, epoch=0, epoch_end=False)
        manager.close()
        reader = CheckpointManager(disk, self.policy, format=PlainFormat(), run=RUN)
        again = reader.restore()
        assert again is not None
        assert history == again.state["history"], f"a successor saved {history}, and a restore gives {again.state}"
        self._check_records(disk, reader, tuple(history))
        if moment.is_over and model.scenario.hosts:
            known = {*reader.session.manifest.by_name, *manager.policy.aliases}
            lost = [path for path in disk.list() if not path.startswith(".checkpointer/") and path not in known]
            assert not lost, f"{lost} have no record, so nothing removes them"


def on_step(world: World, i: int, operation: Operation) -> str | None:
    """A writer of an older term never changes a file that a newer term has made."""
    if operation.is_read or operation.what == "release" or not world.claims:
        return None
    if operation.what == "publish" and not operation.replace:
        return None
    holders = world.claims
    if i not in holders:
        return None
    newer = {n for n in holders[max(k for k, holder in enumerate(holders) if holder == i) + 1 :] if n != i}
    for path in world.disk.list(operation.path):
        author = world.disk.authors.get(path, "")
        if path == ".checkpointer/index.json":
            continue  # An entry of it counts only for the version of the record that it was read from.
        if operation.data and world.disk._files.get(path) == operation.data:
            continue  # Nothing changes.
        if any(author == name for n, name in enumerate(NAMES) if n in newer):
            return f"{NAMES[i]} has an older term than {author}, and changes its file: {operation}"
    return None


NAMES = "ABC"
POLICIES = {
    "last": Policy(EverySteps(1), [KeepLast(1)], last="link"),
    "best": Policy(EverySteps(1), [KeepBest(1, "loss", mode="min")], last="copy"),
    "name": Policy(EverySteps(1), [KeepLast(1)], name=Naming("model", version_counter=False)),
    "again": Policy(EverySteps(1), [KeepLast(1)], name=Naming("{turn}", version_counter=False)),
    "late": Policy(EverySteps(1), [KeepBest(1, "loss", mode="min"), KeepLast(1)], best="link"),
}


def scenario(name: str, writers: str = "AB", **kw: Any) -> Scenario:
    """Return trainings of one run, by the name of their policy."""
    training = Training(
        POLICIES[name], late=name == "late", saves=kw.pop("saves", 2), takeover=kw.pop("takeover", True)
    )
    return Scenario(name=name, writers=dict.fromkeys(writers, training), **kw)


def of_saves(name: str, *saves: int, **kw: Any) -> Scenario:
    """Return trainings that save so often each. One that saves 0 times takes over, restores and ends."""
    writers = {writer: Training(POLICIES[name], saves=count) for writer, count in zip(NAMES, saves, strict=False)}
    return attrs.evolve(scenario(name, links=False, in_order=True, **kw), writers=writers)


def model_of(scenario: Scenario) -> Model:
    laws = Laws(POLICIES[scenario.name], is_ranked=scenario.name in ("best", "late"))
    return Model(scenario, laws, on_step=on_step, is_claim=is_claim)


def search(scenario: Scenario, **bounds: Any) -> Report:
    """Search a scenario for orders that break a law."""
    model = model_of(scenario)
    with deterministic(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.search(**bounds)


ONE_HOST = {"A": "host-x_1_2", "B": "host-x_1_2"}


# Mutations


@attrs.frozen
class Mutation:
    """A protocol with a defect."""

    why: str
    """What the defect does."""
    apply: Callable[[pytest.MonkeyPatch], None]
    scenario: str = "name, far"
    """Where the search finds it soon."""


def no_look(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Journal, "check_term", lambda journal: None)


def look_first(patch: pytest.MonkeyPatch) -> None:
    changing = Journal.changing

    @contextlib.contextmanager
    def mutated(journal: Journal, *entries: Entry, aliases: Iterable[str] = ()) -> Iterator[set[str]]:
        journal.check_term()
        term, journal.term = journal.term, None
        try:
            with changing(journal, *entries, aliases=aliases) as failed:
                journal.term = term
                yield failed
        finally:
            journal.term = term

    patch.setattr(Journal, "changing", mutated)


def clear_first(patch: pytest.MonkeyPatch) -> None:
    changing = Journal.changing

    @contextlib.contextmanager
    def mutated(journal: Journal, *entries: Entry, aliases: Iterable[str] = ()) -> Iterator[set[str]]:
        with changing(journal, *entries, aliases=aliases) as failed:
            clear_changes(journal.storage, journal.owner)
            yield failed

    patch.setattr(Journal, "changing", mutated)


def list_first(patch: pytest.MonkeyPatch) -> None:
    claim, listing = lease.claim_term, directory._listing

    def claim_late(storage: Any, *args: Any, **kw: Any) -> Any:
        storage.early = index.load(storage, None)
        return claim(storage, *args, **kw)

    def listed_early(journal: Journal) -> Any:
        storage: Any = journal.storage
        early, storage.early = getattr(storage, "early", None), None
        return early or listing(journal)

    patch.setattr(holder_module, "claim_term", claim_late)
    patch.setattr(directory, "_listing", listed_early)


def read_no_changes(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(index, "_read_changes", lambda *_: ((), {}, False))


def records_first(patch: pytest.MonkeyPatch) -> None:
    entries, changes = index._read_entries, index._read_changes

    def read_changes(storage: Any, files: Any, trust: Any, writers: Any) -> Any:
        storage.known = entries(storage, files, trust)
        return (*changes(storage, files, trust, writers)[:2], False)

    patch.setattr(index, "_read_changes", read_changes)
    patch.setattr(index, "_read_entries", lambda storage, *_: storage.known)


def late_changes_count(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(index, "_without_late", lambda changes, announced: changes)


def no_limit(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Term, "limit", lambda term, limits, announced: None)


def ignore_limits(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(index, "read_limits", lambda *_: ({}, {}, {}))


def keep_alias(patch: pytest.MonkeyPatch) -> None:
    is_blocked = Aliases.is_blocked

    def mutated(aliases: Aliases, alias: str, manifest: Any, *, slots: bool) -> bool:
        poisoned, aliases.poisoned = aliases.poisoned, frozenset()
        try:
            return is_blocked(aliases, alias, manifest, slots=slots)
        finally:
            aliases.poisoned = poisoned

    patch.setattr(Aliases, "is_blocked", mutated)


def all_dead(patch: pytest.MonkeyPatch) -> None:
    for module in (journal_module, directory, lease, transaction):
        patch.setattr(module, "is_dead", lambda owner: not is_live(owner))


def retire_silently(patch: pytest.MonkeyPatch) -> None:
    write = Journal._write_changes

    def mutated(journal: Journal, entries: Mapping[str, Entry], aliases: tuple[str, ...] = ()) -> None:
        write(journal, {name: entry for name, entry in entries.items() if entry.status != "retired"}, aliases)

    patch.setattr(Journal, "_write_changes", mutated)


def record_goes_first(patch: pytest.MonkeyPatch) -> None:
    def remove(journal: Journal, record: Record) -> None:
        there = journal.has_payload(record)
        journal.delete(record.name)
        if there:
            journal.storage.delete(record.name)

    patch.setattr(recovery, "remove", remove)


def claim_over(patch: pytest.MonkeyPatch) -> None:
    def create(term: Term, policy: str) -> bool:
        claim = {"owner": term.owner, "term": term.number, "run": term.run, "label": term.label}
        term.storage.write(f"{term.folder}/{term.number}.json", json.dumps(claim).encode())
        return True

    patch.setattr(lease, "_create", create)


def keep_name(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Names, "move_slot", lambda names, slot, **_: slot)


def trust_copy(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(payload_names, "is_payload_of", lambda journal, record: True)


def announce_over(patch: pytest.MonkeyPatch) -> None:
    def announce(journal: Journal, pending: Entry) -> None:
        journal.put(pending)

    patch.setattr(Journal, "announce", announce)


MUTATIONS = {
    "no look": Mutation("A writer does not look for a newer claim before a change.", no_look),
    "look first": Mutation("A writer looks before it announces a change, not after.", look_first),
    "clear first": Mutation("A writer clears the announcement before it makes the change.", clear_first, "best, far"),
    "list first": Mutation("A process lists the directory before it claims the run.", list_first),
    "no changes": Mutation("A process does not read what others have announced.", read_no_changes),
    "records first": Mutation("A process reads the records before the announced changes.", records_first),
    "late changes": Mutation(
        "A reader believes what was announced after a takeover.", late_changes_count, "last, one restores"
    ),
    "no limit": Mutation("A process does not write up to where older terms count.", no_limit),
    "limits ignored": Mutation("A process does not read up to where older terms count.", ignore_limits),
    "alias kept": Mutation(
        "A process uses an alias that the writer before may still replace.", keep_alias, "last, far"
    ),
    "all dead": Mutation("A writer on another host counts as dead.", all_dead),
    "claim over": Mutation("A claim replaces that of another process.", claim_over),
    "name kept": Mutation("A process relies on a name that the writer before may still replace.", keep_name),
    "copy trusted": Mutation("A process does not verify the copy of what may be replaced.", trust_copy),
    "retired silently": Mutation(
        "The removal of a checkpoint whose name comes again is not announced.", retire_silently, "again, far"
    ),
    "record first": Mutation(
        "The record of a checkpoint is removed before its payload.", record_goes_first, "last, one host, killed"
    ),
    "announced over": Mutation("The record of a new name replaces that of another writer.", announce_over),
}


SCENARIOS = {
    "last, links": scenario("last"),
    "last, far": scenario("last", links=False),
    "best, links": scenario("best"),
    "best, far": scenario("best", links=False),
    "name, links": scenario("name"),
    "name, far": scenario("name", links=False),
    "again, links": scenario("again"),
    "again, far": scenario("again", links=False),
    "late, links": scenario("late"),
    "late, far": scenario("late", links=False),
    "last, one restores": of_saves("last", 2, 0),
    "last, one host, killed": scenario("last", hosts=ONE_HOST, crashes=1, takeover=False),
    "best, one host, killed": scenario("best", hosts=ONE_HOST, crashes=1, takeover=False, links=False),
    "name, one host, killed": scenario("name", hosts=ONE_HOST, crashes=1, takeover=False),
    "last, a reply lost": scenario("last", lost=1),
    "best, a reply lost": scenario("best", lost=1, links=False),
    "name, a reply lost": scenario("name", lost=1),
    "last, a request failed": scenario("last", failed=1, links=False),
    "last, one save, a reply lost": of_saves("last", 1, 1, lost=1),
    "name, one save, a request failed": of_saves("name", 1, 1, failed=1),
    "name, three, two restore": of_saves("name", 1, 0, 0),
    "last, three": of_saves("last", 1, 1, 1),
    "name, three": of_saves("name", 1, 1, 1),
    "alone, a reply lost": scenario("best", "A", lost=2, links=False),
    "alone, a request failed": scenario("name", "A", failed=2, links=False),
}

COMPLETE = frozenset(name for name in SCENARIOS if name.startswith("alone") or name.endswith("killed"))
"""Scenarios that are small enough to visit every state each time."""
LARGE = frozenset(name for name in SCENARIOS if name.endswith(("a reply lost", "a request failed", "three"))) - {
    *COMPLETE,
    *(name for name in SCENARIOS if "one save" in name),
}
"""Scenarios that have too many states to visit each."""
MANY = 10_000


def bound_of(name: str) -> int | None:
    """Return how many states of a scenario are visited; None if it is each."""
    if name in COMPLETE:
        return None
    return STATES or (MANY if name in LARGE else None)


# Tests


@pytest.mark.slow
@pytest.mark.parametrize("name", third(SCENARIOS))
def test_no_order_of_operations_breaks_the_promise(name: str, record_property: Callable[[str, object], None]) -> None:
    """Nothing acknowledged is lost, a run has one timeline, and a writer of an older term harms nothing."""
    report = search(SCENARIOS[name], max_states=bound_of(name))

    print(f"{name}: {report}")
    record_property(name, str(report))
    assert report.is_complete or bound_of(name)
    assert not report.violations, "\n\n".join(map(str, report.violations.values()))


SMALL = {
    "two, one save": (scenario("name", saves=1, links=False), ""),
    "one host, killed": (scenario("last", saves=1, hosts=ONE_HOST, crashes=1, takeover=False), ""),
    "with a defect": (scenario("name", saves=1, links=False), "no changes"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", third(SMALL))
def test_a_search_that_lets_readers_sleep_finds_what_one_of_every_order_finds(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It visits the same contents of the storage with the same notes of the writers, and finds the same violations."""
    small, defect = SMALL[name]
    if defect:
        MUTATIONS[defect].apply(monkeypatch)
    model = model_of(small)
    with deterministic(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reduced, found = model.search(), model.checked
        every = model.search(reduced=False)

    print(f"{name}: {reduced}\nin every order: {every}")
    assert reduced.is_complete
    assert reduced.states < every.states
    assert found == model.checked
    assert bool(defect) == bool(every.violations)
    assert reduced.violations.keys() == every.violations.keys()


@pytest.mark.slow
def test_a_search_of_few_changes_of_the_writer_leaves_out_no_order_that_has_so_few() -> None:
    """It visits all that a search of every order visits in which reads, too, count as changes of the writer."""
    model = model_of(SMALL["two, one save"][0])
    with deterministic(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        few, found = model.search(max_switches=2), model.checked
        every = model.search(reduced=False, max_switches=2)

    print(f"{few}\nin every order: {every}")
    assert few.switches == every.switches == 3
    assert found > model.checked


@pytest.mark.slow
@pytest.mark.parametrize("name", third(MUTATIONS))
def test_a_defect_of_the_protocol_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With each of these defects there is an order that breaks the promise, and the search finds it."""
    mutation = MUTATIONS[name]
    mutation.apply(monkeypatch)

    report = search(SCENARIOS[mutation.scenario], first_only=True, max_states=12_000)

    print(f"{name}: {report}")
    assert report.violations, mutation.why


def test_a_schedule_can_be_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The text of a schedule leads to the same violation again."""
    MUTATIONS["list first"].apply(monkeypatch)
    (found, *_) = search(SCENARIOS["name, far"], first_only=True).violations.values()

    model = model_of(SCENARIOS["name, far"])
    with deterministic(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.replay(found.schedule)

    assert found.law in [violation.law for violation in model.report.violations.values()]
