"""Runs real code of several writers on one storage in every order of their operations, and finds the order that fails.

A writer is a script: a function that uses a storage. Each operation of the storage is a point where another writer may
run. What a writer does next follows from the results that it has got so far, and from nothing else: time, random
numbers and process ids are replaced. So a writer is a tree: a node is an operation, each result leads to a next node.
The real code runs, in a thread, only to find a node that is not known yet. The search combines the trees with a
storage. Equal states (contents of the storage, and the node of each writer) are searched once.

An upload is one operation, `publish`, because what happens before it is invisible to the other writers.
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

from checkpointer.commit.index import HOME, RECORDS, Listing
from checkpointer.commit.terms import TERMS, Lease
from checkpointer.errors import NameTakenError
from checkpointer.ports import Stat
from checkpointer.storage import owner as owners
from checkpointer.testing import Crash, MemoryStorage
from support.local_state import digest_of_frames

__all__ = [
    "Disk", "Env", "Model", "Notes", "Operation", "Report", "Scenario", "State", "Violation", "deterministic", "listed",
    "on_host",
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


@attrs.frozen
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

    number: int
    operation: Operation | None
    """None if the script has ended."""
    notes: Notes
    """All that the script has noted so far."""
    parent: Node | None = None
    result: Result = None
    """The result of the parent's operation that led here."""
    children: dict[Result, Node] = attrs.field(factory=dict)
    is_released: bool = False
    """Whether the writer has given its id back, as a closed manager does."""
    future: int = 0
    """The footprint of this operation, and of each known one after it: see `_Footprints`."""
    others: list[Node] = attrs.field(factory=list)
    """Further nodes that lead here."""
    relying: list[tuple[int, State]] = attrs.field(factory=list)
    """States that are searched only in part, as long as nothing of this footprint comes in the future."""

    def history(self) -> list[tuple[Operation, Result]]:
        """Return each operation before this point, with its result."""
        steps: list[tuple[Operation, Result]] = []
        node: Node | None = self
        while node is not None and node.parent is not None:
            assert node.parent.operation is not None
            steps.append((node.parent.operation, node.result))
            node = node.parent
        return steps[::-1]


_here = threading.local()


class _Run:
    """Real code in a thread that stops at each operation whose result is not known yet."""

    def __init__(
        self, writer: str, host: str, script: Script, env: Env, history: Sequence[tuple[Operation, Result]]
    ) -> None:
        self.writer, self.host = writer, host
        self.operation: Operation | None = None
        self.local_state: str | None = None
        self.notes: list[tuple[Any, ...]] = []
        self.error: BaseException | None = None
        self.numbers = itertools.count(1)
        self.time = 1000.0
        self.is_over = False
        self.kept: list[Any] = [env]
        self._history = iter(history)
        self._result: Result = None
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        env._run = self
        self._thread = threading.Thread(target=self._work, args=(script, env), daemon=True)
        self._thread.start()
        self._stopped.acquire()

    def _work(self, script: Script, env: Env) -> None:
        _here.run = self
        try:
            script(env)
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
            self._stopped.release()
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
        """Note an event, such as an acknowledged save. It happens at a moment of its own."""
        self._run.perform(Operation("note", self.writer))
        self._run.notes.append(what)

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
        if run is not None and not run.is_over and getattr(run, "owner", None) == owner:
            run.owner = None
            with contextlib.suppress(Crash):  # It is called by a finalizer, which would print it.
                run.perform(Operation("release", owner))

    def __contains__(self, owner: object) -> bool:
        run = getattr(_here, "run", None)
        if run is None:
            return False
        if owner == getattr(run, "owner", None):
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

    def __init__(self, model: Model, state: State, host: str) -> None:
        self.host, self.time, self.numbers = host, 1000.0, itertools.count(1)
        self.is_over, self.owner = False, None
        self._model, self._state = model, state

    def perform(self, operation: Operation) -> Result:
        """Return whether another process runs; nothing else is asked."""
        return self._model.is_live(self._state, operation.path) if operation.what == "is live" else None


@contextlib.contextmanager
def on_host(model: Model, state: State) -> Iterator[None]:
    """Act as one more process on the host of the scenario, if it has one host for all."""
    hosts = {*model.scenario.hosts.values()}
    _here.run = _Outside(model, state, *hosts) if len(hosts) == 1 else None
    try:
        yield
    finally:
        _here.run = None


def _id_of(writer: str) -> str:
    return f"~{ord(writer):x}"


def writer_of(owner: str) -> str:
    """Return the writer that has an id."""
    return chr(int(owner.rpartition("~")[2][:2], 16))


class _Footprints:
    """Which operations may not be exchanged. A set of footprints is a number with a bit for each."""

    def __init__(self, is_claim: Callable[[Operation], bool]) -> None:
        self._is_claim = is_claim
        self._bits: dict[tuple[str, str], int] = {}
        self._against: list[int] = []
        """By bit: the footprints that it conflicts with."""
        self._known: dict[Operation, int] = {}

    def of(self, operation: Operation) -> int:
        """Return the footprint of an operation."""
        known = self._known.get(operation)
        if known is None:
            known = 0
            for one in self._parts(operation):
                known |= 1 << self._bit(one)
            self._known[operation] = known
        return known

    def against(self, footprint: int) -> int:
        """Return all footprints that conflict with this one."""
        found = 0
        while footprint:
            low = footprint & -footprint
            found |= self._against[low.bit_length() - 1]
            footprint ^= low
        return found

    def _parts(self, operation: Operation) -> Iterator[tuple[str, str]]:
        path = operation.path
        match operation.what:
            case "list":
                yield "list", path
            case "open":
                yield _reading(path)
            case "is live":
                yield "is live", writer_of(path)
            case "release":
                yield "release", writer_of(path)
            case "note":
                yield "note", path
            case _:
                yield "write", path
                if operation.what in ("hardlink", "copy"):
                    yield _reading(operation.target)
                if self._is_claim(operation):
                    yield "claim", ""

    def _bit(self, part: tuple[str, str]) -> int:
        bit = self._bits.get(part)
        if bit is None:
            bit = self._bits[part] = len(self._bits)
            self._against.append(0)
            for other, number in self._bits.items():
                if _conflict(part, other) or _conflict(other, part):
                    self._against[bit] |= 1 << number
                    self._against[number] |= 1 << bit
        return bit


def _reading(path: str) -> tuple[str, str]:
    # A link leads to another file, so the whole storage counts as read.
    return ("list", "") if path.startswith(ALIASES) else ("read", path)


def _conflict(one: tuple[str, str], other: tuple[str, str]) -> bool:
    match one[0], other[0]:
        case "write", "list":
            return not other[1] or _overlap(one[1], other[1])
        case "write", ("read" | "write"):
            return _overlap(one[1], other[1])
        case "is live", "release":
            return one[1] == other[1]
        case "claim", ("note" | "claim"):
            return True
    return False


def _overlap(one: str, other: str) -> bool:
    return one == other or one.startswith(f"{other}/") or other.startswith(f"{one}/")


class _Program:
    """All that one writer may do, as far as it is known."""

    def __init__(self, writer: str, host: str, script: Script, footprints: _Footprints, *, links: bool) -> None:
        self.writer, self.host, self._script, self._links = writer, host, script, links
        self._footprints = footprints
        self.doubtful: list[State] = []
        """States that were searched only in part, and now a footprint was found that they must not ignore."""
        self._parked: dict[Node, _Run] = {}
        self._numbers = itertools.count()
        self._by_state: dict[Any, Node] = {}
        self.runs = self.merged = self.audits = 0
        self.root = self._node(self._start([]), None, None)

    def _start(self, history: Sequence[tuple[Operation, Result]]) -> _Run:
        self.runs += 1
        if self.runs % COLLECT_EVERY == 0:
            gc.collect(self.runs % (10 * COLLECT_EVERY) == 0)  # The oldest generation is what the search keeps.
        run = _Run(self.writer, self.host, self._script, Env(self.writer, links=self._links), history)
        if run.error is not None:
            raise run.error
        return run

    def _node(self, run: _Run, parent: Node | None, result: Result) -> Node:
        key = (run.local_state, run.operation, tuple(run.notes))
        same = self._by_state.get(key) if run.local_state is not None and run.operation is not None else None
        if same is not None:
            return self._merge(same, run, parent)
        node = Node(next(self._numbers), run.operation, tuple(run.notes), parent, result)
        node.is_released = parent is not None and (
            parent.is_released or (parent.operation is not None and parent.operation.what == "release")
        )
        if run.operation is None:
            run.end()
        else:
            self._park(node, run)
            self._by_state[key] = node
            self._foresee(node, self._footprints.of(run.operation))
        return node

    def _merge(self, node: Node, run: _Run, parent: Node | None) -> Node:
        """Return the node of a run that is where another one was, by another way."""
        self.merged += 1
        if self.merged % AUDIT_EVERY == 0:
            self._audit(node, run)
        run.end()
        if parent is not None:
            node.others.append(parent)
            self._foresee(parent, node.future)
        return node

    def _audit(self, node: Node, run: _Run) -> None:
        """Check that the run goes on as the other one did."""
        self.audits += 1
        while node.children:
            result, node = next(reversed(node.children.items()))
            run.go_on(result)
            same = (run.operation, tuple(run.notes)) == (node.operation, node.notes)
            assert same, (
                f"{self.writer} does {run.operation}, and in the same state it did {node.operation}; "
                f"{run.notes} instead of {node.notes}"
            )
            if run.operation is None:
                break

    def _foresee(self, last: Node, footprint: int) -> None:
        todo = [last]
        while todo:
            node = todo.pop()
            new = footprint & ~node.future
            if not new:
                continue
            node.future |= new
            if any(mask & new for mask, _ in node.relying):
                self.doubtful += [state for mask, state in node.relying if mask & new]
                node.relying = [one for one in node.relying if not one[0] & new]
            todo += [node.parent] if node.parent is not None else []
            todo += node.others

    def _park(self, node: Node, run: _Run) -> None:
        self._parked[node] = run
        if len(self._parked) > MAX_PARKED:
            oldest = next(iter(self._parked))
            self._parked.pop(oldest).end()

    def after(self, node: Node, result: Result) -> Node:
        """Return the writer after the operation of ``node`` has had this result."""
        known = node.children.get(result)
        if known is None:
            run = self._parked.pop(node, None) or self._start(node.history())
            assert run.operation == node.operation, f"{self.writer} is not deterministic at {node.operation}"
            run.go_on(result)
            known = node.children[result] = self._node(run, node, result)
        return known

    def close(self) -> None:
        for run in self._parked.values():
            run.end()
        self._parked.clear()


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
    prepare: Callable[[Disk], None] | None = None
    """Fills the storage before the writers start."""
    starts: Mapping[str, Callable[[State], bool]] = attrs.field(factory=dict)
    """When a writer may begin; without a condition at any moment."""
    crashes: int = 0
    """How many writers may be killed. (A writer of another host that is killed is like one that is paused for ever, so
    this matters only for writers of one host.)"""
    lost: int = 0
    """How many replies may be lost: the operation is done, and raises `OSError`."""
    failed: int = 0
    """How many operations may raise `OSError` without an effect."""
    lag: int = 0
    """A listing may miss up to this many of the last changes."""
    preemptions: int | None = None
    """How often a writer may be stopped while it could go on; None: no limit."""


@attrs.frozen(eq=False)
class State:
    """The storage and all writers at one moment."""

    disk: Disk
    disk_id: int
    nodes: tuple[Node, ...]
    dead: frozenset[int] = frozenset()
    """Writers that were killed."""
    claims: tuple[tuple[int, tuple[Notes, ...]], ...] = ()
    """Each writer that has taken the run over, in order, with the notes of all writers at that moment."""
    lost: int = 0
    failed: int = 0
    preemptions: int = 0
    last: int = -1
    """The writer that ran last."""
    older: tuple[int, ...] = ()
    """The disks before the last changes, if a listing may lag."""
    trace: Any = None
    """The state before, and the action that led here."""
    tried: list[int] = attrs.field(factory=list)
    """The writers whose next steps were searched."""

    @property
    def is_over(self) -> bool:
        """Return whether no writer can do anything any more."""
        return all(node.operation is None or i in self.dead for i, node in enumerate(self.nodes))


@attrs.frozen
class Action:
    """One step of the schedule."""

    writer: int
    what: Literal["run", "crash", "lost", "failed", "lag"] = "run"
    lag: int = 0


class Violation(AssertionError):  # noqa: N818
    """A law is broken, with the schedule that leads there."""

    def __init__(self, law: str, schedule: str, operations: str) -> None:
        super().__init__(f"{law}\nschedule: {schedule}\n{operations}")
        self.law, self.schedule, self.operations = law, schedule, operations


@attrs.define
class Report:
    """How much was searched, and what was found."""

    states: int = 0
    schedules: int = 0
    """Complete schedules: every writer has ended or was killed."""
    steps: int = 0
    """Transitions from a state to another."""
    checks: int = 0
    """Final states whose laws were checked, without those that were checked before."""
    runs: int = 0
    """How often the code of a writer was started."""
    violations: dict[str, Violation] = attrs.field(factory=dict)
    """The first schedule that breaks each law, by a shortened text of the law."""
    is_complete: bool = True
    """Whether every state within the bounds was reached."""

    def __str__(self) -> str:
        end = "" if self.is_complete else ", stopped at its bound"
        counts = f"{self.states} states, {self.steps} steps, {self.schedules} ends, {self.checks} checks"
        return f"{counts}, {self.runs} runs{end}"


Check = Callable[["Model", State], str | None]


class Model:
    """A scenario that can be searched or replayed.

    Args:
        scenario: The writers.
        check: Returns the law that a state breaks, or None. Called for each state: each is the end of a schedule in
            which the other operations never happen.
        on_step: Returns the law that an operation breaks, or None, from the state before it.
        is_claim: Whether an operation that succeeded takes the run over.
    """

    def __init__(
        self,
        scenario: Scenario,
        check: Check,
        *,
        on_step: Callable[[State, int, Operation, Result], str | None] = lambda *_: None,
        is_claim: Callable[[Operation], bool] = lambda _: False,
    ) -> None:
        self.scenario, self._check, self._on_step, self._is_claim = scenario, check, on_step, is_claim
        self._footprints = _Footprints(is_claim)
        self.names = tuple(scenario.writers)
        self.report = Report()
        self._disks: dict[Any, int] = {}
        self._by_id: list[Disk] = []
        self._checked: dict[Any, str | None] = {}
        self._programs: list[_Program] = []

    # One step

    def _intern(self, disk: Disk) -> int:
        number = self._disks.setdefault(disk.key, len(self._disks))
        if number == len(self._by_id):
            self._by_id.append(disk)
        return number

    def first(self) -> State:
        """Return the state before any operation."""
        disk = Disk()
        if self.scenario.prepare is not None:
            self.scenario.prepare(disk)
        hosts, links = self.scenario.hosts, self.scenario.links
        self._programs = [
            _Program(name, hosts.get(name, f"host-{name}_1_2"), script, self._footprints, links=links)
            for name, script in self.scenario.writers.items()
        ]
        number = self._intern(disk)
        return State(self._by_id[number], number, tuple(program.root for program in self._programs))

    def close(self) -> None:
        """End every thread."""
        for program in self._programs:
            program.close()
            self.report.runs += program.runs

    def is_live(self, state: State, owner: str) -> bool:
        """Return whether the writer of an id runs."""
        writer = writer_of(owner)
        if writer not in self.names:
            return False
        number = self.names.index(writer)
        node = state.nodes[number]
        return number not in state.dead and node.operation is not None and not node.is_released

    def _able(self, state: State) -> list[int]:
        """Return the writers that may run; first the one that ran last."""
        able = [i for i, node in enumerate(state.nodes) if node.operation is not None and i not in state.dead]
        able = [i for i in able if self.names[i] not in self.scenario.starts or self._may_start(state, i)]
        return sorted(able, key=lambda i: i != state.last)

    def actions(self, state: State, able: Sequence[int]) -> Iterator[Action]:
        """Yield what may happen next to these writers."""
        scenario = self.scenario
        for i in able:
            is_preempting = state.last in able and i != state.last
            if is_preempting and scenario.preemptions is not None and state.preemptions >= scenario.preemptions:
                continue
            yield Action(i)
            operation = state.nodes[i].operation
            assert operation is not None
            # A kill before a read has the same effect as a kill before the next change.
            if len(state.dead) < scenario.crashes and not operation.is_read:
                yield Action(i, "crash")
            if operation.what in SILENT:
                continue
            if state.lost < scenario.lost and not operation.is_read:
                yield Action(i, "lost")
            if state.failed < scenario.failed:
                yield Action(i, "failed")
            if operation.what == "list":
                yield from (Action(i, "lag", lag) for lag in range(1, len(state.older) + 1))

    def _enough(self, state: State, able: list[int]) -> list[int]:
        """Return writers so that it is enough to search what they do next: the others' future does not affect it."""
        if self.scenario.lag or self.scenario.preemptions is not None or len(able) < 2:
            return able
        running = [i for i, node in enumerate(state.nodes) if node.operation is not None and i not in state.dead]
        if len(running) > len(able):
            return able
        best = able
        for first in able:
            chosen, mask = [first], 0
            for i in chosen:  # It grows.
                operation = state.nodes[i].operation
                assert operation is not None
                mask |= self._footprints.against(self._footprints.of(operation))
                if self.scenario.crashes:
                    mask |= self._footprints.against(self._footprints.of(Operation("release", _id_of(self.names[i]))))
                chosen += [k for k in running if k not in chosen and state.nodes[k].future & mask]
            if len(chosen) < len(best):
                best, best_mask = chosen, mask
                if len(best) == 1:
                    break
        if best is not able:
            for k in running:
                if k not in best:
                    state.nodes[k].relying.append((best_mask, state))
        return best

    def _may_start(self, state: State, i: int) -> bool:
        return state.nodes[i].parent is not None or self.scenario.starts[self.names[i]](state)

    def step(self, state: State, action: Action) -> tuple[State, str | None]:
        """Return the state after an action, and the law that it breaks."""
        trace, i = (state, action), action.writer
        if action.what == "crash":
            return attrs.evolve(state, dead=state.dead | {i}, trace=trace, tried=[]), None
        node, disk, number, older = state.nodes[i], state.disk, state.disk_id, state.older
        operation = node.operation
        assert operation is not None
        if operation.what == "is live":
            result: Result = self.is_live(state, operation.path)
        elif operation.what in SILENT:
            result = None
        elif action.what == "failed":
            result = Failure(OSError, f"injected: {operation.what} {operation.path}")
        elif action.what == "lag":
            result = self._by_id[older[-action.lag]].apply(operation, "")
        elif operation.is_read:
            result = disk.apply(operation, "")
        else:
            disk = disk.copied()
            result = disk.apply(operation, self.names[i])
            number = self._intern(disk)
            disk = self._by_id[number]
            if self.scenario.lag and number != state.disk_id:
                older = (*older, state.disk_id)[-self.scenario.lag :]
        broken = self._on_step(state, i, operation, result)
        claims = state.claims
        is_change = not operation.is_read and not isinstance(result, Failure)
        if is_change and self._is_claim(operation):
            claims = (*claims, (i, tuple(other.notes for other in state.nodes)))
        if action.what == "lost" and not isinstance(result, Failure):
            result = Failure(OSError, f"injected: {operation.what} {operation.path}")
        nodes = list(state.nodes)
        nodes[i] = self._programs[i].after(node, result)
        last = state.nodes[state.last] if state.last >= 0 else None
        is_preempting = i != state.last and last is not None and last.operation is not None
        after = State(
            disk,
            number,
            tuple(nodes),
            dead=state.dead,
            claims=claims,
            lost=state.lost + (action.what == "lost"),
            failed=state.failed + (action.what == "failed"),
            preemptions=state.preemptions + (is_preempting and state.last not in state.dead),
            last=i,
            older=older,
            trace=trace,
        )
        return after, broken

    # All steps

    def _key(self, state: State) -> Any:
        bounded = (state.preemptions, state.last) if self.scenario.preemptions is not None else ()
        numbers = tuple(node.number for node in state.nodes)
        return state.disk_id, numbers, state.dead, state.claims, state.lost, state.failed, state.older, bounded

    def search(self, *, first_only: bool = False, max_states: int | None = None, max_s: float | None = None) -> Report:
        """Visit every state. Schedules with few changes of the writer come first."""
        started, report = time.perf_counter(), self.report
        gc.disable()  # A finalizer must not run in the thread of another writer.
        try:
            first = self.first()
            todo, seen = deque([first]), {self._key(first)}
            report.states = 1
            while todo:
                state = todo.popleft()
                able = self._able(state)
                tried = state.tried
                if not tried:
                    state.tried.extend(self._enough(state, able))
                else:  # What it relied on is not so.
                    fresh = [i for i in able if i not in tried]
                    state.tried.extend(fresh)
                    able = fresh
                report.schedules += not able and not tried
                self._check_state(state)
                chosen = [i for i in able if i in state.tried]
                for action in reversed([*self.actions(state, chosen)]):
                    after, broken = self.step(state, action)
                    report.steps += 1
                    if broken is not None:
                        self._found(broken, after)
                        continue
                    key = self._key(after)
                    if key in seen:
                        continue
                    seen.add(key)
                    report.states += 1
                    if action.what == "run" and action.writer == state.last:
                        todo.appendleft(after)
                    else:
                        todo.append(after)
                for program in self._programs:
                    todo += program.doubtful
                    program.doubtful.clear()
                if self.report.violations and first_only:
                    report.is_complete = False
                    break
                if (max_states and report.states >= max_states) or (max_s and time.perf_counter() - started > max_s):
                    report.is_complete = not todo
                    break
            return report
        finally:
            self.close()
            gc.collect()  # A finalizer of this search must not run in a later one either.
            gc.enable()

    def _check_state(self, state: State) -> None:
        key = state.disk_id, tuple(n.notes for n in state.nodes), state.claims, state.dead, state.is_over
        if key not in self._checked:
            self.report.checks += 1
            self._checked[key] = self._check(self, state)
        broken = self._checked[key]
        if broken is not None:
            self._found(broken, state)

    def _found(self, law: str, state: State) -> None:
        """Note the first schedule for each kind of violation; raise it in a replay."""
        kind = "".join(char for char in law if not char.isdigit())[:50]
        if kind not in self.report.violations:
            self.report.violations[kind] = self._violation(law, state)

    # Schedules as text

    def schedule_of(self, state: State) -> str:
        """Return the schedule that leads to a state, such as ``"A*12 B*3 A!lost"``: replay it with `replay`."""
        parts: list[str] = []
        actions = [action for _, action in _steps_to(state)]
        for action, group in itertools.groupby(actions):
            name, count = self.names[action.writer], len(list(group))
            suffix = "" if action.what == "run" else f"!{action.what}{action.lag or ''}"
            parts.append(f"{name}{suffix}" + (f"*{count}" if count > 1 else ""))
        return " ".join(parts)

    def replay(self, schedule: str) -> State:
        """Return the state that a schedule leads to; its violations are in the report."""
        try:
            state = self.first()
            for action in self._actions_of(schedule):
                state, broken = self.step(state, action)
                if broken is not None:
                    self._found(broken, state)
            self._check_state(state)
            return state
        finally:
            self.close()

    def _actions_of(self, schedule: str) -> Iterator[Action]:
        for part in schedule.split():
            text, _, count = part.partition("*")
            name, _, what = text.partition("!")
            digits = what.lstrip("abcdefghijklmnopqrstuvwxyz")
            kind: Any = what[: len(what) - len(digits)] or "run"
            yield from [Action(self.names.index(name), kind, int(digits or 0))] * int(count or 1)

    def _violation(self, law: str, state: State) -> Violation:
        return Violation(law, self.schedule_of(state), "\n".join(self.lines_to(state)))

    def lines_to(self, state: State) -> Iterable[str]:
        """Yield a line for each operation that changes something, and for each note, up to a state."""
        steps = _steps_to(state)
        for (before, action), after in zip(steps, [*(s for s, _ in steps[1:]), state], strict=True):
            name, node = self.names[action.writer], before.nodes[action.writer]
            operation = node.operation
            assert operation is not None
            if action.what != "run":
                yield f"  {name} {operation}  [{action.what} {action.lag or ''}]"
            elif not operation.is_read or operation.path == "":
                yield f"  {name} {operation}"
            for note in after.nodes[action.writer].notes[len(node.notes) :]:
                yield f"  {name}     ---- {' '.join(map(str, note))}"


def _steps_to(state: State) -> list[tuple[State, Action]]:
    steps = []
    while state.trace is not None:
        steps.append(state.trace)
        state = state.trace[0]
    return steps[::-1]
