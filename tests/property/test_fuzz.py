"""Files that another program, or a broken disk, has changed: only this library's errors, in bounded time and memory.

Plain seeded loops, so that a hundred thousand files take a minute. Set ``CHECKPOINTER_FUZZ_SEED`` to look elsewhere.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, TypeVar

import attrs
import pytest
from support.factories import record
from support.plain_format import PlainFormat
from support.sampling import instants

from checkpointer import CheckpointerError, CheckpointManager, EverySteps, HMACKey, KeepLast, Policy
from checkpointer.clock import SystemClock
from checkpointer.commit import aliases
from checkpointer.commit.created import created
from checkpointer.commit.directory import Directory
from checkpointer.commit.index import INDEX, load, record_path, save
from checkpointer.commit.journal import Journal
from checkpointer.commit.signing import signed
from checkpointer.errors import AliasInUseError, PolicyError, RecordError
from checkpointer.policy.naming import Naming
from checkpointer.policy.retention import Budget, KeepBest, KeepEvery
from checkpointer.policy.triggers import AnyOf, AtSteps, EverySeconds
from checkpointer.records.codec import to_json
from checkpointer.records.record import Entry
from checkpointer.storage import MemoryStorage
from checkpointer.storage.digests import digest_of
from checkpointer.storage.owner import new_owner

T = TypeVar("T")

SEED: Final = int(os.environ.get("CHECKPOINTER_FUZZ_SEED", "0"))
SECONDS_PER_FILE: Final = 10
BYTES_PER_FILE: Final = 64 << 20
KEY: Final = HMACKey(b"0123456789abcdef0123456789abcdef")
POLICY: Final = Policy(EverySteps(1), [KeepLast(3)], last="copy")
OWNER: Final = new_owner()

# Making files

VALUES: Final[list[Any]] = [
    *(None, True, False, -1, 0, 1, 2**31, 2**53, 2**63 - 1, 2**63, 10**400, 10**4000, 0.5, -0.0, 1e308),
    *("", "nan", "inf", "-inf", "x", "\ud800", "\udfff\ud800", "\0", "\u202e", "é" * 300, "a" * 5000, "9" * 5000),
    *("..", "../x", "/etc/passwd", "C:x", "a\\b", ".checkpointer/records/a", "last.ckpt", "s1", "a/" * 2000),
    *("pending", "committed", "retired", "rescue", "weights", "torch", "xxh3-128:0", "sha256:" + "0" * 64, "md5:00"),
    *([], {}, [[]], [1, 2], [[1, 2]], [[1, 10**400]], [[True, -1]], {"a": {}}, {"": 1}, {"\ud800": 1}),
    *({"a": 10**400}, {"a": "nan"}, {"a" * 2000: 1.0}, [[[[[[[[[[]]]]]]]]]], [0] * 3000),
    *(OWNER, OWNER.rpartition("~")[0], OWNER.replace(f"~{os.getpid()}~", "~\u00b2~"), "~~~", "~" * 3000),
]
TOKENS: Final = [
    *(b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b"-", b"[" * 3000, b'{"a":' * 2000, b'"', b"\\", b"\\ud800", b"\0"),
    *(b"\xff", b"\xed\xa0\x80", b"{}", b"[]", b",", b":", b"null", b"\n", b" " * 3000, b"/*", b'"schema": 99,'),
    *(b"&a ", b"*a", b"<<: *a", b"!!int ''", b"!!python/object:os.system ", b"0x" + b"f" * 5000, b"2001-99-99", b"- "),
    *(b"? ", b"| ", b"{step:99999999d}", b"{loss.__class__}", b"{0[0]}", b"1:59:59", b"!!binary x", b"!!set {a}", b"%"),
]


def mutated_bytes(data: bytes, rng: random.Random) -> bytes:
    """Flip, cut, repeat, or put in what parsers stumble over."""
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        at = rng.randrange(len(data) + 1)
        to = min(len(data), at + rng.choice((0, 1, 1, 8, 100)))
        match rng.randrange(5):
            case 0:
                data = data[:at]
            case 1:
                data = data[:at] + data[to:]
            case 2:
                data = data[:to] + data[at:to] * rng.choice((1, 2, 50)) + data[to:]
            case 3:
                data = data[:at] + rng.choice(TOKENS) + data[to:]
            case _:
                data = data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
    return data


def mutated_json(data: bytes, rng: random.Random) -> bytes:
    """Change one value or key somewhere in it, or give a key twice."""
    whole = json.loads(data)
    places = [place for place in _places(whole) if place[0]]
    for _ in range(rng.choice((1, 1, 1, 3))):
        holder, key = rng.choice(places)
        match rng.randrange(4):
            case 0 if isinstance(holder, dict):
                holder.pop(key, None)
            case 1 if isinstance(holder, dict):
                holder[str(rng.choice(VALUES))[:5000]] = rng.choice(VALUES)
            case _ if isinstance(holder, dict) or key < len(holder):
                holder[key] = rng.choice(VALUES)
    text = json.dumps(whole, indent=rng.choice((None, 1))).encode()
    if rng.randrange(10) == 0 and text.startswith(b"{") and len(text) > 2:
        text = b'{"schema": 1, ' + text[1:]
    return text


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


def fuzzed(valid: bytes, rng: random.Random, *, is_json: bool = True) -> bytes:
    """Return another file like this one, or nothing like it."""
    kind = rng.randrange(20)
    if kind == 0:
        return rng.randbytes(rng.choice((0, 1, 10, 1000)))
    if kind == 1:
        return b"".join(rng.choices(TOKENS, k=rng.randrange(1, 20)))
    if kind < 12 and is_json:
        return mutated_json(valid, rng)
    return mutated_bytes(valid, rng)


# What is fuzzed: each takes a source of chance, makes a file, reads it, and asserts what must hold

ENTRIES: Final = [
    Entry(record=record(step=3, metrics={"loss": 0.5, "größe": float("nan")}, line=((1, 2), (3, 4)))),
    Entry(record=record(step=2), previous=record("s2", step=1), status="pending", owner=OWNER),
    Entry(record=record("a/b.ckpt", digest="sha256:" + "a" * 64), status="retired", owner=OWNER),
]
POLICIES: Final = [
    Policy(EverySteps(10, after=5), [KeepBest(3, "val/loss", mode="min"), KeepLast(2)], name="{epoch}-{step:03d}"),
    Policy(AnyOf(EverySeconds(60), AtSteps(1, 2, 3)), [KeepEvery(steps=5), Budget(bytes=10)], last="link"),
    Policy(EverySteps(1), [KeepLast(1)], name=Naming("{loss:.3f}", auto_insert=False, join="_", first_version=0)),
]


def or_refused(read: Callable[[], T], error: type[CheckpointerError]) -> T | None:
    """Return what was read, or None if it was refused with a short message; any other error escapes."""
    try:
        return read()
    except error as refusal:
        text = str(refusal)
    assert 0 < len(text) < 20_000
    return None


def read_record(rng: random.Random) -> None:
    """A record is refused, or says what can be written and read again."""
    data = fuzzed(rng.choice(ENTRIES).to_json(), rng)
    entry = or_refused(lambda: Entry.from_json(data, "f"), RecordError)
    assert entry is None or entry == Entry.from_json(entry.to_json(), "f")


def _trusted(*, payloads: bool = False) -> tuple[MemoryStorage, dict[str, Any]]:
    storage = MemoryStorage()
    truth = {}
    for step in (1, 2):
        name = f"epoch=0-step={step}.ckpt"
        data = json.dumps({"step": step}).encode()
        storage.write(name, data)
        _, digest = digest_of(storage, name, "sha256") or (0, "")
        entry = Entry(record=record(name, step=step, size=len(data), digest=digest, format="plain"))
        storage.write(record_path(name), to_json(signed(entry.to_dict(), KEY)))
        truth[record_path(name)] = entry
    return storage, truth


def read_signed_record(rng: random.Random) -> None:
    """With a key a changed record is either what was signed, or damaged; the others stand."""
    storage, truth = _trusted()
    path = rng.choice(list(truth))
    storage.write(path, fuzzed(storage._files[path], rng))
    listing = load(storage, KEY)
    assert truth.keys() == listing.entries.keys() | listing.damaged.keys()
    assert {path} >= listing.damaged.keys()
    for path, entry in listing.entries.items():
        assert truth[path] == attrs.evolve(entry, signature="")


def read_index(rng: random.Random) -> None:
    """A changed index makes no error; with a key it also makes no difference."""
    storage, truth = _trusted()
    save(storage, load(storage, KEY))
    storage.write(INDEX, fuzzed(storage._files[INDEX], rng))
    assert truth == {path: attrs.evolve(entry, signature="") for path, entry in load(storage, KEY).entries.items()}
    assert truth.keys() == load(storage).entries.keys()


def read_policy(rng: random.Random) -> None:
    """A policy is refused, or can be printed and written again."""
    data = fuzzed(rng.choice(POLICIES).to_yaml().encode(), rng, is_json=False)
    policy = or_refused(lambda: Policy.from_yaml(data.decode(errors="surrogateescape") + "\n"), PolicyError)
    assert policy is None or str(policy)
    assert policy is None or policy == Policy.from_yaml(policy.to_yaml())


def read_marker(rng: random.Random) -> None:
    """An alias marker and the directory's start time: believed as far as they can be, and never an error."""
    storage = MemoryStorage()
    marker = {"schema": 1, "alias": "last.ckpt", "label": "", "owner": OWNER}
    storage.write(".checkpointer/aliases/last.ckpt.json", fuzzed(json.dumps(marker).encode(), rng))
    storage.write(".checkpointer/directory.json", fuzzed(b'{"schema": 1, "created": 1700000000.5}', rng))
    journal = Journal(storage, new_owner())
    aliases.read_marker(journal, "last.ckpt")
    try:
        aliases.claim(journal, "last.ckpt", "", marks=True)
    except AliasInUseError:
        assert OWNER == aliases.read_marker(journal, "last.ckpt")["owner"]
    aliases.release(Journal(storage, OWNER), ["last.ckpt"])
    directory = Directory(storage, OWNER, POLICY, run=None, label="", writes=False)
    assert abs(created(directory, SystemClock())) < float("inf")


def use_directory(rng: random.Random) -> None:
    """A manager opens, restores and saves among changed files, or raises its own error that says why not."""
    storage, truth = _trusted()
    save(storage, load(storage))
    trust = rng.choice((None, KEY))
    for path in rng.sample(sorted(storage.list()), rng.randrange(1, 4)):
        storage.write(path, fuzzed(storage._files[path], rng, is_json=path.endswith(".json")))
    or_refused(lambda: _use(storage, trust, truth), CheckpointerError)


def _use(storage: MemoryStorage, trust: HMACKey | None, truth: Mapping[str, Entry]) -> None:
    with CheckpointManager(
        storage, POLICY, state=lambda: {"step": 3}, format=PlainFormat(), trust=trust, run="run-a"
    ) as manager:
        restored = manager.restore()
        if trust is not None and restored is not None:
            assert restored.record in [entry.record for entry in truth.values()]
            assert {"step": restored.step} == restored.state
        if manager.observe({"loss": 1.0}, step=1 << 40, epoch=0, epoch_end=False):
            again = manager.restore(1 << 40)
            assert again is not None
            assert {"step": 3} == again.state


SHARES: Final[dict[Callable[[random.Random], None], float]] = {
    read_record: 0.63,
    read_signed_record: 0.12,
    read_index: 0.1,
    read_policy: 0.03,
    read_marker: 0.1,
    use_directory: 0.02,
}


def run(read: Callable[[random.Random], None], numbers: range, after_each: Callable[[str], None]) -> None:
    """Read these files of one kind; none may take longer than the bound."""

    def give_up(*_: object) -> None:
        msg = f"one file took more than {SECONDS_PER_FILE} s"
        raise TimeoutError(msg)

    before = signal.signal(signal.SIGALRM, give_up)
    try:
        for number in numbers:
            seed = f"{SEED}-{read.__name__}-{number}"
            signal.setitimer(signal.ITIMER_REAL, SECONDS_PER_FILE)
            try:
                read(random.Random(seed))
            except BaseException as error:
                msg = f"{read.__name__}(random.Random({seed!r})) fails"
                raise AssertionError(msg) from error
            after_each(seed)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_the_shares_are_everything() -> None:
    """So that the numbers below are the numbers of files."""
    assert 100_000 == sum(round(100_000 * share) for share in SHARES.values())


@pytest.mark.filterwarnings("ignore::checkpointer.CheckpointerWarning")
@pytest.mark.parametrize("read", SHARES, ids=lambda read: read.__name__)
def test_two_thousand_fuzzed_files(read: Callable[[random.Random], None]) -> None:
    """The first of each kind, in every run of the tests; each one's memory is traced."""

    def check(seed: str) -> None:
        assert tracemalloc.get_traced_memory()[1] < BYTES_PER_FILE, seed
        tracemalloc.reset_peak()

    tracemalloc.start()
    try:
        run(read, range(round(2000 * SHARES[read])), check)
    finally:
        tracemalloc.stop()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::checkpointer.CheckpointerWarning")
@pytest.mark.parametrize("read", SHARES, ids=lambda read: read.__name__)
def test_a_hundred_thousand_fuzzed_files(read: Callable[[random.Random], None]) -> None:
    """All of them; the process's largest size is looked at, since tracing would take longer than reading."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run(read, instants(round(100_000 * SHARES[read])), lambda _: None)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 4 * BYTES_PER_FILE
