"""With a key, a record without its signature is not restored, ranked or touched."""

from __future__ import annotations

import copy
import io
import json
import pickle
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, cast

import attrs
import pytest
import torch
from support.factories import record
from support.plain_format import PlainFormat
from torch.distributed.checkpoint.state_dict_saver import save

from checkpointer import CheckpointerWarning, CheckpointManager, EverySteps, HMACKey, KeepAll, KeepBest, Policy
from checkpointer.commit.index import load
from checkpointer.commit.journal import Journal
from checkpointer.commit.recovery import finish_run, recover
from checkpointer.commit.signing import check_signature, signed
from checkpointer.errors import (
    CorruptError,
    NoValidCheckpointError,
    PolicyError,
    RecordError,
    RestoreError,
    SaveError,
    UntrustedError,
)
from checkpointer.formats.dcp_folder import DcpFormat
from checkpointer.formats.export import write_weights
from checkpointer.formats.inspection.tensors import TensorInfo
from checkpointer.records.codec import to_json
from checkpointer.records.record import Entry, Record
from checkpointer.restore.load import load as load_checkpoint
from checkpointer.restore.verified import open_verified
from checkpointer.storage import LocalStorage
from checkpointer.storage.digests import digest_of
from checkpointer.storage.memory import MemoryStorage
from checkpointer.storage.owner import new_owner, release
from checkpointer.tools.catalog import look_at

SECRET = b"0123456789abcdef0123456789abcdef"
KEY = HMACKey(SECRET)
OTHER = HMACKey(b"another key of the same length!!")
ALL = Policy(EverySteps(1), [KeepAll(), KeepBest(1, "loss", mode="min")])
FEW = Policy(EverySteps(1), [KeepBest(1, "loss", mode="min")], last="link")

Change = Callable[[dict[str, Any]], Any]


def make(directory: Path, policy: Policy = ALL, trust: HMACKey | None = KEY, **kw: Any) -> CheckpointManager:
    """A manager that writes, with the key unless another is given."""
    return CheckpointManager(
        directory, policy, state=kw.pop("state", dict), format=kw.pop("format", PlainFormat()), trust=trust, **kw
    )


def train(directory: Path, losses: list[float], trust: HMACKey | None = KEY, policy: Policy = ALL) -> None:
    """Save one checkpoint per loss, whose state is its step."""
    box = {"step": 0}
    with make(directory, policy, trust, state=lambda: dict(box)) as manager:
        for box["step"], loss in enumerate(losses, start=1):
            manager.observe({"loss": loss}, step=box["step"], epoch=0, epoch_end=False)


def record_file(directory: Path, step: int) -> Path:
    """Return the path of the record of a step."""
    return directory / f".checkpointer/records/epoch=0-step={step}.ckpt.json"


def change(path: Path, how: Change) -> None:
    """Rewrite a record file after a change to its data."""
    data = json.loads(path.read_bytes())
    how(data)
    path.write_bytes(to_json(data))


def restored_step(directory: Path, trust: HMACKey | None = KEY, which: str | int | None = None) -> int:
    """Restore, and return the step."""
    with CheckpointManager(directory, ALL, format=PlainFormat(), trust=trust) as manager:
        restored = manager.restore(which)
        assert restored is not None
        assert {"step": restored.step} == restored.state
        return restored.step


# The key


def test_a_key_signs_and_verifies() -> None:
    """Only the same key and the same data have the same signature."""
    signature = KEY.sign(b"data")
    assert signature.startswith("hmac-sha256:")
    assert KEY.verify(b"data", signature)
    assert not KEY.verify(b"datA", signature)
    assert not OTHER.verify(b"data", signature)
    assert not KEY.verify(b"data", "größe \ud800")


@pytest.mark.parametrize("show", [repr, str, lambda key: f"{key!r:>30}", lambda key: str({"trust": key})])
def test_a_key_is_never_shown(show: Callable[[HMACKey], object]) -> None:
    """It is not in a printed or formatted text, alone or inside another object."""
    text = str(show(KEY))
    assert SECRET.decode() not in text
    assert SECRET.hex() not in text


@pytest.mark.parametrize("leak", [pickle.dumps, copy.copy, copy.deepcopy], ids=["pickle", "copy", "deepcopy"])
def test_a_key_is_not_pickled(leak: Callable[[HMACKey], object]) -> None:
    """A manager that is sent to a worker process, or a state that holds a key, must not carry it along."""
    with pytest.raises(TypeError, match=r"a key is not pickled or copied; make it again .*HMACKey\.from_env"):
        leak(KEY)


def test_a_key_from_a_file_loses_one_newline(tmp_path: Path) -> None:
    """An editor or echo ends the file with one; anything more belongs to the key."""
    for number, end in enumerate([b"", b"\n", b"\r\n"]):
        path = tmp_path / str(number)
        path.write_bytes(SECRET + end)
        assert KEY.sign(b"x") == HMACKey.from_file(path).sign(b"x")
    path.write_bytes(SECRET + b"\n\n")
    assert KEY.sign(b"x") != HMACKey.from_file(str(path)).sign(b"x")


def test_a_key_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The text of the variable is the key."""
    monkeypatch.setenv("CKPT_KEY", SECRET.decode())
    assert KEY.sign(b"x") == HMACKey.from_env("CKPT_KEY").sign(b"x")


def _short_file(folder: Path) -> HMACKey:
    (folder / "key").write_bytes(b"short\n")
    return HMACKey.from_file(folder / "key")


def _large_file(folder: Path) -> HMACKey:
    (folder / "key").write_bytes(bytes(1 << 17))
    return HMACKey.from_file(folder / "key")


@pytest.mark.parametrize(
    ("make_key", "message"),
    [
        (lambda _: HMACKey(b"hunter2"), r"the key has 7 bytes, .*at least 16 .*secrets\.token_hex\(32\)"),
        (lambda _: HMACKey(cast(Any, "text" * 9)), r"the key is a str; pass bytes, or use HMACKey\.from_env"),
        (lambda _: HMACKey.from_env("NO_SUCH_KEY"), r"variable NO_SUCH_KEY is not set; .*secrets\.token_hex"),
        (lambda folder: HMACKey.from_file(folder / "none"), r"none cannot be read \(No such file"),
        (_short_file, r"the key in .*key has 5 bytes.*token_hex"),
        (_large_file, r"key is larger than 65536 bytes, so it is not a key file"),
    ],
    ids=["short", "text", "unset", "no file", "short file", "large file"],
)
def test_a_bad_key_says_how_to_make_a_good_one(
    make_key: Callable[[Any], HMACKey], message: str, tmp_path: Path
) -> None:
    """The message never holds what was given."""
    with pytest.raises(PolicyError, match=message) as caught:
        make_key(tmp_path)
    assert "hunter2" not in str(caught.value)


def test_a_manager_takes_keys_only() -> None:
    """The bytes themselves would end up in a repr."""
    with pytest.raises(PolicyError, match=r"trust is a bytes; pass HMACKey\.from_env"):
        CheckpointManager(None, trust=SECRET)  # type: ignore[arg-type]


# What is signed


def test_every_record_is_signed_with_the_rest_of_the_entry() -> None:
    """A pending entry with its owner and the record it replaces, as it stands in the file."""
    entry = Entry(record=record(step=2), previous=record(step=1), status="pending", owner="host-1-2")
    data = json.loads(to_json(signed(entry.to_dict(), KEY)))
    check_signature(data, "f", KEY)
    for field in ("schema", "status", "record", "previous", "owner"):
        with pytest.raises(UntrustedError, match="f has a signature that this key did not make"):
            check_signature({key: value for key, value in data.items() if key != field}, "f", KEY)


def test_the_order_and_layout_of_a_file_do_not_matter() -> None:
    """The signature is over the data, not over the bytes that happen to hold it."""
    data = signed(Entry(record=record(metrics={"a": 0.1, "b": float("nan")})).to_dict(), KEY)
    shuffled = json.dumps(dict(reversed(data.items())), indent=7).encode()
    assert Entry.from_json(to_json(data), "f") == Entry.from_json(shuffled, "f")
    check_signature(json.loads(shuffled), "f", KEY)


@pytest.mark.parametrize("depth", [100, 100_000])
def test_deep_data_is_wrong_not_a_crash(depth: int) -> None:
    """Whatever the JSON module gives up on is not signed."""
    deep: Any = []
    for _ in range(depth):
        deep = [deep]
    with pytest.raises(UntrustedError):
        check_signature({"record": deep, "signature": "hmac-sha256:00"}, "f", KEY)


# What is refused

REFUSED: list[tuple[str, Change]] = [
    ("is not signed", lambda data: data.pop("signature")),
    ("is not signed", lambda data: data.update(signature=None)),
    ("has a signature that this key did not make", lambda data: data.update(signature="hmac-sha256:" + "0" * 64)),
    ("has a signature that this key did not make", lambda data: data.update(signature=3)),
    ("has a signature that this key did not make", lambda data: data["record"].update(digest="sha256:" + "0" * 64)),
    ("has a signature that this key did not make", lambda data: data["record"].update(metrics={"loss": 0.0})),
    ("has a signature that this key did not make", lambda data: data["record"].update(step=100)),
    ("has a signature that this key did not make", lambda data: data["record"].update(pinned=True)),
    ("has a signature that this key did not make", lambda data: data.update(status="retired")),
    ("has a signature that this key did not make", lambda data: data.update(owner="me")),
    ("is not signed", lambda data: data.update(schema=99) or data.pop("signature")),
]


@pytest.mark.parametrize(("why", "how"), REFUSED)
def test_a_record_that_is_not_as_signed_is_refused_and_left_alone(tmp_path: Path, why: str, how: Change) -> None:
    """The next newest is restored and the reason said; its files stay, its name is taken, it is not ranked."""
    train(tmp_path, [0.9, 0.5, 0.1])
    change(record_file(tmp_path, 3), how)
    before = record_file(tmp_path, 3).read_bytes()
    with make(tmp_path, FEW, state=lambda: {"step": 3}) as manager:
        with pytest.warns(CheckpointerWarning, match=f"restored epoch=0-step=2.*step=3.*{why}"):
            assert manager.restore() is not None
        with pytest.raises(UntrustedError, match=why):
            manager.restore("epoch=0-step=3")
        assert 2 == manager.best.step  # type: ignore[union-attr]
        assert "epoch=0-step=3-v1.ckpt" == manager.observe({"loss": 0.4}, 3, 0, epoch_end=False).name  # type: ignore[union-attr]
    assert before == record_file(tmp_path, 3).read_bytes()
    assert (tmp_path / "epoch=0-step=3.ckpt").exists()


def test_nothing_but_refused_records_is_an_error_not_a_fresh_start(tmp_path: Path) -> None:
    """Saved without a key, or with another one: the message says which."""
    train(tmp_path / "unsigned", [0.9], trust=None)
    train(tmp_path / "other", [0.9], trust=OTHER)
    with make(tmp_path / "unsigned") as manager, pytest.raises(NoValidCheckpointError, match="is not signed"):
        manager.restore()
    with make(tmp_path / "other") as manager, pytest.raises(NoValidCheckpointError, match="this key did not make"):
        manager.restore()
    with make(tmp_path / "other") as manager, pytest.raises(RestoreError, match=r"at step 1;.* this key did not make"):
        manager.restore(1)


def test_a_signed_record_copied_to_another_name_is_refused(tmp_path: Path) -> None:
    """The name is signed: an old checkpoint cannot be put back as a new one."""
    train(tmp_path, [0.9, 0.5])
    shutil.copy(tmp_path / "epoch=0-step=1.ckpt", tmp_path / "epoch=0-step=9.ckpt")
    shutil.copy(record_file(tmp_path, 1), record_file(tmp_path, 9))
    with pytest.warns(CheckpointerWarning, match=r"step=9.*it is the record of 'epoch=0-step=1.ckpt'"):
        assert 2 == restored_step(tmp_path)
    change(record_file(tmp_path, 9), lambda data: data["record"].update(name="epoch=0-step=9.ckpt"))
    with pytest.warns(CheckpointerWarning, match=r"step=9.*this key did not make"):
        assert 2 == restored_step(tmp_path)


def test_the_index_is_not_a_way_around(tmp_path: Path) -> None:
    """A planted index that agrees with the listing is verified like the records, which are read instead."""
    train(tmp_path, [0.9, 0.5])
    path = tmp_path / ".checkpointer/index.json"
    data = json.loads(path.read_bytes())
    for entry in data["entries"].values():
        entry[2]["record"]["step"] = 77
    path.write_text(json.dumps(data))
    storage = LocalStorage(tmp_path, new_owner())
    assert {77} == {entry.record.step for entry in load(storage).entries.values()}
    listing = load(storage, KEY)
    assert [1, 2] == sorted(entry.record.step for entry in listing.entries.values())
    assert 2 == listing.reads


def test_the_index_keeps_the_signatures(tmp_path: Path) -> None:
    """So that a trusted directory opens as fast as any other."""
    train(tmp_path, [0.9, 0.5])
    assert 0 == load(LocalStorage(tmp_path, new_owner()), KEY).reads


def test_a_planted_pending_record_deletes_and_restores_nothing(tmp_path: Path) -> None:
    """Without its signature it is not settled, though its writer is dead and its payload is not what it says."""
    owner = new_owner()
    release(owner)
    train(tmp_path, [0.9])
    foreign = tmp_path / "foreign.ckpt"
    foreign.write_bytes(b"{}")
    for status in ("pending", "retired"):
        planted = Entry(
            record=record("foreign.ckpt", step=9, size=2, digest="sha256:" + "0" * 64), status=status, owner=owner
        )
        path = tmp_path / ".checkpointer/records/foreign.ckpt.json"
        path.write_bytes(planted.to_json())
        with make(tmp_path) as manager:
            assert [1] == [r.step for r in manager.records]
        assert planted.to_json() == path.read_bytes()
        assert b"{}" == foreign.read_bytes()


def test_a_record_planted_while_training_is_not_written_over(tmp_path: Path) -> None:
    """The save fails with the reason instead of believing what it says of the payload under its name."""
    policy = Policy(EverySteps(1), [], last="copy")
    with make(tmp_path, policy) as manager:
        manager.observe({}, step=1, epoch=0, epoch_end=False)
        change(tmp_path / ".checkpointer/records/last.ckpt.json", lambda data: data.pop("signature"))
        with pytest.raises(SaveError, match=r"last.ckpt was not saved \(UntrustedError: .*is not signed"):
            manager.observe({}, step=2, epoch=0, epoch_end=False)


@pytest.mark.filterwarnings("ignore:last.ckpt is not this run's")
def test_a_planted_alias_marker_frees_no_name(tmp_path: Path) -> None:
    """A file of others is not replaced because an unsigned marker says that it is ours."""
    train(tmp_path, [0.9])
    (tmp_path / "last.ckpt").write_bytes(b"other")
    markers = tmp_path / ".checkpointer/aliases"
    markers.mkdir()
    (markers / "last.ckpt.json").write_text('{"schema": 1, "alias": "last.ckpt", "label": "", "owner": ""}')
    with make(tmp_path, FEW) as manager:
        manager.restore()
        manager.observe({"loss": 0.1}, step=2, epoch=0, epoch_end=False)
        assert "last-v1.ckpt" == manager.policy.name.last_file
    assert b"other" == (tmp_path / "last.ckpt").read_bytes()


def test_a_digest_that_can_be_forged_is_refused(tmp_path: Path) -> None:
    """Even signed: other bytes with the same xxh3 digest are easy to make."""
    train(tmp_path, [0.9])
    path = record_file(tmp_path, 1)
    data = json.loads(path.read_bytes())
    assert data["record"]["digest"].startswith("sha256:")
    data["record"]["digest"] = "xxh3-128:" + "0" * 32
    path.write_bytes(to_json(signed(data, KEY)))
    with make(tmp_path) as manager, pytest.raises(NoValidCheckpointError, match=r"can be forged; .* only sha256"):
        manager.restore()


# Everything still works


def test_a_signed_directory_survives_everything(tmp_path: Path) -> None:
    """Saved, ranked, retired, attached, pinned, aliased, relocated and reopened: all of it is signed."""
    with make(tmp_path, FEW) as manager:
        for step, loss in enumerate([0.9, 0.5, 0.7, 0.8], start=1):
            manager.observe({"loss": loss}, step=step, epoch=0, epoch_end=False)
        manager.pin(manager.records[-1].name)
        manager.observe({"loss": 0.6, "acc": 1.0}, step=4, epoch=0, epoch_end=False)
        manager.rescue("test", step=5)
    files = list((tmp_path / ".checkpointer/records").rglob("*.json"))
    assert files
    for path in files:
        check_signature(json.loads(path.read_bytes()), str(path), KEY)
    with make(tmp_path, FEW) as manager:
        assert [2, 4, 5] == [r.step for r in manager.records]
        assert {"sha256"} == {r.digest.partition(":")[0] for r in manager.records}
        assert not manager._directory.damaged


def test_folders_are_digested_by_names_and_bytes(tmp_path: Path) -> None:
    """A trainer's folder carries a sha256 too, and a changed file in it is found."""

    def save(path: str) -> None:
        folder = Path(path)
        folder.mkdir()
        (folder / "a").write_text("1")
        (folder / "b").write_text("2")

    with CheckpointManager(tmp_path, ALL, save=save, trust=KEY) as manager:
        manager.observe({}, step=1, epoch=0, epoch_end=False)
        (made,) = manager.records
        assert made.digest.startswith("sha256:")
        (tmp_path / made.name / "a").write_text("3")
        with pytest.raises(CorruptError, match="has other bytes than were written"):
            manager.restore(1)


def test_interrupted_saves_are_settled_by_sha256() -> None:
    """A pending record of ours is believed, and its payload decides."""
    storage = MemoryStorage()
    storage.write("a.ckpt", b"whole")
    owner = new_owner()
    journal = Journal(storage, owner, KEY)
    found = digest_of(storage, "a.ckpt", "sha256")
    assert found is not None
    there = record("a.ckpt", size=found[0], digest=found[1])
    journal.put(Entry(record=there, status="pending", owner=owner))
    release(owner)
    found_out = recover(Journal(storage, new_owner(), KEY), load(storage, KEY))
    assert (there,) == found_out.records
    finish_run(storage, KEY, (there.run, there.label))
    assert ["committed"] == [entry.status for entry in load(storage, KEY).entries.values()]


# Without the key


def test_a_reader_without_the_key_reads(tmp_path: Path) -> None:
    """Only a reader with the key checks signatures; another reader sees a plain directory."""
    train(tmp_path, [0.9, 0.5])
    assert 2 == restored_step(tmp_path, trust=None)


def test_a_writer_without_the_key_is_refused_before_it_changes_anything(tmp_path: Path) -> None:
    """A record that it rewrites (a pin, a metric) would lose its signature, and so the checkpoint."""
    train(tmp_path, [0.9, 0.5])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UntrustedError, match=r"2 checkpoints in .* are signed.*pass trust="):
        make(tmp_path, trust=None)
    with (
        CheckpointManager(tmp_path, ALL, format=PlainFormat()) as reader,
        pytest.raises(UntrustedError, match="pass trust="),
    ):
        reader.pin("epoch=0-step=1.ckpt")
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_untrusted_is_caught_as_either_kind() -> None:
    """It is what is wrong with a record, and why a restore fails."""
    assert issubclass(UntrustedError, RecordError)
    assert issubclass(UntrustedError, RestoreError)


# Time of check, time of use


@attrs.define
class SwappingStorage(MemoryStorage):
    """Gives other bytes to the second read of a payload, and the right ones again after that."""

    evil: bytes = b""
    swaps: int = attrs.field(default=0, init=False)

    def __attrs_pre_init__(self) -> None:
        super().__init__()

    def open(self, path: str) -> BinaryIO:
        """See `Storage.open`."""
        stream = super().open(path)
        return _Swapping(stream.read(), self) if path.endswith(".ckpt") and self.evil else stream  # type: ignore[return-value]


class _Swapping:
    """A stream whose second pass reads what an attacker has put there meanwhile."""

    def __init__(self, data: bytes, storage: SwappingStorage) -> None:
        self._good, self._bad = io.BytesIO(data), io.BytesIO(storage.evil)
        self._storage = storage
        self._now = self._good

    def __enter__(self) -> _Swapping:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def close(self) -> None:
        pass

    def read(self, size: int = -1) -> bytes:
        return self._now.read(size)

    def seek(self, position: int) -> int:
        self._now = self._bad
        self._storage.swaps += 1
        return self._now.seek(position)


@pytest.mark.parametrize("trust", [KEY, None], ids=["trusted", "plain"])
def test_what_is_loaded_is_what_was_verified(trust: HMACKey | None) -> None:
    """Bytes that change between the two reads are never handed to the unpickler, even if they change back."""
    storage = SwappingStorage()
    manager = CheckpointManager(storage, ALL, state=lambda: {"step": 1}, format=PlainFormat(), trust=trust)
    manager.observe({}, step=1, epoch=0, epoch_end=False)
    storage.evil = b'{"step": 2}'
    with pytest.raises(CorruptError, match="changed between being verified and being read; nothing of it was used"):
        manager.restore(1)
    assert storage.swaps


def test_what_export_and_diff_read_is_what_was_verified() -> None:
    """They open a payload through the verified blocks, as a restore does; a part that has changed is an error."""
    states = ({"w": torch.ones(4)}, {"w": torch.zeros(4)})
    good, evil = (io.BytesIO(), io.BytesIO())
    torch.save(states[0], good)
    torch.save(states[1], evil)
    storage = SwappingStorage()
    with CheckpointManager(storage, ALL, state=lambda: states[0]) as manager:
        manager.observe({}, step=1, epoch=0, epoch_end=False)
    (record,) = look_at(storage).records
    with open_verified(storage, record) as contents:
        assert torch.equal(torch.ones(4), contents.read("w"))
    storage.evil = evil.getvalue()
    assert len(storage.evil) == record.size
    with (
        pytest.raises(CorruptError, match="changed between being verified and being read"),
        open_verified(storage, record) as contents,
    ):
        contents.read("w")
    assert storage.swaps
    del storage._files[record.name]
    with pytest.raises(CorruptError, match="is gone"), open_verified(storage, record):
        pass


@pytest.mark.parametrize("name", ["w.pt", "part/w.safetensors"])
def test_a_part_of_a_folder_that_changes_after_it_was_verified_is_not_read(tmp_path: Path, name: str) -> None:
    """Each file of a folder has its verified blocks, and no file is read that was not there."""
    folder = tmp_path / "a.ckpt"
    (folder / name).parent.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    write_weights(folder / name, {"w": TensorInfo(name="w", dtype="float32", shape=(4,))}, lambda _: torch.ones(4))
    storage = LocalStorage(tmp_path, new_owner())
    found = digest_of(storage, "a.ckpt", "sha256")
    assert found is not None
    whole = record("a.ckpt", size=found[0], digest=found[1])
    with open_verified(storage, whole) as contents:
        assert torch.equal(torch.ones(4), contents.read(f"{name}: w"))
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data.replace(torch.ones(4).numpy().tobytes(), torch.zeros(4).numpy().tobytes()))
    with pytest.raises(CorruptError, match=r"a\.ckpt has other bytes than were written"), open_verified(storage, whole):
        pass


class SwappedAfterwards(LocalStorage):
    """Lets an attacker replace the files of a folder as soon as the last of them was read once."""

    evil: Path | None = None

    def open(self, path: str) -> BinaryIO:
        """See `Storage.open`."""
        stream = super().open(path)
        folder = path.rpartition("/")[0]
        if self.evil is None or path != max(self.list(folder)):
            return stream
        with stream:
            data = stream.read()
        shutil.copytree(self.evil, self.local_path(folder), dirs_exist_ok=True)
        self.evil = None
        return io.BytesIO(data)


def dcp_folders(tmp_path: Path, digest: str) -> tuple[SwappedAfterwards, Record]:
    """Return a storage with a DCP folder that torch itself has written, and its record; and one of the attacker."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, value in (("a.dcp", 1.0), ("evil", 2.0)):
            save({"w": torch.full((4,), value), "step": int(value)}, checkpoint_id=tmp_path / name)
    storage = SwappedAfterwards(tmp_path, new_owner())
    found = digest_of(storage, "a.dcp", digest)
    assert found is not None
    storage.evil = tmp_path / "evil"
    return storage, record("a.dcp", size=found[0], digest=found[1], format="dcp")


@pytest.mark.filterwarnings("ignore:torch.distributed is")
@pytest.mark.parametrize("digest", ["sha256", "files-sha256"])
def test_a_dcp_folder_is_read_through_its_verified_bytes(tmp_path: Path, digest: str) -> None:
    """By `export`, `average` and `diff`: also its metadata, which says where each tensor lies."""
    storage, whole = dcp_folders(tmp_path, digest)
    with pytest.raises(CorruptError, match="it changed between being verified"), open_verified(storage, whole):
        pass
    storage, whole = dcp_folders(tmp_path, digest)
    storage.evil = None
    with open_verified(storage, whole) as contents:
        assert torch.equal(torch.ones(4), contents.read("w"))
        shutil.copytree(tmp_path / "evil", tmp_path / "a.dcp", dirs_exist_ok=True)
        with pytest.raises(CorruptError):
            contents.read("w")


@pytest.mark.parametrize("digest", ["sha256", "files-sha256"])
@pytest.mark.parametrize("left", [".metadata", "__0_0.distcp"])
def test_a_restored_dcp_folder_has_the_verified_bytes(tmp_path: Path, digest: str, left: str) -> None:
    """Also if its record names no files, or its metadata has no digests: it was adopted, or has very many files."""
    storage, whole = dcp_folders(tmp_path, digest)
    shutil.copy(tmp_path / "a.dcp" / left, tmp_path / "evil" / left)
    with pytest.raises(CorruptError, match=r"has other bytes than were written|is not the one that was written"):
        load_checkpoint(storage, lambda _: DcpFormat(), whole, weights_only=True, map_location="cpu")
    assert storage.evil is None
    shutil.rmtree(tmp_path / "a.dcp")
    storage, whole = dcp_folders(tmp_path, digest)
    storage.evil = None
    state = load_checkpoint(storage, lambda _: DcpFormat(), whole, weights_only=True, map_location="cpu").state
    assert (1, 4.0) == (state["step"], state["w"].sum().item())
