"""Planted files in the storage: none of them runs, leaves the directory, or makes a command hang."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.factories import record
from support.plain_format import PlainFormat

from checkpointer import (
    CheckpointerWarning,
    CheckpointManager,
    EveryEpochs,
    EverySteps,
    HMACKey,
    KeepAll,
    KeepBest,
    KeepLast,
    Policy,
)
from checkpointer.clock import SystemClock
from checkpointer.commit.created import created
from checkpointer.commit.directory import Directory
from checkpointer.commit.index import load, record_path
from checkpointer.errors import (
    NamingError,
    NotFoundError,
    NoValidCheckpointError,
    PolicyError,
    RecordError,
    SaveError,
    StorageError,
    UnsafePayloadError,
)
from checkpointer.records.codec import MAX_DEPTH, MAX_RECORD_BYTES, parse_json
from checkpointer.records.names import check_name
from checkpointer.records.record import MAX_WRITTEN_BYTES, Entry, Record, check_readable
from checkpointer.restore.load import verify
from checkpointer.storage import LocalStorage
from checkpointer.storage.digests import digest_of
from checkpointer.storage.owner import is_dead, is_live, new_owner, release

ALL = Policy(EverySteps(1), [KeepAll()])
KEY = HMACKey(b"0123456789abcdef0123456789abcdef")


@pytest.fixture(autouse=True)
def _bounded_time() -> Iterator[None]:
    """No test here may hang: an attack on time must fail, not stop the suite."""

    def give_up(*_: object) -> None:
        msg = "it took more than 60 s"
        raise TimeoutError(msg)

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, 60)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def plain(directory: Any, policy: Policy = ALL, state: Any = dict, **kw: Any) -> CheckpointManager:
    """A manager that writes."""
    return CheckpointManager(directory, policy, state=state, format=PlainFormat(), **kw)


def plant(folder: Path, name: str, data: bytes, **kw: Any) -> Record:
    """Put a payload with a record that agrees with it, as an attacker without the key can."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    found = digest_of(LocalStorage(path.parent, new_owner()), path.name, "sha256")
    assert found is not None
    made = record(name, **({"size": found[0], "digest": found[1]} | kw))
    target = folder / record_path(name)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(Entry(record=made).to_json())
    return made


# Nothing is executed


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def bomb(folder: Path) -> bytes:
    """A torch file that runs code when it is loaded without care."""
    path = folder / "bomb"
    torch.save({"w": torch.ones(1), "bomb": Bomb(folder / "pwned")}, path)
    data = path.read_bytes()
    torch.load(path, weights_only=False)
    (folder / "pwned").rmdir()  # It works.
    return data


def test_a_planted_pickle_runs_neither_when_listed_nor_verified_nor_restored(tmp_path: Path) -> None:
    """Without a key a planted record is believed, and still its payload is data."""
    made = plant(tmp_path / "run", "evil.ckpt", bomb(tmp_path))
    with CheckpointManager(tmp_path / "run", ALL) as manager:
        assert [made] == list(manager.records)
        verify(LocalStorage(tmp_path / "run", new_owner()), made)
        with pytest.raises(UnsafePayloadError, match=r"posix\.mkdir, which a safe load refuses"):
            manager.restore()
    assert not (tmp_path / "pwned").exists()


def test_with_a_key_a_planted_checkpoint_is_not_even_opened(tmp_path: Path) -> None:
    """Its record is refused first, also when the user would unpickle anything."""
    plant(tmp_path / "run", "evil.ckpt", bomb(tmp_path))
    with CheckpointManager(tmp_path / "run", ALL, trust=KEY) as manager:
        assert () == manager.records
        with pytest.raises(NoValidCheckpointError, match=r"evil\.ckpt\.json is not signed"):
            manager.restore(weights_only=False)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("which", ["last", "last.ckpt", "best", "best.ckpt"])
def test_a_planted_alias_file_is_never_opened(tmp_path: Path, which: str) -> None:
    """Aliases are for other readers: ``restore("last")`` goes by the records, and a planted file's name finds none."""
    policy = Policy(EveryEpochs(1), [KeepBest(1, "loss", mode="min")], last="copy", best="copy")
    run = tmp_path / "run"
    with CheckpointManager(run, policy, state=lambda: {"w": torch.ones(1)}, trust=KEY) as manager:
        manager.observe({"loss": 1.0}, step=1, epoch=0)
    for alias in ("last.ckpt", "best.ckpt"):
        (run / alias).unlink()
        (run / alias).write_bytes(bomb(tmp_path))
    with CheckpointManager(run, policy, trust=KEY) as manager:
        if which.endswith(".ckpt"):
            with pytest.raises(NotFoundError, match=f"no checkpoint '{which}'"):
                manager.restore(which, weights_only=False)
        else:
            restored = manager.restore(which, weights_only=False)
            assert restored is not None
            assert "epoch=0-step=1.ckpt" == restored.record.name
    assert not (tmp_path / "pwned").exists()


# Bounds on data


DEEP = b'{"a":' * 20 + b"1" + b"}" * 20


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b" " * (MAX_RECORD_BYTES + 1), "at most 1048576 are read"),
        (DEEP, f"more than {MAX_DEPTH} deep"),
        (b"[" * 30 + b"]" * 30, f"more than {MAX_DEPTH} deep"),
        (b"[" * 500_000, "not valid JSON"),
        (b'{"a": 1, "a": 2}', "the key 'a' stands there twice"),
        (b'{"a": {"b": 1, "b": 1}}', "the key 'b' stands there twice"),
        (b'{"a": NaN}', "NaN is not a number"),
        (b'{"a": -Infinity}', "-Infinity is not a number"),
        (b"1" * 5000, "not valid JSON"),
        (b"\xff\xfe{", "not valid JSON"),
        (b'"\xed\xa0\x80', "not valid JSON"),
    ],
)
def test_json_is_bounded_and_says_one_thing(data: bytes, message: str) -> None:
    """Size, depth, keys that stand there twice, numbers that are none."""
    with pytest.raises(RecordError, match=f"f(:| is| has).*{message}"):
        parse_json(data, "f")


@pytest.mark.parametrize("innermost", [b"", b"1"])
def test_json_may_be_as_deep_as_the_bound(innermost: bytes) -> None:
    """The bound itself is allowed, whether or not the innermost list has a value."""
    parse_json(b"[" * MAX_DEPTH + innermost + b"]" * MAX_DEPTH, "f")
    with pytest.raises(RecordError, match=f"more than {MAX_DEPTH} deep"):
        parse_json(b"[" * (MAX_DEPTH + 1) + innermost + b"]" * (MAX_DEPTH + 1), "f")


@pytest.mark.parametrize("field", ["step", "epoch", "size", "serial"])
@pytest.mark.parametrize("value", [1 << 63, 10**4000])
def test_huge_numbers_are_refused(field: str, value: int) -> None:
    """Python reads numbers with thousands of digits, and then will not print them."""
    with pytest.raises(RecordError, match=f"'{field}' is .*; expected a whole number"):
        Record.from_dict(record().to_dict() | {field: value}, "f")


def test_a_key_that_stands_twice_among_many_is_found_at_once() -> None:
    """In a megabyte of JSON and in a large policy: to count each name would take an hour."""
    names = [f"{n:x}" for n in range(70_000)]
    text = ", ".join(f'"{name}": 0' for name in (*names, names[-1]))
    with pytest.raises(RecordError, match="the key '1116f' stands there twice"):
        parse_json(f"{{{text}}}".encode(), "f")
    lines = "".join(f"k{n}: 0\n" for n in (*range(22_000), 21_999))
    with pytest.raises(PolicyError, match="the key 'k21999' stands in one mapping twice"):
        Policy.from_yaml(lines)


def test_a_message_about_hostile_data_is_short() -> None:
    """Lists that share lists, long texts and huge numbers do not fill a log."""
    laugh: Any = "ha"
    for _ in range(60):
        laugh = [laugh] * 9
    for value in (laugh, "x" * 10**6, 16**10_000, {"a" * 10**6: laugh}):
        with pytest.raises(RecordError) as caught:
            Record.from_dict(record().to_dict() | {"step": value, "metrics": value}, "f")
        assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "a: &a [x, x, x, x, x, x, x, x, x]\n"
            + "".join(
                f"{chr(98 + i)}: &{chr(98 + i)} [" + ", ".join([f"*{chr(97 + i)}"] * 9) + "]\n" for i in range(20)
            ),
            "stands for more than 50000 values",
        ),
        (
            "a: &a {x: 1}\n"
            + "".join(
                f"{chr(98 + i)}: &{chr(98 + i)}\n  <<: [" + ", ".join([f"*{chr(97 + i)}"] * 9) + "]\n"
                for i in range(20)
            ),
            "stands for more than 50000 values",
        ),
        ("when: " + "[" * 100 + "]" * 100 + "\n", "nested too deeply"),
        ("when: " + "[" * 100_000 + "\n", "not valid YAML"),
        ("x" * (1 << 19) + "\n", "more than 262144 bytes"),
        ("when: x\nwhen: y\n", "the key 'when' stands in one mapping twice"),
        ("when: " + "9" * 900 + "\nkeep: " + "9" * 2000 + "\n", "a text of 2000 characters"),
        ("when: 2001-99-99\n", "not valid YAML"),
        ("when: !!int ''\n", "not valid YAML"),
        ("when: !!timestamp 'x'\n", "not valid YAML"),
        ("when: {EverySteps: {n: 1}}\nkeep: [KeepAll]\nname: '{step:999999999d}'\n", "ask for fewer"),
        ("when: {EverySteps: {n: 1}}\nkeep: [KeepAll]\nname: '{loss:.999999999f}'\n", "ask for fewer"),
    ],
    ids=[
        "laughs",
        "merged laughs",
        "deep",
        "deeper",
        "large",
        "twice",
        "digits",
        "month",
        "int",
        "time",
        "wide",
        "fine",
    ],
)
def test_policies_are_bounded(text: str, message: str) -> None:
    """A file of a few kilobytes does not take all the memory or time."""
    with pytest.raises(PolicyError, match=message):
        Policy.from_yaml(text)


@pytest.mark.parametrize(
    "data", [b"", b"[", b"[]", b'{"created": 1e400}', b'{"created": true}', b'{"created": ' + b"9" * 400 + b"}", DEEP]
)
def test_a_hostile_start_time_is_not_believed(tmp_path: Path, data: bytes) -> None:
    """Whatever stands in directory.json, the time trigger counts from now."""
    clock = SystemClock()
    (tmp_path / ".checkpointer").mkdir()
    (tmp_path / ".checkpointer/directory.json").write_bytes(data)
    storage = LocalStorage(tmp_path, new_owner())
    directory = Directory(storage, new_owner(), ALL, run=None, label="", writes=False)
    assert created(directory, clock) > 1e9
    assert created(directory, clock) < 1e12


@pytest.mark.parametrize("data", [b"", b"[1]", b"{" * 10_000, b'{"owner": 3}', b'{"owner": "a~\xc2\xb2~c~d"}', DEEP])
def test_a_hostile_alias_marker_marks_nothing_or_harms_nothing(tmp_path: Path, data: bytes) -> None:
    """A manager opens and saves with any marker."""
    (tmp_path / ".checkpointer/aliases").mkdir(parents=True)
    (tmp_path / ".checkpointer/aliases/last.ckpt.json").write_bytes(data)
    with plain(tmp_path, Policy(EverySteps(1), [KeepLast(1)], last="link")) as manager:
        assert manager.observe({}, step=1, epoch=0)


def test_an_owner_id_of_odd_digits_is_no_process() -> None:
    """Characters that count as digits but make no number, and numbers of five thousand digits."""
    host = new_owner().split("~")[0]
    for pid in ("²", "٣", "9" * 5000, "-1", "", "1e3"):
        owner = f"{host}~{pid}~1~x"
        assert not is_live(owner)
        assert not is_dead(owner)


def test_a_planted_index_is_read_up_to_what_its_records_can_fill(tmp_path: Path) -> None:
    """A gigabyte of index beside two records is not read."""
    with plain(tmp_path) as manager:
        manager.observe({}, step=1, epoch=0, epoch_end=False)
    index = tmp_path / ".checkpointer/index.json"
    padded = index.read_bytes() + b" " * 100_000
    assert 0 == load(LocalStorage(tmp_path, new_owner())).reads
    index.write_bytes(padded)
    assert 1 == load(LocalStorage(tmp_path, new_owner())).reads
    os.truncate(index, 1 << 40)
    assert 1 == load(LocalStorage(tmp_path, new_owner())).reads


# What we write can be read again


@pytest.mark.parametrize("trust", [None, KEY], ids=["plain", "signed"])
def test_a_record_that_could_not_be_read_again_is_not_written(tmp_path: Path, trust: HMACKey | None) -> None:
    """Metrics with megabytes of names: refused before the payload is written, and the next save works."""
    with plain(tmp_path, trust=trust, state=lambda: {"x": 1}) as manager:
        with pytest.raises(
            SaveError, match=r"was not saved: its record would have \d+ bytes.*report fewer, or shorter"
        ):
            manager.observe({"m" * 500_000: 1.0}, step=1, epoch=0, epoch_end=False)
        assert [] == list(tmp_path.rglob("*.ckpt*"))
        assert manager.observe({}, step=2, epoch=0, epoch_end=False)
        with pytest.raises(SaveError, match="report fewer, or shorter"):
            manager.observe({f"{i:0100}": 1.0 for i in range(5000)}, step=2, epoch=0, epoch_end=False)
    with plain(tmp_path, trust=trust) as manager:
        assert [2] == [r.step for r in manager.records]


def test_the_largest_record_that_is_written_is_read_again(tmp_path: Path) -> None:
    """In every state: pending over one as large, and retired."""
    size = len(Entry(record=record("last.ckpt", token="0" * 32, digest="sha256:" + "0" * 64)).to_json())
    large = {"m" * (MAX_WRITTEN_BYTES - size - 400): 1.0}
    made = record("last.ckpt", digest="sha256:" + "0" * 64, metrics=large)
    check_readable(made)
    for entry in (
        Entry(record=made, previous=made, status="pending", owner=new_owner(), signature=KEY.sign(b"")),
        Entry(record=made, status="retired", owner=new_owner(), signature=KEY.sign(b"")),
    ):
        assert entry == Entry.from_json(entry.to_json(), "f")


def test_a_rescue_is_not_lost_to_the_text_of_its_exception(tmp_path: Path) -> None:
    """Megabytes of text, and characters that cannot be encoded: the record keeps the beginning."""
    with plain(tmp_path) as manager:
        manager.observe({}, step=1, epoch=0, epoch_end=False)
        manager.rescue("kaboom \ud800" + "x" * 3_000_000, step=2)
    with plain(tmp_path) as manager:
        rescued = manager.last
        assert rescued is not None
        assert "kaboom \\ud800xxx" in rescued.reason
        assert 2000 == len(rescued.reason)


def test_a_serial_at_the_end_of_its_range_is_said_not_lost(tmp_path: Path) -> None:
    """A planted record with the highest serial leaves none for ours: an error, not a record that is never read."""
    plant(tmp_path, "a.ckpt", b"{}", serial=(1 << 63) - 1, format="plain")
    with plain(tmp_path) as manager:
        manager.restore()
        with pytest.raises(SaveError, match=r"could not be read again .*'serial'"):
            manager.observe({}, step=5, epoch=0, epoch_end=False)


# Names cannot leave the directory

OUTSIDE = [
    "..",
    "../x",
    "a/../../x",
    "a/..",
    "/etc/passwd",
    "//server/share",
    "C:x",
    "c:/x",
    "..\\x",
    "a\\..\\x",
    "a\0b",
    "",
    ".",
    "a//b",
    "a/./b",
    ".. /x",
    "... /x",
    "a/.. ./x",
    " /x",
    ".checkpointer",
    ".checkpointer/records/x",
    ".Checkpointer/index.json",
    ".CHECKPOINTER/x",
    ".checkpointer./x",
    ".checkpointer /x",
    ".check\u200cpointer/x",
    "\uff0echeckpointer/x",
    ".\uff43heckpointer/x",
    ".chec\u212apointer/x",
    "x" * 256,
    "ä" * 128,
    "a/" * 600 + "b",
    "\ud800",
]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_name_that_some_system_takes_elsewhere_is_refused(name: str) -> None:
    """Above, absolute, another drive, our own folder in any spelling, or too long: not read and not written."""
    with pytest.raises(RecordError, match="'name' is"):
        Record.from_dict(record().to_dict() | {"name": name}, "f")
    with pytest.raises(NamingError):
        check_name(name)


@pytest.mark.parametrize(
    "name", ["a", "a/b", "...a", ".hidden", "größe: 1", "a b", "x" * 250, "checkpointer/x", "a.ckpt."]
)
def test_an_odd_name_within_the_directory_is_fine(name: str) -> None:
    """An unusual name is not hostile."""
    assert name == Record.from_dict(record().to_dict() | {"name": name}, "f").name
    assert name == check_name(name)


@pytest.mark.filterwarnings("ignore::checkpointer.errors.CheckpointerWarning")
@pytest.mark.parametrize("save", [True, False], ids=["writer", "reader"])
@pytest.mark.parametrize("status", ["pending", "retired"])
def test_a_half_way_record_through_a_link_deletes_nothing_outside(tmp_path: Path, status: Any, save: bool) -> None:
    """A dead writer's record whose name leads through a linked folder: what lies there stays."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "x").write_bytes(b"precious")
    run = tmp_path / "run"
    run.mkdir()
    (run / "link").symlink_to(outside)
    owner = new_owner()
    release(owner)
    found = digest_of(LocalStorage(outside, new_owner()), "x", "sha256")
    assert found is not None
    planted = Entry(record=record("link/x", size=found[0], digest=found[1]), status=status, owner=owner)
    path = run / record_path("link/x")
    path.parent.mkdir(parents=True)
    path.write_bytes(planted.to_json())
    with plain(run, state=dict if save else None) as manager:
        if save:
            manager.observe({}, step=1, epoch=0)
    assert b"precious" == (outside / "x").read_bytes()


CHANGES: dict[str, Callable[[LocalStorage], Any]] = {
    "delete": lambda storage: storage.delete("link/x"),
    "write": lambda storage: storage.write("link/x", b"ours"),
    "upload": lambda storage: storage.upload("link/x"),
    "stage": lambda storage: storage.stage("link/x"),
    "symlink": lambda storage: storage.symlink("a", "link/x"),
    "hardlink": lambda storage: storage.hardlink("a", "link/x"),
    "deep": lambda storage: storage.delete("link/deeper/x"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_nothing_is_changed_through_a_linked_folder(tmp_path: Path, change: Callable[[LocalStorage], Any]) -> None:
    """A planted link in the directory does not redirect our writes and deletes."""
    outside = tmp_path / "outside"
    (outside / "deeper").mkdir(parents=True)
    for name in ("x", "deeper/x"):
        (outside / name).write_bytes(b"precious")
    storage = LocalStorage(tmp_path / "run", new_owner())
    storage.write("a", b"a")
    (tmp_path / "run/link").symlink_to(outside)
    with pytest.raises(StorageError, match=r"run/link is a symbolic link.*put a real folder in its place"):
        change(storage)
    for name in ("x", "deeper/x"):
        assert b"precious" == (outside / name).read_bytes()
    storage.delete("link")
    assert (outside / "x").exists()


def test_a_directory_that_is_itself_a_link_is_fine(tmp_path: Path) -> None:
    """The user who names the directory knows where the link leads."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to("disk")
    with plain(tmp_path / "run") as manager:
        assert manager.observe({}, step=1, epoch=0, epoch_end=False)
    assert (tmp_path / "disk/epoch=0-step=1.ckpt").exists()


@pytest.mark.parametrize("link", [".checkpointer", ".checkpointer/staging"])
def test_sweeping_goes_through_no_link(tmp_path: Path, link: str) -> None:
    """Old folders elsewhere are not what a dead writer left."""
    outside = tmp_path / "outside"
    old = outside / ("staging/data" if link == ".checkpointer" else "data")
    old.mkdir(parents=True)
    (old / "precious").write_bytes(b"")
    os.utime(old, (0, 0))
    run = tmp_path / "run"
    (run / link).parent.mkdir(parents=True)
    (run / link).symlink_to(outside)
    storage = LocalStorage(run, new_owner())
    assert 0 == storage.sweep()
    with pytest.raises(StorageError, match="symbolic link"):
        storage.write("a", b"")
    assert (old / "precious").exists()


# Pipes, devices and links in a circle


@pytest.mark.parametrize("kind", ["pipe", "loop", "dangling", "device"])
@pytest.mark.parametrize(
    "where", [record_path("a.ckpt"), ".checkpointer/index.json", ".checkpointer/aliases/last.ckpt.json"]
)
def test_what_is_no_file_neither_hangs_nor_stops_the_manager(tmp_path: Path, kind: str, where: str) -> None:
    """A pipe without a writer, links that lead nowhere, an endless device: as if nothing was there."""
    path = tmp_path / where
    path.parent.mkdir(parents=True)
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to({"loop": path.name, "dangling": "nowhere", "device": "/dev/zero"}[kind])
    with plain(tmp_path, Policy(EverySteps(1), [KeepLast(1)], last="link")) as manager:
        assert manager.restore() is None
        assert manager.observe({}, step=1, epoch=0, epoch_end=False)


def test_a_folder_payload_with_undecodable_names_is_corrupt_not_a_crash(tmp_path: Path) -> None:
    """Names that are not text are digested as bytes."""
    plant(tmp_path, "a.ckpt", b"{}")
    (tmp_path / "a.ckpt").unlink()
    (tmp_path / "a.ckpt").mkdir()
    with open(os.fsencode(tmp_path / "a.ckpt") + b"/\xff", "wb") as stream:
        stream.write(b"{}")
    with plain(tmp_path) as manager, pytest.raises(NoValidCheckpointError, match="has other bytes than were written"):
        manager.restore()


def test_an_unreadable_slot_record_moves_the_alias_on(tmp_path: Path) -> None:
    """Garbage as the record of ``last.ckpt`` does not fail every later save."""
    policy = Policy(EverySteps(1), [], last="copy")
    with plain(tmp_path, policy) as manager:
        manager.observe({}, step=1, epoch=0, epoch_end=False)
    (tmp_path / record_path("last.ckpt")).write_bytes(b"garbage")
    with pytest.warns(CheckpointerWarning, match=r"the alias is last-v1\.ckpt instead"):
        manager = plain(tmp_path, policy)
    assert manager.observe({}, step=2, epoch=0, epoch_end=False)
    manager.close()
    assert b"garbage" == (tmp_path / record_path("last.ckpt")).read_bytes()


def test_every_promise_of_the_security_page_has_its_test() -> None:
    """Each test that docs/security.md names is there, in the file that it links to."""
    page = Path(__file__).parents[2] / "docs/security.md"
    promises = re.findall(r"\[`(test_\w+)`\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
    assert len(promises) > 20
    assert [] == [
        name for name, link in promises if f"def {name}(" not in (page.parent / link).read_text(encoding="utf-8")
    ]
