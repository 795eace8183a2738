"""Folders of ``torch.distributed.checkpoint``: read whole, without running anything, and never out of the folder."""

from __future__ import annotations

import pickle
from copy import deepcopy
from io import BytesIO, UnsupportedOperation
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem
from support.factories import record
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.state_dict_saver import save

from checkpointer import CheckpointerWarning, CheckpointManager, EverySteps, KeepAll, KeepLast, Policy
from checkpointer.commit import transaction
from checkpointer.commit.index import load
from checkpointer.commit.journal import Journal
from checkpointer.commit.recovery import Recovered, finish_run, recover
from checkpointer.commit.terms import TERMS
from checkpointer.commit.transaction import Transaction
from checkpointer.errors import CorruptError, FencedError, RestoreError, RunInUseError, SaveError, UnsafePayloadError
from checkpointer.formats.dcp_folder import DcpFormat
from checkpointer.formats.dcp_reader import FolderReader
from checkpointer.formats.inspection.payload import open_contents
from checkpointer.records.digest_algorithms import ALGORITHM, DIGESTS
from checkpointer.records.record import Record
from checkpointer.storage.local import LocalStorage
from checkpointer.storage.owner import new_owner
from checkpointer.testing import MemoryStorage, die
from checkpointer.tools import sweep as sweeping
from checkpointer.tools.catalog import look_at

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is", "ignore:Detected an existing checkpoint")

POLICY = Policy(EverySteps(1), [KeepLast(2)])
STATE: dict[str, Any] = {
    "model": {"w": torch.arange(6.0).reshape(2, 3), "half": torch.ones(2, dtype=torch.bfloat16)},
    "optimizer": {"groups": [{"lr": 0.1, "betas": (0.9, 0.99)}, {"lr": 0.2}], "step": torch.tensor(3)},
    "epoch": 2,
    "empty": {},
    "text": "abc",
}


def read(folder: Path, *, weights_only: bool = True) -> Any:
    return DcpFormat().read_folder(str(folder), weights_only=weights_only, map_location="cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that torch itself has written."""
    path = tmp_path / "folder.dcp"
    save(STATE, checkpoint_id=path)
    return path


def change_metadata(folder: Path, **changes: Any) -> None:
    metadata = FileSystemReader(folder).read_metadata()
    for name, value in changes.items():
        setattr(metadata, name, value)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


class Evil:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_what_torch_wrote_is_read_whole(folder: Path) -> None:
    """Nested dicts, lists, tuples, tensors of any type, and plain values; DCP stores no empty dict."""
    found = read(folder)

    assert found.keys() == STATE.keys() - {"empty"}
    assert torch.equal(STATE["model"]["w"], found["model"]["w"])
    assert torch.bfloat16 == found["model"]["half"].dtype
    assert STATE["optimizer"]["groups"] == found["optimizer"]["groups"]
    assert (2, "abc") == (found["epoch"], found["text"])


def test_a_manager_saves_and_restores_folders(tmp_path: Path) -> None:
    """In one process too; the folders are retired as files are."""
    state = {"w": torch.zeros(3), "step": 0}
    with CheckpointManager(
        tmp_path, Policy(EverySteps(1), [KeepLast(2)]), state=lambda: state, format="dcp"
    ) as manager:
        for step in (1, 2, 3):
            state["w"], state["step"] = torch.full((3,), float(step)), step
            manager.observe({}, step, 0, epoch_end=False)
        names = [record.name for record in manager.records]
    assert ["epoch=0-step=2.dcp", "epoch=0-step=3.dcp"] == names
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != ".checkpointer") == names
    with CheckpointManager(tmp_path, format="dcp") as manager:
        restored = manager.restore()
        assert restored is not None
        assert [3.0, 3.0, 3.0] == restored.state["w"].tolist()
        assert 3 == restored.state["step"]


def test_folders_at_a_url(request: pytest.FixtureRequest) -> None:
    """Without a path, torch's fsspec writer writes to a new name, and a restore reads it there."""
    url = f"memory://{request.node.name}"
    state = {"w": torch.zeros(3)}
    with CheckpointManager(url, POLICY, state=lambda: state, format="dcp") as manager:
        for step in (1, 2, 3):
            state["w"] = torch.full((3,), float(step))
            manager.observe({}, step, 0, epoch_end=False)
    with CheckpointManager(url, format="dcp") as manager:
        assert [2, 3] == [record.step for record in manager.records]
        restored = manager.restore()
        assert restored is not None
        assert [3.0, 3.0, 3.0] == restored.state["w"].tolist()
    paths = fsspec.filesystem("memory").find(f"/{request.node.name}")
    assert not [path for path in paths if "step=1.dcp" in path]


def test_nothing_is_synced_at_a_url() -> None:
    """A stream there has no file number; asking for it makes DCP sync every disk of this machine, or warn."""
    asked: list[str] = []

    class Stream(MemoryFile):  # type: ignore[misc]
        def fileno(self) -> int:
            asked.append("a file number")
            raise UnsupportedOperation

    class Streams(MemoryFileSystem):  # type: ignore[misc]
        protocol = "unsynced"
        store: ClassVar[dict[str, Any]] = {}

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return str(super()._strip_protocol(path.replace("unsynced://", "memory://")))

        def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
            if mode != "wb":
                return super()._open(path, mode, **kwargs)
            stream = Stream(self, path)
            stream.commit()
            return stream

    fsspec.register_implementation("unsynced", Streams, clobber=True)
    DcpFormat().write_folder({"w": torch.ones(2)}, "unsynced://run/step=1.dcp")
    assert [] == asked
    assert 2 == len(Streams.store)


@pytest.mark.parametrize("goes_on", ["run", "restore"])
def test_what_an_earlier_job_finishes_meanwhile_is_not_taken_for_half_a_save(
    monkeypatch: pytest.MonkeyPatch, goes_on: str
) -> None:
    """A job that takes over while the last one still writes removes what that one has written; its save fails."""
    url = f"memory://meanwhile-{goes_on}"
    how: dict[str, Any] = {"state": lambda: {"w": torch.ones(2)}, "format": "dcp"}
    policy = Policy(EverySteps(1), [KeepAll()])
    before = CheckpointManager(url, policy, **how)
    before.observe({}, 1, 0, epoch_end=False)
    run = before.records[-1].run
    opened: list[CheckpointManager] = []
    check_written = transaction._check_written

    def open_another(*args: Any) -> Any:
        if not opened:
            with pytest.raises(RunInUseError, match="trains run"):
                CheckpointManager(url, policy, run=run, **how)
            again = run if goes_on == "run" else None
            opened.append(CheckpointManager(url, policy, run=again, takeover=True, **how))
            if goes_on == "restore":
                opened[0].restore()
        return check_written(*args)

    with monkeypatch.context() as patched:
        patched.setattr(transaction, "_check_written", open_another)
        with pytest.raises(FencedError):
            before.observe({}, 2, 0, epoch_end=False)
    before.close()
    opened[0].observe({}, 5, 0, epoch_end=False)
    assert [1, 5] == [record.step for record in opened[0].records]
    opened[0].close()
    with CheckpointManager(url, format="dcp", run=run) as reader:
        assert [1, 5] == [record.step for record in reader.records]
        assert () == reader.session.manifest.abandoned


def test_sweep_leaves_what_was_finished_after_it_had_looked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its writer may be dead by then, and the checkpoint acknowledged."""
    storage, owner = MemoryStorage(), new_owner()
    look = look_at
    looked: list[Any] = []

    def look_before(*args: Any) -> Any:
        return looked.pop()

    def write() -> None:
        storage.write("a.dcp/.metadata", b"all of it")
        looked.append(look(storage))

    Transaction(Journal(storage, owner)).commit_named(record(name="a.dcp", format="dcp"), write)
    die(owner)
    monkeypatch.setattr(sweeping, "look_at", look_before)
    assert () == sweeping.sweep(storage, new_owner()).finished
    assert ["a.dcp"] == [found.name for found in look(storage).records]


def test_an_object_that_a_killed_save_has_left_under_the_very_name_is_removed() -> None:
    """The save had reserved the name before it wrote."""
    storage, owner = MemoryStorage(), new_owner()

    def killed() -> None:
        storage.write("a.dcp", b"")
        raise _KilledError

    with pytest.raises(_KilledError):
        Transaction(Journal(storage, owner)).commit_named(record(name="a.dcp", format="dcp"), killed)
    die(owner)
    finish_run(storage, None, (record().run, record().label))
    assert Recovered(records=(), missing=(), left=()) == recover(Journal(storage, new_owner()), load(storage))
    assert [] == [path for path in storage.list() if not path.startswith(TERMS)]


class _KilledError(BaseException):
    """Ends a save as a kill does: nothing catches it to clear up."""


@pytest.mark.parametrize("where", ["metadata", "value"])
def test_nothing_in_a_folder_is_run(tmp_path: Path, folder: Path, where: str) -> None:
    """Its metadata is a pickle, and so is each value that is not a tensor: both name only what is known."""
    trace = tmp_path / "trace"
    if where == "metadata":
        change_metadata(folder, planner_data=Evil(trace))
    else:
        save({"w": torch.ones(1), "evil": Evil(trace)}, checkpoint_id=folder)

    with pytest.raises((UnsafePayloadError, RestoreError), match=r"refuses to unpickle"):
        read(folder)
    assert not trace.exists()


def test_metadata_leads_neither_out_of_the_folder_nor_out_of_memory(folder: Path) -> None:
    """A path with '..', and the list index of a bomb."""
    metadata = FileSystemReader(folder).read_metadata()
    for info in metadata.storage_data.values():
        info.relative_path = "../other"
    change_metadata(folder, storage_data=metadata.storage_data)
    with pytest.raises(CorruptError, match="outside of it"):
        read(folder)

    save(STATE, checkpoint_id=folder)
    change_metadata(folder, planner_data={"epoch": ("epoch", 10**12)})
    with pytest.raises(CorruptError, match="list index"):
        read(folder)


def test_damaged_metadata_is_corrupt(folder: Path) -> None:
    """Cut anywhere, or gone."""
    whole = (folder / ".metadata").read_bytes()
    for size in range(0, len(whole), 7):
        (folder / ".metadata").write_bytes(whole[:size])
        with pytest.raises(CorruptError):
            read(folder)
    (folder / ".metadata").unlink()
    with pytest.raises(CorruptError, match="did not write this folder"):
        read(folder)


@pytest.mark.parametrize(
    ("saved", "here"), [(torch.int64, torch.int8), (torch.float32, torch.int64), (torch.float32, torch.bfloat16)]
)
def test_numbers_that_the_state_cannot_hold_are_refused(tmp_path: Path, saved: torch.dtype, here: torch.dtype) -> None:
    """DCP itself would convert them silently."""
    folder = str(tmp_path / "folder.dcp")
    DcpFormat().write_folder({"w": torch.full((2,), 300).to(saved)}, folder)
    template = {"w": torch.zeros(2, dtype=here)}
    with pytest.raises(RestoreError, match=rf"w is {saved} in the checkpoint, and {here} here cannot hold it"):
        DcpFormat(template=lambda: template).read_folder(folder, weights_only=True, map_location="cpu")
    assert [0, 0] == template["w"].tolist()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["csr", "coo", "jagged", "nested", "quantized", "meta"])
def test_a_tensor_that_a_folder_cannot_hold_is_named(tmp_path: Path, kind: str) -> None:
    """The error of torch says neither where it is nor what to do."""
    parts = [torch.ones(1, 2), torch.ones(2, 2)]
    tensor = {
        "csr": torch.eye(2).to_sparse_csr(),
        "coo": torch.eye(2).to_sparse(),
        "jagged": torch.nested.nested_tensor(parts, layout=torch.jagged),
        "nested": torch.nested.nested_tensor(parts),
        "quantized": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
        "meta": torch.ones(2, device="meta"),
    }[kind]
    match = r"state\['m'\]\['x'\] is .*" + ("materialise" if kind == "meta" else "cannot hold it: use format='torch'")
    with (
        CheckpointManager(tmp_path, POLICY, state={"m": {"x": tensor}}.copy, format="dcp") as manager,
        pytest.raises(SaveError, match=match),
    ):
        manager.observe({}, step=1)


def test_numbers_that_the_state_can_hold_are_converted(tmp_path: Path) -> None:
    """Nothing is lost by it."""
    folder = str(tmp_path / "folder.dcp")
    DcpFormat().write_folder({"w": torch.full((2,), 1.5, dtype=torch.bfloat16)}, folder)
    template = {"w": torch.zeros(2, dtype=torch.float64)}
    DcpFormat(template=lambda: template).read_folder(folder, weights_only=True, map_location="cpu")
    assert [1.5, 1.5] == template["w"].tolist()


def test_a_state_without_names_is_refused(tmp_path: Path) -> None:
    """DCP writes dicts; the message says so."""
    with pytest.raises(SaveError, match="the state is a list"):
        DcpFormat().write_folder([1, 2], str(tmp_path / "x"))


def test_what_a_safe_load_refuses_is_named_when_it_is_saved(tmp_path: Path) -> None:
    """As with a torch file."""
    state = {"w": torch.ones(1), "path": Path("x")}
    with CheckpointManager(
        tmp_path, Policy(EverySteps(1), [KeepLast(2)]), state=lambda: state, format="dcp"
    ) as manager:
        with pytest.warns(CheckpointerWarning, match=r"state\['path'\] is a pathlib"):
            manager.observe({}, 1, 0, epoch_end=False)
        with pytest.raises(RestoreError, match="refuses to unpickle"):
            manager.restore()
        restored = manager.restore(weights_only=False)
        assert restored is not None
        assert Path("x") == restored.state["path"]


def test_a_file_is_not_read_as_a_folder(tmp_path: Path) -> None:
    """A record that names one format, and a payload of the other kind."""
    with CheckpointManager(tmp_path, POLICY, state=dict) as manager:
        manager.observe({}, 1, 0, epoch_end=False)
        (record,) = manager.records
    assert isinstance(record, Record)
    path = next((tmp_path / ".checkpointer" / "records").iterdir())
    path.write_text(path.read_text().replace('"torch"', '"dcp"'))
    with CheckpointManager(tmp_path) as manager, pytest.raises(RestoreError, match="'dcp' reads folders"):
        manager.restore(record.name)


def test_a_folder_is_looked_into_on_any_storage(folder: Path) -> None:
    """Through the storage, which needs no paths."""
    storage = MemoryStorage()
    for path in folder.iterdir():
        storage.write(f"a.dcp/{path.name}", path.read_bytes())
    with open_contents(storage, "a.dcp") as contents:
        assert [] == list(contents.problems())
        assert torch.equal(STATE["model"]["w"], contents.read("model.w"))


def shards(folder: Path, *parts: torch.Tensor, **info: Any) -> None:
    """Write a folder with a tensor ``w`` of four elements, each half of which is a shard."""
    properties, size = TensorProperties(dtype=torch.float32), torch.Size([2])
    offsets = [torch.Size([start]) for start in (0, 2)]
    chunks = [ChunkStorageMetadata(offset, size) for offset in offsets]
    data = []
    for part in parts:
        stream = BytesIO()
        torch.save(part, stream)
        data.append(stream.getvalue())
    places = {
        MetadataIndex("w", offset): _StorageInfo("a.distcp", start, len(one), **info)
        for offset, start, one in zip(offsets, (0, len(data[0])), data, strict=True)
    }
    (folder / "a.distcp").write_bytes(b"".join(data))
    stored = TensorStorageMetadata(properties, torch.Size([4]), chunks)
    (folder / ".metadata").write_bytes(pickle.dumps(Metadata({"w": stored}, storage_data=places)))


def test_the_shards_of_a_tensor_are_put_together_for_a_look(tmp_path: Path) -> None:
    """As a restore does it."""
    shards(tmp_path, torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]))
    assert [1.0, 2.0, 3.0, 4.0] == read(tmp_path)["w"].tolist()
    with open_contents(LocalStorage(tmp_path, ""), "") as contents:
        assert [1.0, 2.0, 3.0, 4.0] == contents.read("w").tolist()


def test_a_shard_of_another_shape_is_refused(tmp_path: Path) -> None:
    """One element is not taken for two."""
    shards(tmp_path, torch.ones(2), torch.ones(1))
    with pytest.raises(CorruptError, match=r"w: .*does not fit"):
        read(tmp_path)
    with open_contents(LocalStorage(tmp_path, ""), "") as contents, pytest.raises(CorruptError, match="does not fit"):
        contents.read("w")


def test_a_shard_that_was_written_through_a_transform_is_refused_by_a_safe_load(tmp_path: Path) -> None:
    """What would undo it is code that the metadata names."""
    shards(tmp_path, torch.ones(2), torch.ones(2), transform_descriptors=["stream.zstd"])
    with pytest.raises(CorruptError, match=r"w.* was written through \['stream.zstd'\]"):
        read(tmp_path)
    with (
        open_contents(LocalStorage(tmp_path, ""), "") as contents,
        pytest.raises(CorruptError, match="written through"),
    ):
        contents.read("w")


@pytest.mark.parametrize("weights_only", [True, False])
def test_a_missing_file_of_a_folder_is_named(folder: Path, weights_only: bool) -> None:
    """Whichever reader reads it, what is missing is damage."""
    next(folder.glob("*.distcp")).unlink()
    into = DcpFormat(template=lambda: deepcopy(STATE))
    with pytest.raises(CorruptError, match="it is gone"):
        into.read_folder(str(folder), weights_only=weights_only, map_location="cpu")


class Text:
    """A target that reads one value before it says which tensors it wants."""

    def wanted(self, folder: FolderReader) -> dict[str, Any]:
        self.text = folder.value("text")
        return {"model": {"w": torch.zeros(2, 3)}}

    def result(self, state: dict[str, Any]) -> Any:
        return self.text, state["model"]["w"]


@pytest.mark.parametrize("everything", [True, False])
def test_a_target_reads_a_verified_value_of_a_folder_that_has_no_digests_of_items(
    folder: Path, everything: bool
) -> None:
    """torch has written the folder; its record has only the digest of each file."""
    data = {path.name: path.read_bytes() for path in folder.iterdir()}
    files = {name: (len(each), DIGESTS[ALGORITHM](each).hexdigest()) for name, each in data.items()}
    target = Text()
    text, w = DcpFormat(template=lambda: target).read_verified(
        str(folder), files=files, algorithm=ALGORITHM, everything=everything, weights_only=True, map_location="cpu"
    )
    assert text == "abc"
    assert torch.equal(STATE["model"]["w"], w)
