"""Runs real code of several writers on one storage in every order of their operations, and finds the order that fails.

A writer is a script: a function that uses a storage. Each operation of the storage is a point where another writer may
run. What a writer does next follows from the results that it has got so far, and from nothing else: time, random
numbers and process ids are replaced. So a writer is a tree: a node is an operation, each result leads to a next node.
The real code runs, in a thread, only to find a node that is not known yet. The search combines the trees with a
storage. Equal states (contents of the storage, and the node of each writer) are searched once.

An upload is one operation, `publish`, because what happens before it is invisible to the other writers.

The search is reduced. A read changes nothing, so only its result matters: the order of a read and a write matters only
if the write changes that result. So a writer that is about to read does one of two things: it reads at once, or it
sleeps until a write has changed what it reads. It never reads later with the same result, because that leads to a state
which is visited anyway: the one where it has read at once, and then the others did the same writes. Writes are tried in
every order.

No writer sees where another one sleeps. So a state of the search has for each writer the set of the nodes where it may
be, after what all have written so far. What one writer may have read does not depend on what the others have read. So
every combination of nodes from these sets is possible, and no other one is. A write moves all nodes of the set that are
about to do it. A state is left out if another one has the same world, and for each writer at least the same nodes,
because all that may happen from it may happen there. So what the storage holds, and what the writers have noted, is
found in each combination that is possible: `Model.search` with ``reduced=False`` tries every order of all operations,
and finds the same ones.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import io
import itertools
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, Final, Literal

import attrs
import xxhash

from checkpointer import Policy
from checkpointer.commit.index import HOME, RECORDS, Listing
from checkpointer.commit.lease import Lease
from checkpointer.commit.terms import TERMS
from checkpointer.errors import NameTakenError
from checkpointer.ports import Stat
from checkpointer.storage import owner as owners
from checkpointer.testing import Crash, MemoryStorage
from support.local_state import digest_of_frames

__all__ = [
    "Disk", "Env", "Model", "Moment", "Notes", "Operation", "Report", "Scenario", "Violation", "World", "deterministic",
    "listed", "on_host",
]  # fmt: skip

Result = Any
"""Hashable: None, bytes, a bool, a listing as a tuple, or a `Failure`."""
Notes = tuple[tuple[Any, ...], ...]
Script = Callable[["Env"], None]

READS: Final = frozenset({"list", "open", "is live", "note"})
SILENT: Final = frozenset({"note", "is live", "release"})
"""Operations that do not reach the storage."""
HIDDEN: Final = ".checkpointer/writers/"
"""Files that each writer sees alone: the marks for the commands. No save depends on them."""
ALIASES: Final = ("last", "best")
"""How the names of files begin that may be links."""
MAX_PARKED: Final = 1500
AUDIT_EVERY: Final = 10
COLLECT_EVERY: Final = 20


@attrs.frozen(cache_hash=True)
class Operation:
    """One step of a writer that others can see, or that sees what others did."""

    what: str
    path: str
    data: bytes = b""
    target: str = ""
    replace: bool = True

    @property
    def is_read(self) -> bool:
        """Return whether it changes nothing."""
        return self.what in READS

    def __str__(self) -> str:
        new = "" if self.replace else " (create once)"
        return " ".join(filter(None, [self.what, self.path, self.target and f"<- {self.target}"])) + new


@attrs.frozen
class Failure:
    """An operation that raised."""

    kind: type[Exception]
    text: str

    def __str__(self) -> str:
        return f"{self.kind.__name__}: {self.text}"


@functools.lru_cache(100_000)
def _stat(data: bytes, link: str) -> Stat:
    return Stat(len(data), xxhash.xxh3_64_hexdigest(data or link.encode()))


def _listed_stat(path: str, data: bytes, link: str) -> Stat:
    # Of a file that is neither a payload nor a record, the code asks only whether it exists and is empty.
    if path.startswith(f"{HOME}/") and not path.startswith(f"{RECORDS}/"):
        return _stat(data[:1] and b"1", "")
    return _stat(data, link)


class Disk(MemoryStorage):
    """A storage in memory that can be copied and compared; the version of a file follows from its content."""

    def __init__(self) -> None:
        super().__init__()
        self.authors: dict[str, str] = {}
        """The writer that made each file."""

    def list(self, prefix: str = "") -> dict[str, Stat]:
        """See `Storage.list`; sorted, because the order must not depend on the history."""
        names = (*self._files, *self._links)
        below = [n for n in names if not prefix or n == prefix or n.startswith(prefix + "/")]
        return {
            name: _listed_stat(name, self._files.get(name, b""), self._links.get(name, "")) for name in sorted(below)
        }

    def copied(self) -> Disk:
        """Return a disk with the same contents."""
        other = Disk()
        other._files, other._links = dict(self._files), dict(self._links)
        other._versions, other.authors = dict(self._versions), dict(self.authors)
        return other

    @property
    def key(self) -> tuple[Any, ...]:
        """Two disks with equal keys have the same files from the same writers."""
        there = {path: self.authors.get(path, "") for path in (*self._files, *self._links)}
        return frozenset(self._files.items()), frozenset(self._links.items()), frozenset(there.items())

    def apply(self, operation: Operation, author: str) -> Result:
        """Carry out an operation; return its result, an error included."""
        try:
            result = self._apply(operation)
        except OSError as error:
            return Failure(type(error), f"{operation.what} {operation.path}")
        if not operation.is_read and operation.what != "delete":
            self.authors[operation.path] = author
        return result

    def _apply(self, operation: Operation) -> Result:
        path = operation.path
        match operation.what:
            case "list":
                return tuple((name, stat.size, stat.version) for name, stat in self.list(path).items())
            case "open":
                return self._read(path)
            case "write":
                self.write(path, operation.data)
            case "publish":
                if not operation.replace and self._is_taken(path):
                    raise NameTakenError(path)
                self.write(path, operation.data)
            case "delete":
                self.delete(path)
            case "symlink":
                self.symlink(operation.target, path)
            case "hardlink" | "copy":
                self.hardlink(operation.target, path)
            case other:
                raise AssertionError(other)
        return None


@attrs.define(eq=False)
class Node:
    """A writer at one point: what it does next, after all the results so far."""

    operation: Operation | None
    """None if the script has ended."""
    notes_id: int
    notes: Notes
    """All that the script has noted so far."""
    parent: Node | None = None
    result: int = 0
    """The number of the result of the parent's operation that led here."""
    children: dict[int, Node] = attrs.field(factory=dict)
    """The next nodes, by the number of the result."""
    is_read: bool = attrs.field(init=False)
    """Whether it changes nothing next."""

    def __attrs_post_init__(self) -> None:
        self.is_read = self.operation is not None and self.operation.is_read


_here = threading.local()


class _Run:
    """Real code in a thread that stops at each operation whose result is not known yet."""

    def __init__(
        self, writer: str, host: str, script: Script, env: Env, history: Sequence[tuple[Operation, Result]]
    ) -> None:
        self.writer, self.host = writer, host
        self.operation: Operation | None = None
        self.owner: str | None = None
        self.local_state: str | None = None
        self.notes: list[tuple[Any, ...]] = []
        self.error: BaseException | None = None
        self.numbers = itertools.count(1)
        self.time = 1000.0
        self.is_over = False
        self.kept: list[Any] = [env]
        self._history = iter(history)
        self._result: Result = None
        self._go, self._stopped = threading.Lock(), threading.Lock()
        self._go.acquire()
        self._stopped.acquire()
        env._run = self
        self._thread = threading.Thread(target=self._work, args=(script, env), daemon=True)
        self._thread.start()
        self._stopped.acquire()

    def _work(self, script: Script, env: Env) -> None:
        _here.run = self
        try:
            script(env)
            if self.owner is not None:
                self.perform(Operation("release", self.owner))  # The process ends.
        except Crash:
            pass
        except BaseException as error:  # A defect of the script, not of a writer: the search raises it.
            self.error = error
        self.operation, self.is_over = None, True
        self._stopped.release()

    def perform(self, operation: Operation) -> Result:
        """Stop at an operation, and return its result."""
        if self.is_over:
            raise Crash
        known = next(self._history, None)
        if known is not None:
            assert known[0] == operation, f"{self.writer} is not deterministic: {known[0]} was {operation} before"
            return known[1]
        self.operation = operation
        try:
            state = digest_of_frames(sys._getframe(1), _Run._work.__code__, self._essence)
            self.local_state = state and f"{state} {self.numbers} {self.time}"
        except BaseException as error:  # It must not reach the code of the writer.
            self.error, self.is_over = error, True
            raise Crash from error
        self._stopped.release()
        self._go.acquire()
        if self.is_over:
            raise Crash
        return self._result

    def _essence(self, value: Any) -> Any:
        """Return what counts of a value for what the code does next."""
        if isinstance(value, Env | Disk | _Live | _Run):
            return type(value).__name__
        if isinstance(value, Listing):
            # The code looks up aliases there; the rest it reads at once.
            payloads = {path: stat for path, stat in value.files.items() if not path.startswith(HOME)}
            term_files = sorted(path for path in value.files if path.startswith(TERMS))
            return (value.entries, [*value.damaged], value.changes, value.limits, payloads, term_files)
        return value

    def go_on(self, result: Result) -> None:
        """Give the result, and wait until the next operation or the end."""
        self._result = result
        self._go.release()
        self._stopped.acquire()
        if self.error is not None:
            raise self.error

    def end(self) -> None:
        """End the thread, as a killed process ends."""
        if not self.is_over:
            self.is_over = True
            self._go.release()
        self._thread.join()
        self.kept.clear()


class Env:
    """What a script gets: its storage, and where it notes what happened."""

    def __init__(self, writer: str, *, links: bool) -> None:
        self.writer = writer
        self.storage: Any = _Near(self) if links else _Copying(self)
        self._run: Any = None
        self._hidden = Disk()

    def note(self, *what: Any) -> None:
        """Note an event, such as an acknowledged save, and how many claims there were by then, at its end."""
        claims = self._run.perform(Operation("note", self.writer))
        self._run.notes.append((*what, claims))

    def keep(self, value: Any) -> Any:
        """Keep a value from being garbage-collected while the script runs."""
        self._run.kept.append(value)
        return value

    def _perform(self, operation: Operation) -> Result:
        if getattr(_here, "run", None) is not self._run:
            return self._in_another_thread(operation)
        is_hidden = operation.path.startswith(HIDDEN)
        run: Any = self._run
        result = self._hidden.apply(operation, "") if is_hidden else run.perform(operation)
        if isinstance(result, Failure):
            raise result.kind(result.text)
        return result

    def _in_another_thread(self, operation: Operation) -> Result:
        msg = f"{self.writer} did {operation} in a thread of its own, which no schedule orders"
        raise AssertionError(msg)


class _Far:
    """A storage without links, where a look costs a request; the server can copy."""

    def __init__(self, env: Env) -> None:
        self._env = env

    def __str__(self) -> str:
        return "the model"

    def list(self, prefix: str = "") -> Mapping[str, Stat]:
        return listed(self._env._perform(Operation("list", prefix)))

    def open(self, path: str) -> BinaryIO:
        return io.BytesIO(self._env._perform(Operation("open", path)))

    def write(self, path: str, data: bytes) -> None:
        self._env._perform(Operation("write", path, bytes(data)))

    def delete(self, path: str) -> None:
        self._env._perform(Operation("delete", path))

    def upload(self, path: str) -> _Upload:
        return _Upload(self._env, path)


class _Copying(_Far):
    def copy(self, source: str, path: str) -> None:
        self._env._perform(Operation("copy", path, target=source))


class _Near(_Far):
    """A storage with links, as a disk has them."""

    def symlink(self, target: str, path: str) -> None:
        self._env._perform(Operation("symlink", path, target=target))

    def hardlink(self, target: str, path: str) -> None:
        self._env._perform(Operation("hardlink", path, target=target))


class _Upload:
    def __init__(self, env: Env, path: str) -> None:
        self._env, self._path = env, path
        self._buffer = io.BytesIO()

    def write(self, data: Any) -> int:
        return self._buffer.write(data)

    def finish(self) -> None:
        pass

    def publish(self, *, replace: bool) -> None:
        self._env._perform(Operation("publish", self._path, self._buffer.getvalue(), replace=replace))

    def abort(self) -> None:
        pass


def listed(result: Result) -> dict[str, Stat]:
    """Return a listing from its result."""
    return {path: Stat(size, version) for path, size, version in result}


# Time, random numbers and process ids


class _Live:
    """The ids that count as alive, in place of the set in `checkpointer.storage.owner`."""

    def add(self, owner: str) -> None:
        run = getattr(_here, "run", None)
        if run is not None:
            run.owner = owner

    def discard(self, owner: str) -> None:
        run = getattr(_here, "run", None)
        if run is not None and not run.is_over and run.owner == owner:
            run.owner = None
            with contextlib.suppress(Crash):  # It is called by a finalizer, which would print it.
                run.perform(Operation("release", owner))

    def __contains__(self, owner: object) -> bool:
        run = getattr(_here, "run", None)
        if run is None:
            return False
        if owner == run.owner:
            return True
        return bool(run.perform(Operation("is live", str(owner))))


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Replace time, random numbers, host names and the state of processes for every thread that runs a script."""

    def for_scripts(real: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
        def function(*args: Any, **kw: Any) -> Any:
            run = getattr(_here, "run", None)
            return real(*args, **kw) if run is None else ours(run, *args, **kw)

        return function

    def sleep(run: _Run, seconds: float) -> None:
        run.time += seconds

    def number(run: _Run) -> uuid.UUID:
        return uuid.UUID(int=(ord(run.writer[0]) << 120) | (next(run.numbers) << 80))

    waiting, clock = for_scripts(time.sleep, sleep), for_scripts(time.monotonic, lambda run: run.time)
    own = {"sleep": waiting, "now": clock}
    places: list[tuple[Any, str, Any]] = [
        (uuid, "uuid4", for_scripts(uuid.uuid4, number)),
        (time, "time", for_scripts(time.time, lambda run: run.time)),
        (time, "monotonic", clock),
        (time, "gmtime", for_scripts(time.gmtime, lambda run, *_: time.struct_time([1970, 1, 1] + [0] * 6))),
        (time, "sleep", waiting),
        (threading.Thread, "start", for_scripts(threading.Thread.start, lambda run, thread: None)),
        (Lease.__init__, "__defaults__", tuple(own.get(f.name, f.default) for f in attrs.fields(Lease))),
        (owners, "_host", for_scripts(owners._host, lambda run: run.host)),
        (owners, "_started", lambda pid: "1"),  # This, and the text of a policy, only cost time here.
        (Policy, "to_yaml", lambda policy, path=None: ""),
        (owners, "_live_here", _Live()),
    ]
    before = [getattr(module, name) for module, name, _ in places]
    try:
        for module, name, value in places:
            setattr(module, name, value)
        yield
    finally:
        for (module, name, _), value in zip(places, before, strict=True):
            setattr(module, name, value)


class _Outside:
    """Stands for a process that comes when the others have stopped, on the host of one of them."""

    writer = "Z"

    def __init__(self, model: Model, world: World, host: str) -> None:
        self.host, self.time, self.numbers = host, 1000.0, itertools.count(1)
        self.is_over, self.owner = False, None
        self._model, self._world = model, world

    def perform(self, operation: Operation) -> Result:
        """Return whether another process runs; nothing else is asked."""
        return self._model.is_live(self._world, operation.path) if operation.what == "is live" else None


@contextlib.contextmanager
def on_host(model: Model, world: World) -> Iterator[None]:
    """Act as one more process on the host of the scenario, if it has one host for all, or else on another host."""
    hosts = {*model.scenario.hosts.values()} or {"host-Z_1_2"}
    _here.run = _Outside(model, world, *hosts)
    try:
        yield
    finally:
        _here.run = None


def writer_of(owner: str) -> str:
    """Return the writer that has an id."""
    return chr(int(owner.rpartition("~")[2][:2], 16))


class _Program:
    """All that one writer may do, as far as it is known."""

    def __init__(self, writer: str, host: str, script: Script, results: _Numbers, *, links: bool) -> None:
        self.writer, self.host, self._script, self._results, self._links = writer, host, script, results, links
        self._parked: dict[Node, _Run] = {}
        self._by_state: dict[Any, Node] = {}
        self._notes: dict[Notes, tuple[int, Notes]] = {}
        self.runs = self.merged = self.nodes = 0
        self.root = self._node(self._start([]), None, 0)

    def _start(self, history: Sequence[tuple[Operation, Result]]) -> _Run:
        self.runs += 1
        if self.runs % COLLECT_EVERY == 0:
            gc.collect(self.runs % (10 * COLLECT_EVERY) == 0)  # The oldest generation is what the search keeps.
        run = _Run(self.writer, self.host, self._script, Env(self.writer, links=self._links), history)
        if run.error is not None:
            raise run.error
        return run

    def _node(self, run: _Run, parent: Node | None, result: int) -> Node:
        key = (run.local_state, run.operation, tuple(run.notes))
        same = self._by_state.get(key) if run.local_state is not None and run.operation is not None else None
        if same is not None:
            self.merged += 1
            if self.merged % AUDIT_EVERY == 0:
                self._audit(same, run)
            run.end()
            return same
        self.nodes += 1
        notes = self._notes.setdefault(tuple(run.notes), (len(self._notes), tuple(run.notes)))
        node = Node(run.operation, *notes, parent, result)
        if run.operation is None:
            run.end()
        else:
            self._park(node, run)
            self._by_state[key] = node
        return node

    def _audit(self, node: Node, run: _Run) -> None:
        """Check that a run goes on as another one did that was in the same state."""
        while node.children:
            result, node = next(reversed(node.children.items()))
            run.go_on(self._results.values[result])
            same = (run.operation, tuple(run.notes)) == (node.operation, node.notes)
            assert same, (
                f"{self.writer} does {run.operation}, and in the same state it did {node.operation}; "
                f"{run.notes} instead of {node.notes}"
            )
            if run.operation is None:
                break

    def _park(self, node: Node, run: _Run) -> None:
        self._parked[node] = run
        if len(self._parked) > MAX_PARKED:
            oldest = next(iter(self._parked))
            self._parked.pop(oldest).end()

    def after(self, node: Node, result: int) -> Node:
        """Return the writer after the operation of ``node`` has had this result."""
        known = node.children.get(result)
        if known is None:
            run = self._parked.pop(node, None) or self._start(self._history(node))
            assert run.operation == node.operation, f"{self.writer} is not deterministic at {node.operation}"
            run.go_on(self._results.values[result])
            known = node.children[result] = self._node(run, node, result)
        return known

    def _history(self, node: Node) -> list[tuple[Operation, Result]]:
        """Return each operation before a point, with its result."""
        steps: list[tuple[Operation, Result]] = []
        while node.parent is not None:
            assert node.parent.operation is not None
            steps.append((node.parent.operation, self._results.values[node.result]))
            node = node.parent
        return steps[::-1]

    def close(self) -> None:
        for run in self._parked.values():
            run.end()
        self._parked.clear()


class _Numbers:
    """A number for each result."""

    def __init__(self) -> None:
        self.values: list[Result] = []
        self._known: dict[Result, int] = {}

    def of(self, result: Result) -> int:
        number = self._known.setdefault((type(result), result), len(self.values))
        if number == len(self.values):
            self.values.append(result)
        return number


# The search


@attrs.frozen(kw_only=True)
class Scenario:
    """Writers, and what may happen to them."""

    name: str
    writers: Mapping[str, Script]
    """Scripts by the name of the writer: one letter each."""
    hosts: Mapping[str, str] = attrs.field(factory=dict)
    """The host of each writer; without one, a host of its own."""
    links: bool = True
    """Whether the storage has links, so that a look costs no request."""
    crashes: int = 0
    """How many writers may be killed. (A writer of another host that is killed is like one that is paused for ever, so
    this matters only for writers of one host.)"""
    lost: int = 0
    """How many replies may be lost: the operation is done, and raises `OSError`."""
    failed: int = 0
    """How many operations may raise `OSError` without an effect."""
    in_order: bool = False
    """Whether writers with equal scripts take the run over in this order, each for the first time. In another order
    they do the same under other names; only the order in which a listing shows their files differs."""


@attrs.define(eq=False)
class World:
    """All that the writers share at one moment. There is one object for each."""

    disk: Disk
    disk_id: int
    claims: tuple[int, ...] = ()
    """Each writer that has taken the run over, in order."""
    gone: frozenset[int] = frozenset()
    """Writers whose id does not count as alive."""
    dead: frozenset[int] = frozenset()
    """Writers that were killed."""
    results: dict[Operation, int] = attrs.field(factory=dict)
    """What each read returns, as a number."""
    changes: dict[tuple[int, Operation], tuple[World, int, str | None]] = attrs.field(factory=dict)
    """What each change leads to: the world after it, its result as a number, and the law that it breaks."""
    chains: dict[Node, list[Node]] = attrs.field(factory=dict)
    """A writer at each of its next reads, and then at its next change, or its end."""


State = tuple[World, tuple[Node, ...], int, int]
"""The world, each writer, and the number of lost replies and failed requests so far."""


@attrs.define(eq=False)
class Moment:
    """A state, as the laws see it."""

    world: World
    nodes: tuple[Node, ...]
    lost: int = 0
    failed: int = 0

    @functools.cached_property
    def claims(self) -> tuple[tuple[int, tuple[Notes, ...]], ...]:
        """Each writer that has taken the run over, in order, with the notes of all writers at that moment."""
        notes = [node.notes for node in self.nodes]
        return tuple(
            (holder, tuple(tuple(note for note in one if note[-1] <= number) for one in notes))
            for number, holder in enumerate(self.world.claims)
        )

    @property
    def is_over(self) -> bool:
        """Return whether no writer can do anything any more."""
        return len(self.world.gone) == len(self.nodes)


What = Literal["run", "crash", "lost", "failed"]


@attrs.frozen
class Action:
    """One step of the schedule."""

    writer: int
    what: What = "run"
    operation: Operation | None = None
    """What the writer does; None if it is killed."""


Step = tuple[int, What]
"""A writer, and what happens to it."""
Places = tuple[World, tuple[frozenset[Node], ...], int, int]
"""A state of the search: the world, where each writer may be, and the number of lost replies and failed requests."""


class Violation(AssertionError):  # noqa: N818
    """A law is broken, with the schedule that leads there."""

    def __init__(self, law: str, schedule: str, operations: str) -> None:
        super().__init__(f"{law}\nschedule: {schedule}\n{operations}")
        self.law, self.schedule, self.operations = law, schedule, operations


@attrs.define
class Report:
    """How much was searched, and what was found."""

    states: int = 0
    ends: int = 0
    """States in which every writer has ended or was killed."""
    steps: int = 0
    """Changes and failures that were tried. Reads are not counted."""
    disks: int = 0
    """Different contents of the storage."""
    checks: int = 0
    """How often the laws were checked; equal combinations of a world and of notes are checked once."""
    runs: int = 0
    """How often the code of a writer was started."""
    violations: dict[str, Violation] = attrs.field(factory=dict)
    """The first schedule that breaks each law, by a shortened text of the law."""
    switches: int | None = None
    """Every order was tried in which the writer changes less often; None if every order was tried."""

    @property
    def is_complete(self) -> bool:
        """Return whether every state within the scenario was reached."""
        return self.switches is None

    def __str__(self) -> str:
        end = "" if self.switches is None else f", every order with fewer than {self.switches} changes of the writer"
        counts = f"{self.states} states, {self.steps} steps, {self.ends} ends, {self.disks} disks, {self.checks} checks"
        return f"{counts}, {self.runs} runs{end}"


Check = Callable[["Model", Moment], str | None]


class Model:
    """A scenario that can be searched or replayed.

    Args:
        scenario: The writers.
        check: Returns the law that a state breaks, or None. Called for each state: each is the end of a schedule in
            which the other operations never happen.
        on_step: Returns the law that an operation breaks, or None, from the world before it.
        is_claim: Whether an operation that succeeded takes the run over.
    """

    def __init__(
        self,
        scenario: Scenario,
        check: Check,
        *,
        on_step: Callable[[World, int, Operation], str | None] = lambda *_: None,
        is_claim: Callable[[Operation], bool] = lambda _: False,
    ) -> None:
        self.scenario, self._check, self._on_step, self._is_claim = scenario, check, on_step, is_claim
        self.names = tuple(scenario.writers)
        self.report = Report()
        self.checked: set[tuple[Any, ...]] = set()
        """Each world with the notes of the writers, and the number of faults."""
        self._disks: dict[Any, Disk] = {}
        self._worlds: dict[Any, World] = {}
        self._results = _Numbers()
        self._programs: list[_Program] = []

    # One step

    def _world(self, disk: Disk, claims: tuple[int, ...], gone: frozenset[int], dead: frozenset[int]) -> World:
        disk = self._disks.setdefault(disk.key, disk)
        key = id(disk), claims, gone, dead
        if key not in self._worlds:
            self._worlds[key] = World(disk, id(disk), claims, gone, dead)
        return self._worlds[key]

    def first(self) -> State:
        """Return the state before any operation."""
        if not self._programs:
            hosts, links = self.scenario.hosts, self.scenario.links
            self._programs = [
                _Program(name, hosts.get(name, f"host-{name}_1_2"), script, self._results, links=links)
                for name, script in self.scenario.writers.items()
            ]
        world = self._world(Disk(), (), frozenset(), frozenset())
        return world, tuple(program.root for program in self._programs), 0, 0

    def close(self) -> None:
        """End every thread."""
        for program in self._programs:
            program.close()

    def is_live(self, world: World, owner: str) -> bool:
        """Return whether the writer of an id runs."""
        writer = writer_of(owner)
        return writer in self.names and self.names.index(writer) not in world.gone

    def read(self, world: World, operation: Operation) -> int:
        """Return the number of what a read returns."""
        number = world.results.get(operation)
        if number is None:
            match operation.what:
                case "note":
                    result: Result = len(world.claims)
                case "is live":
                    result = self.is_live(world, operation.path)
                case _:
                    result = world.disk.apply(operation, "")
            number = world.results[operation] = self._results.of(result)
        return number

    def _change(self, world: World, i: int, operation: Operation) -> tuple[World, int, str | None]:
        """Return the world after a change, the number of its result, and the law that it breaks."""
        known = world.changes.get((i, operation))
        if known is None:
            known = world.changes[i, operation] = self._changed(world, i, operation)
        return known

    def _changed(self, world: World, i: int, operation: Operation) -> tuple[World, int, str | None]:
        if operation.what == "release":
            after = self._world(world.disk, world.claims, world.gone | {i}, world.dead)
            return after, self._results.of(None), None
        disk, claims = world.disk.copied(), world.claims
        result = disk.apply(operation, self.names[i])
        if self._is_claim(operation) and not isinstance(result, Failure):
            claims = (*claims, i)
        after = self._world(disk, claims, world.gone, world.dead)
        return after, self._results.of(result), self._on_step(world, i, operation)

    def outcome(self, world: World, action: Action) -> tuple[World, int, str | None]:
        """Return the world after an action, the number of its result, and the law that it breaks."""
        i, operation = action.writer, action.operation
        if operation is None:
            return self._world(world.disk, world.claims, world.gone | {i}, world.dead | {i}), -1, None
        if action.what == "failed":
            return world, self._failure(operation), None
        if operation.is_read:
            return world, self.read(world, operation), None
        world, result, broken = self._change(world, i, operation)
        if action.what == "lost" and not isinstance(self._results.values[result], Failure):
            result = self._failure(operation)
        return world, result, broken

    def is_early(self, world: World, i: int, operation: Operation) -> bool:
        """Return whether a writer takes the run over before another one with the same script that has to come first."""
        if not self.scenario.in_order or i in world.claims or not self._is_claim(operation):
            return False
        scripts = [*self.scenario.writers.values()]
        return any(script == scripts[i] and j not in world.claims for j, script in enumerate(scripts[:i]))

    def after(self, i: int, node: Node, result: int) -> Node:
        """Return a writer after its next operation has had this result; -1 if it was killed."""
        return node if result == -1 else self._programs[i].after(node, result)

    def act(self, state: State, writer: int, what: What) -> tuple[State, str | None]:
        """Return the state after a writer's next operation, and the law that it breaks."""
        world, nodes, lost, failed = state
        node = nodes[writer]
        after, result, broken = self.outcome(world, Action(writer, what, None if what == "crash" else node.operation))
        nodes = (*nodes[:writer], self.after(writer, node, result), *nodes[writer + 1 :])
        return (after, nodes, lost + (what == "lost"), failed + (what == "failed")), broken

    def _failure(self, operation: Operation) -> int:
        return self._results.of(Failure(OSError, f"injected: {operation.what} {operation.path}"))

    def chain(self, world: World, i: int, node: Node) -> list[Node]:
        """Return a writer at each of its next reads, and then at its next change, or its end."""
        chain = world.chains.get(node)
        if chain is None:
            chain, one = [node], node
            while one.is_read:
                assert one.operation is not None
                one = self._programs[i].after(one, self.read(world, one.operation))
                chain.append(one)
            world.chains[node] = chain
        return chain

    # All steps

    def search(
        self,
        *,
        reduced: bool = True,
        first_only: bool = False,
        max_states: int | None = None,
        max_switches: int | None = None,
    ) -> Report:
        """Visit every state. Schedules with few changes of the writer come first. It can be called again.

        Only operations that change something are counted: a writer that reads meanwhile does not change the writer.
        """
        self.report, self.checked = Report(), set()
        gc.disable()  # A finalizer must not run in the thread of another writer.
        try:
            search = _Search(self, reduced=reduced, is_bounded=(max_states, max_switches) != (None, None))
            while search.has_more and not (first_only and self.report.violations):
                if max_states and self.report.states >= max_states:
                    break
                if max_switches is not None and search.switches > max_switches:
                    break
                search.go_on()
            self.report.switches = search.switches if search.has_more else None
            self.report.disks = len({world.disk_id for world, *_ in self.checked})
            self.report.checks, self.report.runs = len(self.checked), sum(one.runs for one in self._programs)
            return self.report
        finally:
            self.close()
            gc.collect()  # A finalizer of this search must not run in a later one either.
            gc.enable()

    def broken(self, state: State) -> str | None:
        """Return the law that a state breaks, if it was not checked before."""
        world, nodes, lost, failed = state
        key = (world, *[node.notes_id for node in nodes], lost, failed)
        if key in self.checked:
            return None
        self.checked.add(key)
        return self._check(self, Moment(*state))

    def found(self, law: str, steps: Sequence[Step]) -> None:
        """Keep the first schedule for each kind of violation."""
        kind = "".join(char for char in law if not char.isdigit())[:50]
        if kind not in self.report.violations:
            self.report.violations[kind] = Violation(law, self._text(steps), "\n".join(self._lines(steps)))

    # Schedules as text

    def _text(self, steps: Sequence[Step]) -> str:
        """Return a schedule such as ``"A*12 B*3 A!lost"``: replay it with `replay`."""
        parts: list[str] = []
        for (writer, what), group in itertools.groupby(steps):
            count = len([*group])
            suffix = "" if what == "run" else f"!{what}"
            parts.append(f"{self.names[writer]}{suffix}" + (f"*{count}" if count > 1 else ""))
        return " ".join(parts)

    def replay(self, schedule: str) -> None:
        """Do what a schedule says, and check the laws of each state on the way; violations are in the report."""
        try:
            steps: list[Step] = []
            state = self.first()
            for step in _steps_of(schedule, self.names):
                steps.append(step)
                state, broken = self.act(state, *step)
                broken = broken or self.broken(state)
                if broken is not None:
                    self.found(broken, steps)
        finally:
            self.close()

    def _lines(self, steps: Iterable[Step]) -> Iterator[str]:
        """Yield a line for an operation that changes something or lists everything, and for each note."""
        state = self.first()
        for i, what in steps:
            name, node = self.names[i], state[1][i]
            state, _ = self.act(state, i, what)
            operation = node.operation
            assert operation is not None
            if what != "run":
                yield f"  {name} {operation}  [{what}]"
            elif not operation.is_read or operation.path == "":
                yield f"  {name} {operation}"
            for note in state[1][i].notes[len(node.notes) :]:
                yield f"  {name}     ---- {' '.join(map(str, note))}"


def _steps_of(schedule: str, names: Sequence[str]) -> Iterator[Step]:
    for part in schedule.split():
        text, _, count = part.partition("*")
        name, _, what = text.partition("!")
        kind: Any = what or "run"
        yield from [(names.index(name), kind)] * int(count or 1)


class _Search:
    """One way through the states of a model."""

    def __init__(self, model: Model, *, reduced: bool, is_bounded: bool) -> None:
        self._model, self._reduced, self._is_bounded, self._report = model, reduced, is_bounded, model.report
        self._before: dict[Places, tuple[Places, Action] | None] = {}
        """Each state that was visited, with the state before it and what was done there."""
        self._there: dict[tuple[Any, ...], list[tuple[frozenset[Node], ...]]] = {}
        """Where the writers may be in the states that were visited."""
        self._same: dict[frozenset[Node], frozenset[Node]] = {}
        self._woken: dict[tuple[frozenset[Node], World, World], frozenset[Node]] = {}
        self.switches = 0
        """How often the writer has changed in the orders that are tried now."""
        self._todo: list[tuple[Places, int]] = []
        """What is not searched yet: a state, and the writer that changed something last."""
        self._now: deque[tuple[Places, Action]] = deque()
        """Where another writer goes on, after so many changes of the writer, and what it does."""
        self._later: list[tuple[Places, Action]] = []
        """The same, after one more change of the writer."""
        world, nodes, lost, failed = model.first()
        self._first = nodes
        places = tuple(self._place(world, i, [node]) for i, node in enumerate(nodes))
        self._visit(None, (world, places, lost, failed))

    @property
    def has_more(self) -> bool:
        """Return whether something was not searched yet."""
        return bool(self._todo or self._now or self._later)

    def go_on(self) -> None:
        """Do all that may happen next in one state."""
        if self._todo:
            self._go_on_in(*self._todo.pop())
        elif self._now:
            self._do(*self._now.popleft())
        else:
            self.switches += 1
            self._now, self._later = deque(self._later), []

    def _go_on_in(self, state: Places, last: int) -> None:
        if state[1] not in self._there[self._key(state, last)]:
            return  # Since then a state was found that covers it.
        actions = [*self._actions(state)]
        self._report.ends += not actions
        for action in sorted(actions, key=lambda one: one.what != "run"):
            if last in (action.writer, -1):
                self._do(state, action)
            else:
                self._later.append((state, action))

    def _do(self, state: Places, action: Action) -> None:
        after, broken = self._after(state, action)
        self._report.steps += 1
        if broken is None:
            self._visit((state, action), after)
        else:
            self._model.found(broken, self._schedule((state, action), after, [min(p, key=id) for p in after[1]]))

    def _key(self, state: Places, last: int) -> tuple[Any, ...]:
        """Return what two states have in common if one of them may cover the other."""
        world, _, lost, failed = state
        # The writer that was last goes on without a change of the writer. If all is searched, this does not matter.
        return (world, lost, failed, last if self._is_bounded else -1)

    def _is_covered(self, state: Places, last: int) -> bool:
        """Return whether a state was visited that differs only in that the writers may be in more places.

        All that may happen next may happen there, too.
        """
        places, visited = state[1], self._there.setdefault(self._key(state, last), [])
        is_covered = any(all(map(frozenset.issubset, places, one)) for one in visited)
        if not is_covered:
            visited[:] = [one for one in visited if not all(map(frozenset.issubset, one, places))]
            visited.append(places)
        return is_covered

    def _visit(self, before: tuple[Places, Action] | None, after: Places) -> None:
        """Check a state, and search it later, if it was not visited before."""
        writer = -1 if before is None else before[1].writer
        if self._is_covered(after, writer):
            return
        self._todo.append((after, writer))
        if after in self._before:
            return
        world, places, lost, failed = after
        self._before[after] = before
        self._report.states += 1
        # The laws see what a writer has noted, and not where it is.
        for nodes in itertools.product(*({node.notes_id: node for node in place}.values() for place in places)):
            broken = self._model.broken((world, nodes, lost, failed))
            if broken is not None:
                self._model.found(broken, self._schedule(before, after, nodes))

    def _actions(self, state: Places) -> Iterator[Action]:
        """Yield what may happen next. In a reduced search, a writer that is about to read sleeps."""
        (world, places, lost, failed), scenario = state, self._model.scenario
        for i, place in enumerate(places):
            if i in world.dead:
                continue
            operations = {node.operation: None for node in place if node.operation is not None}
            operations = {one: None for one in operations if not self._model.is_early(world, i, one)}
            # A kill before a read has the same effect as a kill before the next change.
            if len(world.dead) < scenario.crashes and not all(one.is_read for one in operations):
                yield Action(i, "crash")
            for operation in operations:
                if not (operation.is_read and self._reduced):
                    yield Action(i, "run", operation)
                if operation.what in SILENT:
                    continue
                if lost < scenario.lost and not operation.is_read:
                    yield Action(i, "lost", operation)
                if failed < scenario.failed:
                    yield Action(i, "failed", operation)

    def _after(self, state: Places, action: Action) -> tuple[Places, str | None]:
        """Return the state after an action, and the law that it breaks."""
        world, places, lost, failed = state
        i, (now, result, broken) = action.writer, self._model.outcome(world, action)
        nodes = [self._model.after(i, node, result) for node in self._acting(places[i], action)]
        acted = self._place(now, i, nodes)
        after = tuple(acted if j == i else self._wake(world, now, j, place) for j, place in enumerate(places))
        return (now, after, lost + (action.what == "lost"), failed + (action.what == "failed")), broken

    def _acting(self, place: Iterable[Node], action: Action) -> list[Node]:
        """Return where a writer is if it does this, of the places where it may be."""
        if action.operation is None:
            return [node for node in place if node.operation is not None and not node.is_read]
        return [node for node in place if node.operation == action.operation]

    def _place(self, world: World, i: int, nodes: Iterable[Node]) -> frozenset[Node]:
        """Return where a writer may be that was at one of these nodes: it reads on, or sleeps."""
        return self._one(frozenset(one for node in nodes for one in self._chain(world, i, node)))

    def _one(self, place: frozenset[Node]) -> frozenset[Node]:
        return self._same.setdefault(place, place)

    def _chain(self, world: World, i: int, node: Node) -> list[Node]:
        return self._model.chain(world, i, node) if self._reduced and i not in world.dead else [node]

    def _wake(self, then: World, now: World, i: int, place: frozenset[Node]) -> frozenset[Node]:
        """Return where a writer may be after a change: if what it is about to read has changed, it may read on."""
        key = (place, then, now)
        if key not in self._woken:
            awake = [node for node in place if self._reads_other(then, now, node)]
            self._woken[key] = self._one(place | self._place(now, i, awake)) if awake else place
        return self._woken[key]

    def _reads_other(self, then: World, now: World, node: Node) -> bool:
        """Return whether what a writer is about to read has changed."""
        if then is now or not node.is_read or node.operation is None:
            return False
        return self._model.read(then, node.operation) != self._model.read(now, node.operation)

    def _schedule(self, before: tuple[Places, Action] | None, state: Places, nodes: Iterable[Node]) -> list[Step]:
        """Return all that happens until each writer is at its node of a state, each read included."""
        steps: list[Step] = []
        while before is not None:
            (then, places, _, _), action = before
            was = []
            for i, node in enumerate(nodes):
                origin, reads = self._origin(then, state[0], i, places[i], node, action)
                steps += [(i, "run")] * reads
                was.append(origin)
            steps.append((action.writer, action.what))
            nodes, state = was, before[0]
            before = self._before[state]
        reads_first = [self._chain(state[0], i, self._first[i]).index(node) for i, node in enumerate(nodes)]
        return [(i, "run") for i, reads in enumerate(reads_first) for _ in range(reads)] + steps[::-1]

    def _origin(
        self, then: World, now: World, i: int, place: Iterable[Node], node: Node, action: Action
    ) -> tuple[Node, int]:
        """Return where a writer was before an action, and how often it has read since."""
        if i == action.writer:
            result = self._model.outcome(then, action)[1]
            ways = [(one, self._model.after(i, one, result)) for one in self._acting(place, action)]
        else:
            ways = [(one, one) for one in place if one is node or self._reads_other(then, now, one)]
            ways.sort(key=lambda way: way[0] is not node)
        found = ((one, self._chain(now, i, after)) for one, after in ways)
        return next((one, chain.index(node)) for one, chain in found if node in chain)
